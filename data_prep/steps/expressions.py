"""A small language of conditions on the fields of a pair: `punsafe < 0.5 and LANGUAGE == "en"`.

A text is parsed to its syntax tree and turned into functions; nothing of it is ever executed by
Python. It has comparisons (also in a chain, `0.3 < width / height < 3`, and `in` a list), `and`,
`or`, `not`, numbers, texts in quotes, `+ - * /`, and the functions `min`, `max` and `len`. A name
is a field of the pair's metadata, or `key` or `caption`; `field("NSFW score")` is one whose name
is no word.

A comparison with a text compares texts, every other one numbers; a text that spells a number
counts as that number, since tables of text have no others. A field that a pair lacks, or that
holds neither, gives a comparison that is unknown (None): `not` of it is unknown, and so is `and`
with something true and `or` with something false, as in SQL.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Fields = Mapping[str, Any]
Value = float | int | str | None

_ORDERS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_MEMBERSHIPS = {ast.In: True, ast.NotIn: False}
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS = {"min": min, "max": max}
_EXPECTED = "comparisons joined by and, or and not, such as 'punsafe < 0.5 and LANGUAGE == \"en\"'"


class Condition(NamedTuple):
    """A condition that was parsed.

    Attributes:
        text: as it was typed, with single spaces.
        fields: the fields that it reads, in their order.
        holds: gives True, False or None (unknown) for the fields of a pair.
    """

    text: str
    fields: tuple[str, ...]
    holds: Callable[[Fields], bool | None]


class _Term(NamedTuple):
    """A value within a comparison: how to get it, and whether it is a text by its form."""

    get: Callable[[Fields], Value]
    is_text: bool
    is_field: bool = False


def parse_condition(text: str) -> Condition:
    """Parses a condition.

    Raises:
        ValueError: it is not of this language; the message shows where.
    """
    try:
        body = ast.parse(text.strip(), mode="eval").body
        parser = _Parser()
        holds = parser.truth(body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        detail = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"'{text}': {detail}; expected {_EXPECTED}") from error
    if not parser.fields:
        raise ValueError(f"'{text}': names no field; expected {_EXPECTED}")
    return Condition(" ".join(text.split()), tuple(parser.fields), holds)


class _Parser:
    """Turns syntax trees into functions, and collects the names of fields."""

    def __init__(self) -> None:
        self.fields: dict[str, None] = {}

    def truth(self, node: ast.expr) -> Callable[[Fields], bool | None]:
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(value) for value in node.values]
            return functools.partial(_join, parts, isinstance(node.op, ast.Or))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return functools.partial(_negate, self.truth(node.operand))
        if isinstance(node, ast.Compare):
            links, left = [], node.left
            for kind, right in zip(node.ops, node.comparators, strict=True):
                links.append(self._comparison(left, kind, right))
                left = right
            return links[0] if len(links) == 1 else functools.partial(_join, links, False)
        raise ValueError(f"'{ast.unparse(node)}' is no comparison")

    def _comparison(
        self, left: ast.expr, kind: ast.cmpop, right: ast.expr
    ) -> Callable[[Fields], bool | None]:
        if type(kind) in _MEMBERSHIPS:
            return self._membership(left, type(kind), right)
        if type(kind) not in _ORDERS:
            raise ValueError("'is' compares nothing here")
        terms = [self._term(node) for node in (left, right)]
        if any(term.is_text for term in terms):
            if not all(term.is_text or term.is_field for term in terms):
                raise ValueError(
                    f"'{ast.unparse(left)}' and '{ast.unparse(right)}' are a number and a text"
                )
            read = _as_text
        else:
            read = _as_number
        return functools.partial(_compare, _ORDERS[type(kind)], read, terms[0].get, terms[1].get)

    def _membership(
        self, left: ast.expr, kind: type[ast.cmpop], right: ast.expr
    ) -> Callable[[Fields], bool | None]:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise ValueError(f"'{ast.unparse(right)}' after 'in'; expected a list of constants")
        values = [element.value for element in right.elts if isinstance(element, ast.Constant)]
        are_texts = all(isinstance(value, str) for value in values)
        are_numbers = all(isinstance(value, int | float) for value in values)
        if len(values) < len(right.elts) or not (are_texts or are_numbers):
            raise ValueError(f"'{ast.unparse(right)}': expected texts only, or numbers only")
        term = self._term(left)
        read = _as_text if are_texts else _as_number
        return functools.partial(_is_in, term.get, read, frozenset(values), _MEMBERSHIPS[kind])

    def _term(self, node: ast.expr) -> _Term:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
            value = node.value
            return _Term(lambda fields: value, isinstance(value, str))
        if isinstance(node, ast.Name):
            return self._field(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return _Term(
                functools.partial(_calculate, operator.neg, self._gets(node.operand)), False
            )
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            gets = self._gets(node.left, node.right)
            return _Term(functools.partial(_calculate, _ARITHMETIC[type(node.op)], gets), False)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, node.args)
        raise ValueError(f"'{ast.unparse(node)}' is no field, number or text")

    def _call(self, name: str, arguments: Sequence[ast.expr]) -> _Term:
        if name in _FUNCTIONS and len(arguments) > 1:
            gets = self._gets(*arguments)
            return _Term(functools.partial(_calculate, _FUNCTIONS[name], gets), False)
        if name == "len" and len(arguments) == 1:
            get = self._term(arguments[0]).get
            return _Term(functools.partial(_length, get), False)
        first = arguments[0] if len(arguments) == 1 else None
        if name == "field" and isinstance(first, ast.Constant) and isinstance(first.value, str):
            return self._field(first.value)
        raise ValueError(
            f"{name}(): expected min and max of several values, len of one, or field('NAME')"
        )

    def _field(self, name: str) -> _Term:
        self.fields[name] = None
        return _Term(lambda fields: fields.get(name), False, is_field=True)

    def _gets(self, *nodes: ast.expr) -> list[Callable[[Fields], Value]]:
        """Getters of numbers to compute with; a text among them is an error."""
        terms = [self._term(node) for node in nodes]
        if any(term.is_text for term in terms):
            raise ValueError("a text among numbers")
        return [term.get for term in terms]


def _join(parts: Sequence[Callable], is_or: bool, fields: Fields) -> bool | None:
    """`or` of the parts, or `and`: the first that settles it does, else unknown wins."""
    found: bool | None = not is_or
    for part in parts:
        truth = part(fields)
        if truth is is_or:
            return is_or
        if truth is None:
            found = None
    return found


def _negate(part: Callable, fields: Fields) -> bool | None:
    truth = part(fields)
    return None if truth is None else not truth


def _compare(
    order: Callable, read: Callable, left: Callable, right: Callable, fields: Fields
) -> bool | None:
    a, b = read(left(fields)), read(right(fields))
    return None if a is None or b is None else order(a, b)


def _is_in(
    get: Callable, read: Callable, values: frozenset, wanted: bool, fields: Fields
) -> bool | None:
    value = read(get(fields))
    return None if value is None else (value in values) is wanted


def _calculate(function: Callable, gets: Sequence[Callable], fields: Fields) -> float | None:
    values = [_as_number(get(fields)) for get in gets]
    if None in values:
        return None
    try:
        return function(*values)
    except ArithmeticError:
        return None


def _length(get: Callable, fields: Fields) -> int | None:
    value = get(fields)
    return len(value) if isinstance(value, str | list | tuple) else None


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _as_number(value: Any) -> float | None:
    """A finite number, also one that a text spells; None for everything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, int):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None
