"""The recipes of `configs/`, for the tests that go through all of them."""

import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (REPOSITORY / "configs").glob("*.py") if path.stem != "common")
