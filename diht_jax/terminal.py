"""What commands show: escaped texts, and progress bars.

Keys, captions and file names come from anywhere. Raw, a control character moves the cursor or
answers for the user, a line break forges a line of the log, and a bidirectional override shows the
text in another order than it has. A terminal of ASCII has no sign at all for most letters.

Commands print by `print_escaped` and never by `print`. Progress bars are lively on a terminal;
where the output goes to a file they are a line now and then.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECS = 30.0
# Control characters (C0, delete, C1), line and paragraph separators, everything that sets the
# direction of what follows, invisible marks (byte order, tags, annotations), lone surrogates.
_STEERING = (
    r"\x00-\x1f\x7f-\x9f\u2028\u2029"
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
    r"\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff"
)
_IN_A_LINE = re.compile(f"[{_STEERING}]")
_BUT_LINE_BREAKS = re.compile(f"(?![\n\t])[{_STEERING}]")


def print_escaped(text: str = "", file: TextIO | None = None) -> None:
    r"""Prints a text of several lines of our own, for any terminal.

    Args:
        text: what stands in it of other people is on one line by `escape`; the rest of the escaping
            is done here. A letter that the encoding of the terminal lacks reads `\xdf`, `\u72ac`.
        file: where to; None for stdout.
    """
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    shown = escape_lines(text).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=file, flush=True)


def escape(text: str) -> str:
    r"""The text on one line, with nothing in it that a terminal acts upon.

    Returns:
        The same, where control characters and the like read `\\x1b` or `\\u202e`.
    """
    return _IN_A_LINE.sub(_spell, text)


def escape_lines(text: str) -> str:
    """`escape` for a text of several lines of our own, such as a message: these stay lines."""
    return _BUT_LINE_BREAKS.sub(_spell, text)


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], align: str, *, rule: bool = True
) -> str:
    """Rows of texts under a header and a rule, each column as wide as it must be.

    Args:
        header: a text for each column.
        rows: likewise.
        align: "l" or "r" for each column.
        rule: whether a line of dashes stands below the header.
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

    What is written to a file has neither carriage returns nor ANSI codes, however often the bar is
    updated, described anew or interrupted by log lines.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *args: Any,
        clock: Callable[[], float] = time.monotonic,
        **kwargs: Any,
    ):
        """Takes the arguments of tqdm, and a clock of seconds from any start."""
        self._clock = clock
        self._on_terminal = (kwargs.get("file") or sys.stderr).isatty()
        self._last_line_secs = math.inf  # nothing is written while the bar is being made
        if not self._on_terminal:
            # tqdm asks its clock at every update, and `display` how old the last line is.
            kwargs |= {"mininterval": 1.0, "miniters": 1, "dynamic_ncols": False}
        super().__init__(iterable, *args, **kwargs)
        self._last_line_secs = clock()
        if not self.disable:
            self._time = clock
            self.start_t = self.last_print_t = clock()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draws the bar, or writes a line where it is time for one."""
        if self._on_terminal:
            return super().display(msg, pos)
        if self._clock() - self._last_line_secs >= LINE_SECS:
            self._write_line()
        return None

    def clear(self, nolock: bool = False) -> None:
        """Clears the bar; a line that was written stays."""
        if self._on_terminal:
            super().clear(nolock)

    def moveto(self, n: int) -> None:
        """Moves the cursor on a terminal."""
        if self._on_terminal:
            super().moveto(n)

    def close(self) -> None:
        """Ends the bar, with a last line where there is no terminal."""
        if self._on_terminal or self.disable:
            return super().close()
        self.disable = True
        self._decr_instances(self)
        if self.leave is not False:
            self._ema_dt = lambda: None  # as tqdm: the rate of the whole, not of its end
            self._write_line()
        return None

    def _write_line(self) -> None:
        self._last_line_secs = self._clock()
        self.fp.write(f"{self!s}\n")
        self.fp.flush()
