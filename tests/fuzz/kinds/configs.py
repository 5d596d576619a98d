"""Configs with wrong types, unknown names and sections where a value belongs."""

from __future__ import annotations

import json
import pathlib

import ml_collections
from hypothesis import assume
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from data_prep.labelling import config as label_config
from diht_jax import config as configs
from tests.fuzz.damage import Draw
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require

# Type of a key -> values of other types.
_WRONG = {
    int: ("text", 1.5, True, [1], {"a": 1}, (2,)),
    float: ("0.1", True, [0.5], {}, float("nan")),
    str: (3, 0.5, True, ["text"], {"a": "b"}),
    bool: (1, 0, "True", [True], 1.0),
    tuple: (3, "0.9", True, {}, ("a", "b"), (True, 1.0), ([0.9], 1.0), (float("nan"), 1.0)),
    ml_collections.ConfigDict: (3, "text", True, [1], 0.5),
}
_RIGHT = {
    int: (0, 7, -1, None),
    float: (3, 0.25, None, 0),
    str: ("", "text", None),
    bool: (True, False, None),
}


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[tuple[str, type]]:
    """Dotted names and types of all keys and sections."""
    found = []
    for name in config:
        found.append((f"{prefix}{name}", config.get_type(name)))
        if isinstance(config[name], ml_collections.ConfigDict):
            found += _keys(config[name], f"{prefix}{name}.")
    return found


def check_keys(draw: Draw, folder: pathlib.Path) -> str:
    """Only a value of a known key's type is accepted; another is refused under the key's name."""
    defaults = draw(one([configs.default_config, label_config.default_config]))()
    values = draw(one([_RIGHT, _WRONG]))
    name, kind = draw(one([key for key in _keys(defaults) if key[1] in values]))
    value, is_known = draw(one(values[kind])), draw(integers(0, 2)) > 0
    if not is_known:
        section, dot, last = name.rpartition(".")
        at = draw(integers(0, len(last) - 1))
        forms = [last[:at] + last[at + 1 :], last + "s", last.upper(), f"_{last}"]
        odd = ["", " ", "\0", "ключ", "a" * 3000, "data/train", "0", "keys"]
        name = draw(one([*(f"{section}{dot}{form}" for form in forms), *odd]))
        assume(name not in {known for known, _ in _keys(defaults)})
    # A config without types of its own, as a recipe may build it, with one key changed.
    content = json.loads(defaults.to_json_best_effort())
    node = content
    *sections, last = name.split(".")
    for section in sections:
        node = node[section]
    node[last] = value
    config = ml_collections.ConfigDict(content, convert_dict=True)
    result = attempt(lambda: configs.validate_config(config, defaults), name[:50])
    is_good = is_known and values is _RIGHT
    require(isinstance(result, Refused) != is_good, f"{name}={value!r}: {result}")
    return SUCCESS if is_good else ERROR


def check_architecture_fields(draw: Draw, folder: pathlib.Path) -> str:
    """Fields of an architecture from a command line."""
    name = draw(one([*configs.ARCHITECTURE_FIELDS, "", "nothing", "vision_head"]))
    value = draw(one(["", "3", "3.5", "x", "=", "-1", "1e400", "nan", "٣", "9" * 5000, "None"]))
    setting = draw(one([f"{name}={value}", name, f"{name}:{value}"]))
    name, equals, value = setting.partition("=")
    kind = configs.ARCHITECTURE_FIELDS.get(name, str)
    result = attempt(lambda: configs.parse_fields([setting]), "--architecture")
    if isinstance(result, Refused):
        is_known = name in configs.ARCHITECTURE_FIELDS
        is_fine = is_known and equals and (kind is str or value == "3")
        require(not is_fine, f"{setting!r:.80}: {result.message}")
        return ERROR
    require(isinstance(result[name], kind), f"{setting!r:.80} gave {result}")
    return SUCCESS
