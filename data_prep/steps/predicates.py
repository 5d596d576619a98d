"""Filter conditions on the metadata of a pair: `punsafe < 0.5`, sizes, a language.

The paper removed unsafe and watermarked pairs before CAT (DiHT, arXiv 2301.02280).

A condition is parsed to a syntax tree and interpreted here; Python never executes it. The language
has comparisons (also chained, `0.3 < width / height < 3`, and `in` a list), `and`, `or`, `not`,
numbers, quoted texts, `+ - * /`, and the functions `min`, `max` and `len`. A name is a field of the
pair's metadata, or `key` or `caption`. `field("NSFW score")` reads a field whose name is not an
identifier.

Comparisons with a text compare texts; all others compare numbers. A text that spells a number
counts as the number, since text tables have no other form. If a field is missing or has another
type, the comparison is unknown (None). As in SQL, `not` of unknown is unknown, and so are `and`
with something true and `or` with something false.
"""

from __future__ import annotations

import ast
import collections
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import logging

from data_prep.steps.base import EVIDENCE, Candidate, Step
from diht_jax.config.keys import Key, OneOf
from diht_jax.readers.base import SourceShard

Fields = Mapping[str, Any]

_ORDERS: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_EXPECTED = "comparisons joined by and, or and not, such as 'punsafe < 0.5 and LANGUAGE == \"en\"'"


class PredicateStep(Step):
    """Drops pairs for which a condition does not hold. The first such condition is the reason.

    Reasons are named after conditions: "CONDITION is false", and "CONDITION is unknown" if a field
    is missing or has another type.
    """

    name = "metadata"
    order = 5  # before any caption is parsed
    reads = ("metadata",)
    reasons = {}
    keys = {
        # Conditions to require, such as ("punsafe < 0.5", "pwatermark < 0.5"); steps/predicates.py
        "predicates.require": (),
        # Whether to "drop" or "keep" a pair for which a condition is unknown, because a field is
        # missing or not a number. With "drop", a field that no pair has drops all pairs.
        "predicates.missing": Key("drop", OneOf(("drop", "keep"))),
    }
    section = "predicates"
    switch = "predicates.require"

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        if cls.is_active(config):
            _parse(config.predicates.require)

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        self._conditions = _parse(config.predicates.require)
        self._drops_unknown = config.predicates.missing == "drop"
        self._unknown: collections.Counter[str] = collections.Counter()
        self._seen = 0

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        self._seen += len(batch)
        reasons, evidence = [], []
        for candidate in batch:
            pair = candidate.pair
            fields = {**pair.metadata, "key": pair.key, "caption": pair.caption}
            reason, condition = self._find_reason(fields)
            shown = (
                f"{name} = {fields[name]!r:.80}" if fields.get(name) is not None else f"no {name}"
                for name in (condition.fields if condition else ())
            )
            reasons.append(reason)
            evidence.append(", ".join(shown) or None)
        return {self.name: reasons, EVIDENCE: evidence}

    def close(self) -> dict[str, Any]:
        """Warns of conditions that are unknown for all pairs: the field's name may be wrong."""
        for condition in self._conditions:
            if self._seen and self._unknown[condition.text] == self._seen:
                logging.warning(
                    "%s: '%s' is unknown for all %d pairs; is a field missing (%s)?",
                    self.source, condition.text, self._seen, ", ".join(condition.fields),
                )  # fmt: skip
        return {}

    def _find_reason(self, fields: Fields) -> tuple[str | None, Condition | None]:
        """Returns why a pair is dropped, and the condition that drops it."""
        for condition in self._conditions:
            holds = condition.holds(fields)
            if holds is None:
                self._unknown[condition.text] += 1
                if self._drops_unknown:
                    return f"{condition.text} is unknown", condition
            elif not holds:
                return f"{condition.text} is false", condition
        return None, None


