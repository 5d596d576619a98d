"""How every command starts: flags parsed, logs that leave the progress bar alone, and user errors
shown as one line instead of a traceback; and the flags that name a model, the same in all commands.
"""

from __future__ import annotations

import logging as python_logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from tqdm import tqdm

from diht_jax.config import parse_fields

flags.disclaim_key_flags()  # what is defined here are the command's own: its --help lists them


def run(main: Callable[..., None], *, takes_arguments: bool = False) -> None:
    """Parses the command line, then calls `main()`; exits with its outcome.

    With `takes_arguments`, what is no flag is given to `main` as a list; else it is a mistake.

    A wrong flag or config key exits with 2, a `ValueError` or missing file (bad input) with 1,
    both with their message on stderr. `--verbosity=1` adds the traceback and what the libraries
    log.
    """
    app.run(
        lambda argv: _call(lambda: main(argv[1:]) if takes_arguments else main()),
        flags_parser=lambda argv: _parse_flags(argv, takes_arguments),
    )


def define_model_flags() -> None:
    """Defines `--model` and the flags that go with it."""
    flags.DEFINE_string("model", None, "Released name, work directory or weight file.")
    flags.DEFINE_integer("step", None, "Checkpoint of a work directory; the latest by default.")
    flags.DEFINE_bool("ema", False, "Take the moving average of the parameters.")
    flags.DEFINE_integer(
        "image_size", None, "Resize the image positions to this size; the model's own by default."
    )
    flags.DEFINE_list(
        "architecture", [], "What a bare weight file does not tell: activation=quick_gelu,..."
    )


def model_options() -> dict[str, Any]:
    """The arguments of `load_model` beside the model, as the flags give them."""
    given = flags.FLAGS
    return {
        "step": given.step,
        "ema": given.ema,
        "image_size": given.image_size,
        "architecture": parse_fields(given.architecture),
    }


def _parse_flags(argv: Sequence[str], takes_arguments: bool) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
    except (AttributeError, KeyError) as error:
        # How a ConfigDict says that it lacks a key; the text names the nearest one.
        cause = error.args[0]
        text = cause.args[0] if isinstance(cause, KeyError) else str(cause)
        _fail(f"unknown config key {'; '.join(text.splitlines())}", status=2)
    except (flags.Error, TypeError, ValueError) as error:
        _fail(f"{error} (--help lists the flags)", status=2)
    if len(rest) > 1 and not takes_arguments:
        _fail(f"unexpected arguments: {' '.join(rest[1:])} (--help lists the flags)", status=2)
    return rest


def _call(main: Callable[[], None]) -> None:
    verbose = logging.get_verbosity() >= logging.DEBUG
    _log_beside_progress_bars(verbose)
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if verbose:
            traceback.print_exc()
        _fail(str(error), status=1)


def _log_beside_progress_bars(verbose: bool) -> None:
    if logging.get_verbosity() < logging.INFO and not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    handler = _TqdmHandler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    if not verbose:
        handler.addFilter(_is_ours_or_serious)
    root = python_logging.getLogger()
    logging.use_absl_handler()
    root.removeHandler(logging.get_absl_handler())
    root.addHandler(handler)


class _TqdmHandler(python_logging.Handler):
    """Writes to stderr above the progress bar, not through it."""

    def emit(self, record: python_logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _is_ours_or_serious(record: python_logging.LogRecord) -> bool:
    """Drops what libraries say below a warning: Orbax logs a page at every save."""
    from_library = f"{os.sep}site-packages{os.sep}" in record.pathname
    return record.levelno >= python_logging.WARNING or not from_library


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
