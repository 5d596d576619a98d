"""The parser and the captions that the tests of the caption rules share; loaded once."""

import random

import pytest

from data_prep.captions.parse import load_parser
from data_prep.jobs import engine


@pytest.fixture(scope="session")
def parser():
    """The spaCy pipeline with our lemmatizer."""
    return load_parser()


@pytest.fixture(scope="session")
def lemmatizer(parser):
    """The lemmatizer of the pipeline."""
    return parser.get_pipe("caption_lemmatizer")


@pytest.fixture(scope="session")
def web_captions(shared_data) -> list[str]:
    """A fixed list of 400 captions from the web."""
    lines = (shared_data / "captions_web.txt").read_text(encoding="utf-8").splitlines()
    return random.Random(0).sample(lines, 400)


@pytest.fixture(autouse=True)
def no_waiting_for_storage(monkeypatch):
    """Retries a failed store at once instead of after minutes."""
    monkeypatch.setattr(engine, "_STORAGE_DELAYS_SECS", (0.0, 0.0, 0.0))
