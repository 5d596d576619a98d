"""Models that a task uses: in the worker's own process, or in actors that share the GPUs.

A task asks for a model with `open_model` and need not know which of the two it gets. How an engine
starts such actors belongs in `cluster_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

# Makes a model ready, once per process however often it is called; picklable.
Load = Callable[[], Any]


class Model(Protocol):
    """Something that computes, wherever it runs."""

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Calls a method many times.

        Args:
            method: of what `load` returns; a function of its arguments alone.
            calls: the arguments of each call, taken as they are needed.

        Yields:
            The results, in the order of the calls.
        """


class LocalModel:
    """A model in this process."""

    def __init__(self, load: Load):
        self._load = load

    def map(self, method: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Like `Model.map`."""
        function = getattr(self._load(), method)
        for arguments in calls:
            yield function(*arguments)


_open: Callable[[Load], Model] = LocalModel


def open_model(load: Load) -> Model:
    """The model that a task should use."""
    return _open(load)


def is_shared() -> bool:
    """Tells whether models run in other processes than this one."""
    return _open is not LocalModel


def share_models(opened: Callable[[Load], Model]) -> None:
    """Lets all later tasks of this process use models that run elsewhere.

    Args:
        opened: gives the model that stands for what a `Load` would make here.
    """
    global _open
    _open = opened