def _parse(texts: Sequence[str]) -> list[Condition]:
    """Parses the conditions of the config. A ValueError for an invalid one names the key."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"config.predicates.require={texts!r}; expected texts, such as "
            "('punsafe < 0.5', 'pwatermark < 0.5')"
        )
    try:
        return [parse_condition(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"config.predicates.require has {error}") from error


class Condition(NamedTuple):
    """A parsed condition.

    Attributes:
        text: the condition as typed, with single spaces.
        fields: names of the fields that it reads, in order.
    """

    text: str
    fields: tuple[str, ...]
    tree: ast.expr

    def holds(self, fields: Fields) -> bool | None:
        """Returns True, False or None (unknown) for the fields of a pair."""
        return _truth(self.tree, fields)


class _NoFields(dict[str, Any]):
    """The fields of an empty pair, which records the names that are looked up."""

    def get(self, name: str, default: Any = None) -> None:
        self[name] = None


def parse_condition(text: str) -> Condition:
    """Parses a condition.

    Raises:
        ValueError: the condition is invalid; the message shows where.
    """
    asked = _NoFields()
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _truth(tree, asked)  # checks all of the tree, since nothing short-circuits
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        detail = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"'{text}': {detail}; expected {_EXPECTED}") from error
    if not asked:
        raise ValueError(f"'{text}': names no field; expected {_EXPECTED}")
    return Condition(" ".join(text.split()), tuple(asked), tree)


def _truth(node: ast.expr, fields: Fields) -> bool | None:
    match node:
        case ast.BoolOp(op, values):
            return _join([_truth(value, fields) for value in values], isinstance(op, ast.Or))
        case ast.UnaryOp(ast.Not(), operand):
            truth = _truth(operand, fields)
            return None if truth is None else not truth
        case ast.Compare(left, kinds, rights):
            sides = zip([left, *rights[:-1]], kinds, rights, strict=True)
            return _join([_compare(*parts, fields) for parts in sides], is_or=False)
    raise ValueError(f"'{ast.unparse(node)}' is no comparison")


def _join(truths: Sequence[bool | None], is_or: bool) -> bool | None:
    """Combines truths with `or` or `and`. Unknown matters only if the others do not decide."""
    if is_or in truths:
        return is_or
    return None if None in truths else not is_or


def _compare(left: ast.expr, kind: ast.cmpop, right: ast.expr, fields: Fields) -> bool | None:
    if isinstance(kind, ast.In | ast.NotIn):
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise ValueError(f"'{ast.unparse(right)}' after 'in'; expected a list of constants")
        terms = [_term(element, {}) for element in right.elts]  # "-1" is not an `ast.Constant`
        values, types = [value for value, _ in terms], {form for _, form in terms}
        if None in values or types not in ({"text"}, {"number"}):
            raise ValueError(f"'{ast.unparse(right)}': expected texts only, or numbers only")
        is_wanted = isinstance(kind, ast.In)
        read = _as_text if types == {"text"} else _as_number
        return _apply(lambda value: (value in values) is is_wanted, read, _term(left, fields)[0])
    if type(kind) not in _ORDERS:
        raise ValueError("'is' compares nothing here")
    terms, types = zip(_term(left, fields), _term(right, fields), strict=True)
    if set(types) == {"text", "number"}:
        raise ValueError(
            f"'{ast.unparse(left)}' and '{ast.unparse(right)}' are a number and a text"
        )
    return _apply(_ORDERS[type(kind)], _as_text if "text" in types else _as_number, *terms)


def _term(node: ast.expr, fields: Fields) -> tuple[Any, str]:
    """Returns the value of a term, and its form: "number", "text" or "field"."""
    match node:
        case ast.Constant(int() | float() | str() as value):
            return value, "text" if isinstance(value, str) else "number"
        case ast.Name(name) | ast.Call(ast.Name("field"), [ast.Constant(str() as name)], []):
            return fields.get(name), "field"
        case ast.UnaryOp(ast.USub(), operand):
            return _calculate(operator.neg, [operand], fields)
        case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
            return _calculate(_ARITHMETIC[type(op)], [left, right], fields)
        case ast.Call(ast.Name("min" | "max" as name), [_, _, *_] as values, []):
            return _calculate(min if name == "min" else max, values, fields)
        case ast.Call(ast.Name("len"), [value], []):
            found, _ = _term(value, fields)
            return len(found) if isinstance(found, str | list | tuple) else None, "number"
        case ast.Call(ast.Name(name), _, []):
            raise ValueError(
                f"{name}(): expected min and max of several values, len of one, or field('NAME')"
            )
    raise ValueError(f"'{ast.unparse(node)}' is no field, number or text")


def _calculate(
    function: Callable[..., Any], nodes: Sequence[ast.expr], fields: Fields
) -> tuple[Any, str]:
    values, types = zip(*(_term(node, fields) for node in nodes), strict=True)
    if "text" in types:
        raise ValueError("a text among numbers")
    return _apply(function, _as_number, *values), "number"


def _apply(function: Callable[..., Any], read: Callable[[Any], Any], *values: Any) -> Any:
    """Applies a function to values converted by `read`. None if any of them is None."""
    found = [read(value) for value in values]
    if any(value is None for value in found):
        return None
    try:
        return function(*found)
    except ArithmeticError:
        return None


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _as_number(value: Any) -> float | None:
    """Returns a finite number, which may be spelled as text, or None for other values."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, int):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None
