"""Start of every command: flags, logs above the progress bar, one-line messages for user errors.

Flags shared by several commands follow one convention. Names are in lower_snake_case, and a name
means the same in all commands: `--input` is what is read, `--output` what is written, `num_` starts
a count of things, `--batch_size` counts examples over all devices. A help text states the unit and
what an unset flag means. A renamed flag keeps its old spelling as an alias.
"""

from __future__ import annotations

import ctypes
import functools
import logging as python_logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging

from diht_jax.command_line import help_text
from diht_jax.command_line.help_text import read_comments
from diht_jax.config import apply_overrides, find_recipe, load_recipe
from diht_jax.config.checks import check_names, check_unset, walk
from diht_jax.storage.files import refuse_url
from diht_jax.terminal import LogHandler, print_escaped

flags.disclaim_key_flags()  # each command's --help lists them as its own flags

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LISTED_KEYS = 5
_HELP = frozenset(("-h", "-?", "-help", "--help", "-helpshort", "--helpshort"))
# `--config PATH` and `--config.help [SECTION]` in a command line joined by zero bytes.
_CONFIG_FLAG = r"(?:^|\0)--?config[=\0]([^:\0]+)"
_HELP_FLAG = r"(?:^|\0)--?config\.help(?:=([^\0]*)|\0([^-\0][^\0]*))?(?:\0|$)"


def run(
    main: Callable[..., None],
    *,
    takes_arguments: bool = False,
    config_defaults: Callable[[], ml_collections.ConfigDict] | None = None,
    optional_keys: Collection[str] = (),
    comment_files: Mapping[str, str] | None = None,
    writes_to_stores: bool = False,
) -> None:
    """Parses the command line, calls `main()`, and exits with a status.

    With `takes_arguments`, `main` gets the positional arguments as a list; otherwise they are an
    error. `config_defaults` returns all keys of a command with `--config`. There,
    `--config.KEY=None` works for keys with a default of None and for `optional_keys`, and a
    duration replaces the recipe's. `comment_files` are what `read_comments` reads for
    `--config.help`.
    With `writes_to_stores`, `--output` may be a URL.

    A wrong flag or config key exits with 2, a `ValueError` (bad input) or an error of a disk with
    1, both with a message on stderr. An error's attribute `exit_status` takes precedence.
    `--verbosity=1` adds the traceback and the logs of libraries.
    """
    app.run(
        functools.partial(_call, main, takes_arguments, writes_to_stores),
        flags_parser=functools.partial(
            parse_flags,
            takes_arguments=takes_arguments,
            config_defaults=config_defaults,
            optional_keys=optional_keys,
            comment_files=comment_files,
        ),
    )


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, for its next allocation.

    XLA allocates the temporaries of a step as one block and frees it at the end of the step. glibc
    maps such a large block anew each time, and the kernel clears every page at its first use: for
    ViT-B/32 at batch 32, 3.5 GB and a tenth of the step. A training process needs the same block
    again at once.

    All threads share one arena, since other arenas cannot hold such blocks. Do not use this in
    programs whose own threads allocate a lot while an accelerator computes.

    Does nothing if the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        mallopt(name, value)


def parse_flags(
    argv: Sequence[str],
    takes_arguments: bool = False,
    config_defaults: Callable[[], ml_collections.ConfigDict] | None = None,
    optional_keys: Collection[str] = (),
    comment_files: Mapping[str, str] | None = None,
) -> list[str]:
    """Parses a command line like `run`; returns the positional arguments.

    Answers `--help` and `--config.help`, and exits. A wrong flag or config key exits with 2.
    """
    _answer_help(argv, config_defaults, comment_files or {})
    # A shell expands the `~` of `--workdir ~/run`, but not that of `--config.output=~/kept`.
    home = os.path.expanduser("~")
    given = [re.sub(r"^--?[\w.]+=~(?=/|$)", lambda m: m[0][:-1] + home, each) for each in argv]
    try:
        if config_defaults is not None:
            defaults = config_defaults()
            given = _with_paths(flags.FLAGS.read_flags_from_files(given, force_gnu=False))
            for path, arg in _named_recipes(given)[-1:]:
                _check_recipe(path, load_recipe(path, arg), defaults)
            check_names(re.findall(r"(?:^|\0)--?config\.([\w.]+)", "\0".join(given)), defaults)
        sys.argv[:] = given  # ml_collections reads the keys of configs there
        rest = flags.FLAGS(given)
        if config_defaults is not None and _named_recipes(given):
            config_flag: Any = flags.FLAGS["config"]
            overrides = config_flag.override_values
            for name, value in overrides.items():
                if value in (None, (None,)):  # (None,) is the value of a tuple key
                    overrides[name] = None
                    flags.FLAGS.config.update_from_flattened_dict({name: None})
            check_unset(flags.FLAGS.config, defaults, optional_keys)
            apply_overrides(flags.FLAGS.config, overrides)
            if "stage.number" in overrides and flags.FLAGS.config.stage.count:
                raise ValueError(
                    "--config.stage.number: each stage has settings of its own; name it by the "
                    f"recipe's argument, :stage={flags.FLAGS.config.stage.number}"
                )
    except (AttributeError, KeyError) as error:
        # A ConfigDict raises these for a missing key; the text names the nearest one.
        cause = error.args[0]
        text = cause.args[0] if isinstance(cause, KeyError) else str(cause)
        _fail(f"unknown config key {'; '.join(text.splitlines())}", status=2)
    except (flags.Error, TypeError, ValueError) as error:
        _fail(f"{error} (--help lists the flags)", status=2)
    if len(rest) > 1 and not takes_arguments:
        _fail(f"unexpected arguments: {' '.join(rest[1:])} (--help lists the flags)", status=2)
    return rest


