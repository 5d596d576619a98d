"""Configs with wrong types, unknown names and sections where a value belongs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_collections
from hypothesis import assume
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from data_prep.labelling import config as label_config
from diht_jax import config as configs
from tests.fuzz.damage import Draw
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, must_refuse, require

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


def _defaults(draw: Draw) -> ml_collections.ConfigDict:
    """The known keys of one of the commands."""
    return draw(one([configs.default_config, label_config.default_config]))()


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[tuple[str, type]]:
    """Dotted names and types of all keys and sections."""
    found = []
    for name in config:
        found.append((f"{prefix}{name}", config.get_type(name)))
        if isinstance(config[name], ml_collections.ConfigDict):
            found += _keys(config[name], f"{prefix}{name}.")
    return found


def _validate(defaults: ml_collections.ConfigDict, name: str, value: Any, *names: str) -> Any:
    """A config without types of its own, as a recipe may build it, with one key changed."""
    content = json.loads(defaults.to_json_best_effort())
    node = content
    *sections, last = name.split(".")
    for section in sections:
        node = node[section]
    node[last] = value
    config = ml_collections.ConfigDict(content, convert_dict=True)
    return attempt(lambda: configs.validate_config(config, defaults), *names)


def check_types(draw: Draw, folder: pathlib.Path) -> str:
    """A value of the key's type is accepted, another is refused under the key's name."""
    defaults = _defaults(draw)
    values = draw(one([_RIGHT, _WRONG]))
    name, kind = draw(one([key for key in _keys(defaults) if key[1] in values]))
    value = draw(one(values[kind]))
    result = _validate(defaults, name, value, f"'{name}'")
    require(isinstance(result, Refused) == (values is _WRONG), f"{name}={value!r}: {result}")
    return ERROR if values is _WRONG else SUCCESS


def check_unknown_names(draw: Draw, folder: pathlib.Path) -> str:
    """A misspelled key or section, or a name that no key could have."""
    defaults = _defaults(draw)
    known = {name for name, _ in _keys(defaults)}
    name = draw(one(sorted(name for name in known if len(name.split(".")[-1]) > 4)))
    section, dot, last = name.rpartition(".")
    at = draw(integers(0, len(last) - 1))
    forms = [last[:at] + last[at + 1 :], last + "s", last.upper(), f"_{last}"]
    odd = ["", " ", "\0", "ключ", "a" * 3000, "data/train", "0", "keys"]
    wrong = draw(one([*(f"{section}{dot}{form}" for form in forms), *odd]))
    assume(wrong not in known)
    value = draw(one([1, "text", None, {"a": 1}]))
    result = _validate(defaults, wrong, value, wrong[:50])
    require(isinstance(result, Refused), f"the unknown key {wrong!r:.50}")
    return ERROR


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


def check_no_recipe(draw: Draw, folder: pathlib.Path) -> str:
    """Files that are no programs, or that give back something else than a config."""
    bodies = ["", "get_config = 3", "def get_config(): return None", "def get_config(): return 3"]
    bodies += ["def get_config(): return {'seed': 0}", "def other(): pass", "get_config = None"]
    path = folder / "recipe.py"
    path.write_text(draw(one(bodies)))
    path = folder / draw(one(["recipe.py", "none.py", "", "recipe"]))
    return must_refuse(lambda: configs.load_recipe(path), path)
