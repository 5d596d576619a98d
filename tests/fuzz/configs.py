"""Configs with wrong types, unknown names and sections in the wrong place."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_collections

from data_prep.labelling import config as label_config
from diht_jax import config as configs
from tests.fuzz.cases import ERROR, SUCCESS, Draw, Refused, attempt, require

# Type of a key -> values that are none of it.
_WRONG = {
    int: ("text", 1.5, True, [1], {"a": 1}, (2,)),
    float: ("0.1", True, [0.5], {}, float("nan")),
    str: (3, 0.5, True, ["text"], {"a": "b"}),
    bool: (1, 0, "True", [True], 1.0),
    tuple: (3, "0.9", True, {}),
    ml_collections.ConfigDict: (3, "text", True, [1], 0.5),
}
_RIGHT = {
    int: (0, 7, -1, None),
    float: (3, 0.25, None, 0),
    str: ("", "text", None),
    bool: (True, False, None),
    ml_collections.ConfigDict: (),
}


def defaults_of(draw: Draw) -> ml_collections.ConfigDict:
    """The known keys of one of the commands."""
    return draw.choice([configs.default_config, label_config.default_config])()


def keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[tuple[str, type]]:
    """Dotted names and types of all keys and sections."""
    found = []
    for name in config:
        found.append((f"{prefix}{name}", config.get_type(name)))
        if isinstance(config[name], ml_collections.ConfigDict):
            found += keys(config[name], f"{prefix}{name}.")
    return found


def edited(config: ml_collections.ConfigDict, name: str, value: Any) -> ml_collections.ConfigDict:
    """A config without types of its own, as a recipe may build it, with one key changed."""
    content = json.loads(config.to_json_best_effort())
    node = content
    *sections, last = name.split(".")
    for section in sections:
        node = node[section]
    node[last] = value
    return ml_collections.ConfigDict(content, convert_dict=True)


def validate(config: Any, defaults: ml_collections.ConfigDict, *places: str) -> Any:
    """`Refused`, or None where the config is fine."""
    return attempt(lambda: configs.validate_config(config, defaults), *places)


def _wrong_type(draw: Draw, folder: pathlib.Path) -> str:
    defaults = defaults_of(draw)
    name, kind = draw.choice([key for key in keys(defaults) if key[1] in _WRONG])
    value = draw.choice(_WRONG[kind])
    result = validate(edited(defaults, name, value), defaults, f"'{name}'")
    require(isinstance(result, Refused), f"{name}={value!r} passed for {kind.__name__}")
    return ERROR


def _right_type(draw: Draw, folder: pathlib.Path) -> str:
    defaults = defaults_of(draw)
    name, kind = draw.choice([key for key in keys(defaults) if _RIGHT.get(key[1])])
    value = draw.choice(_RIGHT[kind])
    result = validate(edited(defaults, name, value), defaults, name)
    require(not isinstance(result, Refused), f"{name}={value!r} is refused: {result}")
    return SUCCESS


def _wrong_elements(draw: Draw, folder: pathlib.Path) -> str:
    """A pair of numbers that holds anything else."""
    defaults = configs.default_config()
    value = draw.choice(
        [("a", "b"), (None, 1.0), (True, 1.0), ([0.9], 1.0), ({}, {}), (float("nan"), 1.0)]
    )
    result = validate(edited(defaults, "data.crop_scale", value), defaults, "data.crop_scale")
    require(isinstance(result, Refused), f"data.crop_scale={value!r}")
    return ERROR


def _unknown_name(draw: Draw, folder: pathlib.Path) -> str:
    """A misspelled key or section: the error names the one that was meant."""
    defaults = defaults_of(draw)
    name, _ = draw.choice([key for key in keys(defaults) if len(key[0].split(".")[-1]) > 4])
    *sections, last = name.split(".")
    place = draw.randrange(len(last))
    wrong = draw.choice([last[:place] + last[place + 1 :], last + "s", last.upper(), f"_{last}"])
    wrong = ".".join([*sections, wrong])
    known = {key for key, _ in keys(defaults)}
    if wrong in known:
        return SUCCESS
    value = draw.choice([1, "text", None, {"a": 1}])
    result = validate(edited(defaults, wrong, value), defaults, f"'{wrong}'")
    require(isinstance(result, Refused), f"the unknown key {wrong}")
    return ERROR


def _odd_names(draw: Draw, folder: pathlib.Path) -> str:
    defaults = defaults_of(draw)
    name = draw.choice(["", " ", "\0", "ключ", "a" * 3000, "data/train", "0", "keys"])
    result = validate(edited(defaults, name, 1), defaults, name[:50])
    require(isinstance(result, Refused), f"the unknown key {name!r:.50}")
    return ERROR


def _no_config(draw: Draw, folder: pathlib.Path) -> str:
    """Recipes that are no programs, or that give back something else."""
    bodies = ["", "get_config = 3", "def get_config(): return None", "def get_config(): return 3"]
    bodies += ["def get_config(): return {'seed': 0}", "def other(): pass", "get_config = None"]
    path = folder / "recipe.py"
    path.write_text(draw.choice(bodies))
    if draw.random() < 0.2:
        path = folder / draw.choice(["none.py", "", "recipe"])
    result = attempt(lambda: configs.load_recipe(path), path)
    require(isinstance(result, Refused), f"no config, but {result!r:.80}")
    return ERROR


def _durations(draw: Draw, folder: pathlib.Path) -> str:
    """Exactly one positive duration counts."""
    config = configs.default_config()
    wanted = {}
    for unit, values in (("steps", (None, 0, -1, 5)), ("examples", (None, 0, 64, 10**6))):
        wanted[unit] = draw.choice(values)
    wanted["epochs"] = draw.choice([None, 0.0, -1.0, 0.5, 3.0, float("inf"), float("nan")])
    for unit, value in wanted.items():
        config[f"total_{unit}"] = value
    result = attempt(
        lambda: configs.duration_in_steps(config, "total", batch_size=8, num_examples=100),
        "config.total_",
    )
    given = {unit: value for unit, value in wanted.items() if value is not None}
    sizes = {"steps": 1, "examples": 1 / 8, "epochs": 100 / 8}
    if len(given) == 1:
        ((unit, value),) = given.items()
        steps = value * sizes[unit]
        if 1 <= steps < 10**9:
            require(result == round(steps), f"{given} are {steps} steps, got {result}")
            return SUCCESS
    require(isinstance(result, Refused), f"{given} gave {result}")
    return ERROR


def _architecture_fields(draw: Draw, folder: pathlib.Path) -> str:
    """Fields of an architecture from a command line."""
    name = draw.choice([*configs.ARCHITECTURE_FIELDS, "", "nothing", "vision_head"])
    value = draw.choice(["", "3", "3.5", "x", "=", "-1", "1e400", "nan", "٣", "9" * 5000, "None"])
    setting = draw.choice([f"{name}={value}", name, f"{name}:{value}"])
    name, equals, value = setting.partition("=")
    kind = configs.ARCHITECTURE_FIELDS.get(name)
    result = attempt(lambda: configs.parse_fields([setting]), "--architecture")
    if isinstance(result, Refused):
        is_fine = bool(name and equals) and (kind in (None, str) or value == "3")
        require(not is_fine, f"{setting!r:.80}: {result.message}")
        return ERROR
    require(isinstance(result[name], kind or str), f"{setting!r:.80} gave {result}")
    return SUCCESS


MUTATIONS = {
    "wrong type": _wrong_type,
    "right type": _right_type,
    "wrong elements": _wrong_elements,
    "unknown name": _unknown_name,
    "odd names": _odd_names,
    "no config": _no_config,
    "durations": _durations,
    "architecture fields": _architecture_fields,
}
