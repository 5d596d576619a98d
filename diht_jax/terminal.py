"""Terminal output of commands: escaped text, tables, progress bars and logs.

Keys, captions and file names are untrusted. Printed raw, a control character can move the cursor or
send input to the terminal, a line break can forge a line of the log, and a bidirectional override
can reorder text. An ASCII terminal cannot show most letters.

Commands use `print_escaped` and never `print`. Progress bars are interactive on a terminal, and
occasional lines in a file.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECS = 30.0
# Control characters (C0, delete, C1), line and paragraph separators, bidirectional formatting,
# invisible marks (byte order, tags, annotations), lone surrogates.
_STEERING = (
    r"\x00-\x1f\x7f-\x9f\u2028\u2029"
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
    r"\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff"
)
_IN_A_LINE = re.compile(f"[{_STEERING}]")
_BUT_LINE_BREAKS = re.compile(f"(?![\n\t])[{_STEERING}]")
# Counts at which a repeated warning is written again, and the number of remembered texts.
_SHOWN_COUNTS = frozenset(10**power for power in range(16))
_REMEMBERED_TEXTS = 256
_LIBRARIES = f"{os.sep}site-packages{os.sep}"  # part of the paths of their files


def print_escaped(text: str = "", file: TextIO | None = None) -> None:
    r"""Prints text of one or more lines, escaped for any terminal.

    Args:
        text: untrusted parts that must not contain line breaks need `escape` before; all other
            escaping is done here. Letters that the terminal cannot encode become `\xdf`, `\u72ac`.
        file: output file; None is stdout.
    """
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    shown = escape_lines(text).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=file, flush=True)


def escape(text: str) -> str:
    r"""Escapes line breaks and all other characters that a terminal interprets.

    Returns:
        The text on one line, with escapes such as `\\x1b` or `\\u202e`.
    """
    return _IN_A_LINE.sub(_spell, text)


def escape_lines(text: str) -> str:
    """Like `escape`, but keeps line breaks and tabs, for our own messages of several lines."""
    return _BUT_LINE_BREAKS.sub(_spell, text)


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], align: str, *, rule: bool = True
) -> str:
    """Formats a text table with columns of minimal width.

    Args:
        header: title of each column.
        rows: cells of each row.
        align: "l" or "r" for each column.
        rule: whether to draw a line of dashes below the header.
    """
    columns = []
    for side, (head, *cells) in zip(align, zip(header, *rows, strict=True), strict=True):
        width = max(map(len, [head, *cells]))
        lines = [head, *(["-" * width] if rule else []), *cells]
        pad = str.rjust if side == "r" else str.ljust
        columns.append(map(pad, lines, itertools.repeat(width)))
    return "\n".join(map(str.rstrip, map("  ".join, zip(*columns, strict=True))))


class ProgressBar(tqdm):
    """tqdm's bar; without a terminal it writes plain lines, `LINE_SECS` apart, and one at its end.

    Output to a file never contains carriage returns or ANSI codes, even with frequent updates, new
    descriptions or interleaved log lines.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *args: Any,
        clock: Callable[[], float] = time.monotonic,
        **kwargs: Any,
    ):
        """Takes the arguments of tqdm, and a monotonic clock in seconds."""
        self._clock = clock
        self._on_terminal = (kwargs.get("file") or sys.stderr).isatty()
        self._last_line_secs = math.inf  # nothing is written during construction
        if not self._on_terminal:
            # tqdm checks its clock at every update, and `display` the age of the last line.
            kwargs |= {"mininterval": 1.0, "miniters": 1, "dynamic_ncols": False}
        super().__init__(iterable, *args, **kwargs)
        self._last_line_secs = clock()
        if not self.disable:
            self._time = clock
            self.start_t = self.last_print_t = clock()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draws the bar, or writes a line if the last one is old enough."""
        if self._on_terminal:
            return super().display(msg, pos)
        if self._clock() - self._last_line_secs >= LINE_SECS:
            self._write_line()
        return None

    def clear(self, nolock: bool = False) -> None:
        """Clears the bar on a terminal; written lines stay."""
        if self._on_terminal:
            super().clear(nolock)

    def moveto(self, n: int) -> None:
        """Moves the cursor on a terminal."""
        if self._on_terminal:
            super().moveto(n)

    def close(self) -> None:
        """Closes the bar; without a terminal, writes a last line."""
        if self._on_terminal or self.disable:
            return super().close()
        self.disable = True
        self._decr_instances(self)
        if self.leave is not False:
            self._ema_dt = lambda: None  # like tqdm: the overall rate, not the recent one
            self._write_line()
        return None

    def _write_line(self) -> None:
        self._last_line_secs = self._clock()
        self.fp.write(f"{self!s}\n")
        self.fp.flush()


class LogHandler(logging.Handler):
    """Writes logs to stderr above the progress bar.

    Unless `verbose`, messages of libraries below WARNING are dropped, since Orbax logs a page at
    every save.

    A repeated warning or error is only written at its 10th, 100th, ... occurrence, with the count.
    Otherwise a failure at every step, such as a write to a full disk, would fill the log.
    """

    def __init__(self, verbose: bool = False):
        super().__init__()
        self._verbose = verbose
        self._counts: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, unless it is dropped."""
        is_serious = record.levelno >= logging.WARNING
        if not (is_serious or self._verbose) and _LIBRARIES in record.pathname:
            return
        try:
            count = 1
            if is_serious:
                message = record.getMessage()
                # The latest message is the last entry.
                count = self._counts[message] = self._counts.pop(message, 0) + 1
                if len(self._counts) > _REMEMBERED_TEXTS:
                    del self._counts[next(iter(self._counts))]
            if count not in _SHOWN_COUNTS:
                return
            # Text from keys and captions must not control the terminal or imitate a log line.
            text = escape_lines(self.format(record)).replace("\n", "\n  ")
            tqdm.write(text + (f" ({count:,} times so far)" if count > 1 else ""), file=sys.stderr)
        except Exception:
            self.handleError(record)
