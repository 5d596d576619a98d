"""Texts of other people on a terminal: what would steer it is shown as an escape sequence.

Keys, captions and file names come from anywhere. Raw, a control character moves the cursor or
answers for the user, a line break forges a line of the log, and a bidirectional override shows the
text in another order than it has. A terminal of ASCII has no sign at all for most letters.

Commands print by `print_escaped` and never by `print`.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

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
