"""Progress bars: lively on a terminal, a line now and then where the output goes to a file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

LINE_SECS = 30.0


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
        """Takes the arguments of tqdm.

        Args:
            iterable: of tqdm.
            *args: of tqdm.
            clock: seconds, from any start.
            **kwargs: of tqdm.
        """
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
