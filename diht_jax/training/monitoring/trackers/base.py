"""What a tracker gets of a run, and what it has to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run, as its trackers know it.

    Attributes:
        workdir: its work directory.
        start_step: steps that it has behind it; more than 0 where it goes on.
        id: the same for as long as the work directory exists.
        name: for people.
        project: that it belongs to; None where the recipe names none.
        config: its config, JSON-able.
    """

    workdir: epath.Path
    start_step: int
    id: str = ""
    name: str = ""
    project: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Tracker:
    """Writes the metrics of one run to one place.

    A new one is opened where a run starts or goes on. Any method may raise: the run then goes on
    without the tracker. None may wait for the network for long.

    Attributes:
        title: name for people.
        package: that it needs and that does not come with this one; "" for none.
        takes_pictures: `write_picture` does something.
        has_runs: it keeps runs by `TrackedRun.id`.
    """

    title: ClassVar[str]
    package: ClassVar[str] = ""
    takes_pictures: ClassVar[bool] = True
    has_runs: ClassVar[bool] = True

    def __init__(self, run: TrackedRun):
        """Opens the run, or goes on with the one of the same id."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds metrics of a step; those of evaluations come in a call of their own."""
        raise NotImplementedError

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Adds a picture, encoded as PNG."""

    def close(self, failed: bool) -> None:
        """Writes what is left; `failed` where an error ended the run."""
