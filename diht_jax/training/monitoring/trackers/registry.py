"""The trackers by name, as `config.trackers` has them, and all of a run together."""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import ml_collections
from absl import logging
from etils import epath

from diht_jax.config.checks import nearest_name
from diht_jax.storage.files import join, read_object, write_object
from diht_jax.training.monitoring.trackers.base import TrackedRun, Tracker
from diht_jax.training.monitoring.trackers.tensorboard import TensorBoard
from diht_jax.training.monitoring.trackers.trackio import Trackio
from diht_jax.training.monitoring.trackers.wandb import WeightsAndBiases

RUN_FILE = "trackers.json"
METRICS_FILE = "metrics.jsonl"

Result = TypeVar("Result")

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def tracker_names(trackers: Sequence[str]) -> list[str]:
    """The names in `config.trackers`; `--config.trackers=a,b` gives one text of two.

    Raises:
        ValueError: one of them is not known.
    """
    names = [name.strip() for text in trackers for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            nearest = nearest_name(name[:200].lower(), TRACKERS)
            hint = f"did you mean '{nearest}'?" if nearest else f"known: {', '.join(TRACKERS)}"
            raise ValueError(f"config.trackers: there is no tracker '{name:.200}'; {hint}")
    return list(dict.fromkeys(names))


def check_trackers(trackers: Sequence[str]) -> None:
    """Checks that this process could open them; only the first process of a job opens any.

    Raises:
        ValueError: one is not known, or its package is not installed.
    """
    for name in tracker_names(trackers):
        package = TRACKERS[name].package
        if package and jax.process_index() == 0 and not _is_installed(package):
            raise ValueError(
                f"config.trackers: '{name}' needs the package {package}, which is not installed: "
                f"`pip install {package}`, or leave it out of --config.trackers"
            )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of the same name has none


class OpenTrackers:
    """The trackers of one run. One that fails is left out from then on, with a warning."""

    def __init__(
        self, workdir: epath.Path, start_step: int, config: ml_collections.ConfigDict | None
    ):
        """Opens them.

        Args:
            workdir: of the run.
            start_step: steps that it has behind it.
            config: the whole training config; None for TensorBoard alone.
        """
        names = ["tensorboard"] if config is None else tracker_names(config.trackers)
        self._open: list[Tracker] = []
        for kind in (TRACKERS[name] for name in names):
            tracker = _guard(
                kind, lambda kind=kind: kind(_describe(kind, workdir, start_step, config))
            )
            self._open += [] if tracker is None else [tracker]

    @property
    def takes_pictures(self) -> bool:
        """True if any of them does."""
        return any(tracker.takes_pictures for tracker in self._open)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds metrics of a step."""
        self._each(lambda tracker: tracker.write(step, scalars))

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Adds a picture, encoded as PNG."""
        self._each(lambda tracker: tracker.write_picture(step, name, picture))

    def close(self, failed: bool) -> None:
        """Writes what is left."""
        self._each(lambda tracker: tracker.close(failed))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        def succeeds(tracker: Tracker) -> bool:
            return _guard(type(tracker), lambda: action(tracker) or True) is not None

        self._open = [tracker for tracker in self._open if succeeds(tracker)]


def _guard(kind: type[Tracker], action: Callable[[], Result]) -> Result | None:
    """The result of an action; None, and a warning, where it fails."""
    try:
        return action()
    except Exception as error:  # each client has its own
        logging.warning(
            "the run goes on without %s (%s); %s holds the same numbers",
            kind.title,
            str(error) or type(error).__name__,
            METRICS_FILE,
        )
        return None


def _describe(
    kind: type[Tracker],
    workdir: epath.Path,
    start_step: int,
    config: ml_collections.ConfigDict | None,
) -> TrackedRun:
    if config is None or not kind.has_runs:
        return TrackedRun(workdir, start_step)
    path = join(workdir, RUN_FILE)
    found = read_object(path) or {}
    if not isinstance(found.get("id"), str):
        found = {"id": uuid.uuid4().hex[:8]}
        write_object(path, found)
    return TrackedRun(
        workdir,
        start_step,
        id=found["id"],
        name=config.tracking.name or workdir.name or "run",
        project=config.tracking.project,
        config=json.loads(config.to_json_best_effort()),
    )
