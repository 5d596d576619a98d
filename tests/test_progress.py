"""Progress in redirected output: plain lines, half a minute apart by an injected clock."""

import io
import re

from tqdm import tqdm

from diht_jax.terminal import ProgressBar


class Clock:
    secs = 1000.0

    def __call__(self):
        return self.secs


def positions(file):
    return [int(found) for found in re.findall(r"(\d+)/100 \[", file.getvalue())]


def test_a_file_gets_a_line_every_half_minute():
    clock, file = Clock(), io.StringIO()
    with ProgressBar(total=100, unit="step", desc="train", file=file, clock=clock) as bar:
        for step in range(100):
            clock.secs += 1
            bar.update()
            bar.set_postfix_str(f"loss {step}")
            tqdm.write("a log line", file=file)
    lines = [line for line in file.getvalue().splitlines() if line != "a log line"]
    assert positions(file) == [30, 60, 90, 100] and len(lines) == 4
    assert lines[0].startswith("train:  30%") and "[00:30<01:10,  1.00step/s" in lines[0]
    assert not re.search(r"[\r\x1b]", file.getvalue())