def _answer_help(
    argv: Sequence[str],
    config_defaults: Callable[[], ml_collections.ConfigDict] | None,
    comment_files: Mapping[str, str],
) -> None:
    asked = re.search(_HELP_FLAG, "\0".join(argv))
    if asked and config_defaults is not None:
        try:
            config = config_defaults()
            for path, arg in _named_recipes(_with_paths(argv))[-1:]:
                config = load_recipe(path, arg)
            section = asked[1] or asked[2] or ""
            text = help_text.describe_keys(config, section, read_comments(comment_files))
        except ValueError as error:
            _fail(str(error), status=2)
        print_escaped(text)
        sys.exit(0)
    before = argv[: list(argv).index("--")] if "--" in argv else argv
    if not _HELP.isdisjoint(before):
        description = getattr(sys.modules["__main__"], "__doc__", None) or ""
        found, has_config = help_text.command_flags(), config_defaults is not None
        print_escaped(help_text.describe_command(description, found, has_config=has_config))
        sys.exit(0)


def load_again(argument: str) -> ml_collections.ConfigDict:
    """Loads the recipe of the parsed command line with one more argument and the line's overrides.

    Args:
        argument: such as "stage=2".
    """
    path, given = _named_recipes(sys.argv)[-1]
    config = load_recipe(path, ",".join(filter(None, (given, argument))))
    config_flag: Any = flags.FLAGS["config"]
    overrides = config_flag.override_values
    config.update_from_flattened_dict(overrides)
    apply_overrides(config, overrides)
    return config


