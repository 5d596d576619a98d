"""Terminal output: escapes of untrusted text, and progress in redirected output."""

import io
import re
import sys
import unicodedata

import pytest
from tqdm import tqdm

from diht_jax.terminal import ProgressBar, escape, escape_lines, print_escaped

_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\r\nb\tc\x00\x7f\x9b31m", r"a\x0d\x0ab\x09c\x00\x7f\x9b31m"),
        ("\ud800 \u2028 \ufeff \U000e0041", r"\ud800 \u2028 \ufeff \U000e0041"),
        (
            "größe 犬 🐕 👩\u200d👩\u200d👧 עברית العربية é",
            "größe 犬 🐕 👩\u200d👩\u200d👧 עברית العربية é",
        ),
    ],
)
def test_what_is_shown(text, shown):
    assert escape(text) == shown


def test_every_character_that_unicode_calls_a_control_is_escaped():
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        is_control = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
        if is_control or unicodedata.bidirectional(letter) in _BIDI:
            assert escape(letter).isascii() and escape(letter).isprintable(), hex(code)
        elif letter.isprintable():
            assert escape(letter) == letter


def test_lines_of_our_own_stay_lines():
    assert escape_lines("a\n\tb\x1b[1m\r\n") == "a\n\tb\\x1b[1m\\x0d\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "größe 犬\\x1b[2J\n\\ud800\n"),
        ("latin-1", "größe \\u72ac\\x1b[2J\n\\ud800\n"),
        ("ascii", "gr\\xf6\\xdfe \\u72ac\\x1b[2J\n\\ud800\n"),
    ],
)
def test_letters_that_the_terminal_lacks_are_spelled(encoding, shown):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_escaped("größe 犬\x1b[2J\n\ud800", file=terminal)
    assert terminal.buffer.getvalue() == shown.encode(encoding)


class Clock:
    secs = 1000.0

    def __call__(self):
        return self.secs


def test_a_file_gets_a_line_every_half_minute():
    clock, file = Clock(), io.StringIO()
    with ProgressBar(total=100, unit="step", desc="train", file=file, clock=clock) as bar:
        for step in range(100):
            clock.secs += 1
            bar.update()
            bar.set_postfix_str(f"loss {step}")
            tqdm.write("a log line", file=file)
    lines = [line for line in file.getvalue().splitlines() if line != "a log line"]
    positions = [int(found) for found in re.findall(r"(\d+)/100 \[", file.getvalue())]
    assert positions == [30, 60, 90, 100] and len(lines) == 4
    assert not re.search(r"[\r\x1b]", file.getvalue())