def _named_recipes(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Returns path and arguments of each `--config PATH:ARGUMENTS` of a command line."""
    return re.findall(_CONFIG_FLAG + r":?([^\0]*)", "\0".join(arguments))


def _with_paths(arguments: Sequence[str]) -> list[str]:
    """Replaces the names of recipes in a command line by their paths."""

    def replace(match: re.Match) -> str:
        try:
            path = find_recipe(match[1])
        except ValueError as error:
            raise ValueError(f"--config={error}") from error
        return match[0].removesuffix(match[1]) + str(path)

    return re.sub(_CONFIG_FLAG, replace, "\0".join(arguments)).split("\0")


def _check_recipe(
    path: str, config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict
) -> None:
    """Raises ValueError for a recipe with keys that the command does not know."""
    unknown = sorted(set(config) - set(defaults))
    if len(unknown) > 1:
        raise ValueError(
            f"{path}: looks like a recipe of another command; this one has no keys "
            f"{', '.join(map(repr, unknown[:_LISTED_KEYS]))}"
        )
    try:
        check_names(walk(config), defaults)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _call(
    main: Callable[..., None],
    takes_arguments: bool = False,
    writes_to_stores: bool = False,
    argv: Sequence[str] = (),
) -> None:
    verbose = logging.get_verbosity() >= logging.DEBUG
    _log_beside_progress_bars(verbose)
    try:
        # In every command, --output is what is written.
        if "output" in flags.FLAGS and not writes_to_stores:
            refuse_url(flags.FLAGS["output"].value, "--output")
        main(*([argv[1:]] if takes_arguments else []))
    except (ValueError, OSError) as error:
        if verbose:
            traceback.print_exc()
        _fail(_with_flags(str(error)), status=getattr(error, "exit_status", 1))


def _with_flags(message: str) -> str:
    """Rewrites the config keys in a message as users type them: `--config.KEY`."""
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if not isinstance(config, ml_collections.ConfigDict):
        return message
    keys = "|".join(re.escape(key) for key in config)
    return re.sub(rf"(?<![\w./-])config\.(?=(?:{keys})\b)", "--config.", message)


def _log_beside_progress_bars(verbose: bool) -> None:
    if logging.get_verbosity() < logging.INFO and not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    handler = LogHandler(verbose)
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = python_logging.getLogger()
    logging.use_absl_handler()
    root.removeHandler(logging.get_absl_handler())
    root.addHandler(handler)


def set_exit_status(error: BaseException, status: int) -> None:
    """Sets the exit status of a command that ends with this error; the default is 1."""
    error.__dict__["exit_status"] = status


def _fail(message: str, status: int) -> None:
    print_escaped(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def define_model_flags() -> None:
    """Defines `--model` and its related flags."""
    flags.DEFINE_string(
        "model", None, "clipart_tiny, a released name, a run, a weight file, or hf-hub:OWNER/NAME."
    )
    flags.DEFINE_integer("step", None, "Checkpoint of a work directory; unset: the latest.")
    flags.DEFINE_bool("ema", False, "Take the moving average of the parameters.")
    flags.DEFINE_integer(
        "image_size", None, "Resize the image positions to it, in pixels; unset: the model's own."
    )
    flags.DEFINE_integer(
        "context_length",
        None,
        "Stretch the text positions to this many tokens; unset: the model's.",
    )
    flags.DEFINE_integer("dim", None, "First numbers of the embeddings to take; unset: all.")
    flags.DEFINE_list(
        "architecture", [], "What a bare weight file does not hold: activation=quick_gelu,..."
    )


def model_options() -> dict[str, Any]:
    """Returns the arguments of `load_model` other than the model, from the flags."""
    from diht_jax.models.zoo import parse_fields  # imports JAX, which `--help` need not wait for

    return {
        **values("step", "ema", "image_size", "context_length", "dim"),
        "architecture": parse_fields(flags.FLAGS.architecture),
    }


def define_encoding_flags() -> None:
    """Defines the flags of the commands that encode a source of images."""
    flags.DEFINE_integer(
        "batch_size", 256, "Images, or texts, a batch, over all devices.", lower_bound=1
    )
    flags.DEFINE_integer(
        "num_threads", None, "Decoding threads; unset: one per core, at most 16.", lower_bound=1
    )


def define_prompt_flags() -> None:
    """Defines the flags for the words of a zero-shot classifier."""
    flags.DEFINE_string("class_names", None, "File with one class name a line, in label order.")
    flags.DEFINE_string(
        "templates", None, "'a photo of a {}.;a drawing of a {}.', @FILE, cifar10 or imagenet."
    )


def define_task_flags() -> None:
    """Defines `--tasks` and its related flags, except those for prompts."""
    flags.DEFINE_list(
        "tasks",
        [],
        "Comma-separated: cifar10, imagenet, coco_retrieval, flickr30k_retrieval=SOURCE, "
        "classification:SOURCE, retrieval:SOURCE, clip_benchmark:DIR, NAME=KIND:SOURCE; options "
        "after '?'. docs/reference/tasks.md lists them.",
    )
    flags.DEFINE_string(
        "caption_template",
        None,
        "Prompt around a caption, '{caption}' for none; unset: that of the model's training, or of "
        "a benchmark its own.",
    )
    flags.DEFINE_integer(
        "limit",
        None,
        "Only this many pairs of each task, the first ones; unset: all.",
        lower_bound=1,
    )


def task_defaults() -> dict[str, Any]:
    """Returns the arguments of `parse_tasks` other than the tasks, from the flags."""
    from diht_jax.evaluation.protocols.base import parse_templates, read_class_names

    found: dict[str, Any] = {}
    parsers = {"class_names": read_class_names, "templates": parse_templates}
    for name in ("class_names", "templates", "caption_template"):
        text: Any = flags.FLAGS[name].value if name in flags.FLAGS else None
        if text is not None:
            found[name] = parsers[name](text) if name in parsers else text
    return found


def define_job_array_flags() -> None:
    """Defines the flags that divide a command's shards between the jobs of an array."""
    flags.DEFINE_integer("task_index", 0, "Number of this job of a job array, from 0.")
    flags.DEFINE_integer("num_tasks", 1, "Jobs in the array.")
    flags.register_multi_flags_validator(
        ["task_index", "num_tasks"],
        lambda given: 0 <= given["task_index"] < given["num_tasks"],
        "expected a number from 0 to --num_tasks minus 1 as --task_index",
    )


def values(*names: str) -> dict[str, Any]:
    """Returns the values of flags by name, as keyword arguments with the same names."""
    return {name: flags.FLAGS[name].value for name in names}


def fractions(name: str) -> tuple[float, ...]:
    """Returns the numbers from 0 to 1 in a list flag; raises ValueError for anything else."""
    texts: Any = flags.FLAGS[name].value
    try:
        found = tuple(map(float, texts))
    except ValueError:
        found = (math.nan,)
    if not all(0 <= value <= 1 for value in found):
        raise ValueError(f"--{name}={','.join(texts)}: expected numbers from 0 to 1")
    return found


def require_flags(*names: str) -> None:
    """Raises ValueError for a flag that is not set; unlike a required flag, it permits `--help`."""
    for name in names:
        if not flags.FLAGS[name].value:
            raise ValueError(f"--{name} is required")
