"""Experiment trackers, which receive the metrics of a run, and files that grow during a run.

A new tracker is a subclass of `Tracker` and an entry of `TRACKERS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from absl import logging
from etils import epath

from diht_jax.config.checks import suggest
from diht_jax.records.shard_files import frame_footer, frame_header
from diht_jax.storage.files import join, read_object, write_bytes, write_object
from diht_jax.storage.stores import is_remote

RUN_FILE = "trackers.json"
METRICS_FILE = "metrics.jsonl"
_PROJECT = "diht_jax"
# Time limit at the end of a run, or when a machine is taken away. What W&B has not sent by then
# stays on disk, where `wandb sync` finds it.
_FINISH_SECS = 60.0
_LOCAL_MODES = ("offline", "dryrun", "disabled")


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run as presented to its trackers."""

    workdir: epath.Path  # its work directory
    start_step: int  # number of finished steps; more than 0 for a resumed run
    config: Mapping[str, Any]  # its config, JSON-able

    @functools.cached_property
    def id(self) -> str:
        """Identifier that stays the same as long as the work directory exists."""
        path = join(self.workdir, RUN_FILE)
        found = (read_object(path) or {}).get("id")
        if not isinstance(found, str):
            found = uuid.uuid4().hex[:8]
            write_object(path, {"id": found})
        return found

    @property
    def name(self) -> str:
        """Display name."""
        return self.config["tracking"]["name"] or self.workdir.name or "run"

    @property
    def project(self) -> str | None:
        """Project of the run; None if the recipe names none."""
        return self.config["tracking"]["project"]


class Tracker:
    """Writes the metrics of one run to one destination.

    Created when a run starts or resumes. Any method may raise: the run then continues without the
    tracker. No method may wait long for the network.
    """

    title: ClassVar[str]  # display name
    package: ClassVar[str] = ""  # required package that is not a dependency of this one, or ""
    takes_pictures: ClassVar[bool] = True  # whether `write_picture` has an effect

    def __init__(self, run: TrackedRun):
        """Opens the run, or resumes the one with the same id."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds metrics of a step; those of evaluations come in a separate call."""
        raise NotImplementedError

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Adds a PNG picture."""

    def close(self, failed: bool) -> None:
        """Writes pending data; `failed` says whether an error ended the run."""


class TensorBoard(Tracker):
    """Writes TFRecord files of `Event` messages, one for each start of a run.

    Replaces TensorBoard's own writer, whose thread dies with the first error and then blocks the
    run. Pictures are not written, because a file in an object store is rewritten for each
    line.
    """

    title = "TensorBoard"
    takes_pictures = False

    def __init__(self, run: TrackedRun):
        """Starts a file; TensorBoard hides later steps that earlier files contain."""
        from tensorboard.compat.proto import event_pb2

        # With seconds alone a quick restart would overwrite the file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = _event(file_version="brain.Event:2")
        first += _event(step=run.start_step + 1, session_log=start)
        self._events = GrowingFile(run.workdir / "tensorboard" / name, first)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends an event; keeps it if it cannot be written now."""
        from tensorboard.compat.proto import summary_pb2

        summary = summary_pb2.Summary()
        for name, value in scalars.items():
            summary.value.add(tag=name, simple_value=value)
        self._events.append(_event(step=step, summary=summary))

    def close(self, failed: bool) -> None:
        """Writes pending events."""
        self._events.sync()


def _event(**fields: Any) -> bytes:
    """Encodes an event as a record of the file."""
    from tensorboard.compat.proto import event_pb2

    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    return frame_header(len(data)) + data + frame_footer(data)


class WeightsAndBiases(Tracker):
    """Writes with W&B's client, which sends data from its own process.

    The client's environment variables apply (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR,
    ...). The step is a metric, and the x-axis of all others: W&B drops values for an earlier one of
    its own steps, such as those of an evaluation that was caught up on.
    """

    title = "Weights & Biases"
    package = "wandb"

    def __init__(self, run: TrackedRun):
        """Opens the run.

        Raises:
            Exception: no login, no network, or another error of W&B's client.
        """
        import wandb

        settings = wandb.Settings(finish_timeout=_FINISH_SECS)
        folder = os.fspath(run.workdir)
        # Without `prompt`, a run without a login would wait for input at the terminal.
        sends = wandb.setup().settings.mode not in _LOCAL_MODES
        if sends and not wandb.login(prompt=False, verify=False):
            raise ValueError("no login: call `wandb login`, or set WANDB_API_KEY or WANDB_MODE")
        self._wandb = wandb
        self._run = wandb.init(
            id=run.id,
            name=os.environ.get("WANDB_NAME", run.name),
            project=run.project or os.environ.get("WANDB_PROJECT", _PROJECT),
            config=dict(run.config),
            dir=None if is_remote(folder) else os.environ.get("WANDB_DIR", folder),
            resume="allow",
            settings=settings,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Passes metrics to the client."""
        self._run.log({"step": step, **scalars})

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Passes a picture to the client."""
        from PIL import Image

        image = self._wandb.Image(Image.open(io.BytesIO(picture)))
        self._run.log({"step": step, name: image})

    def close(self, failed: bool) -> None:
        """Waits until everything is sent, at most a minute."""
        self._run.finish(exit_code=int(failed))


class Trackio(Tracker):
    """Writes with trackio's client, to TRACKIO_DIR or, with TRACKIO_SPACE_ID, to a Space."""

    title = "trackio"
    package = "trackio"

    def __init__(self, run: TrackedRun):
        """Opens the run; its name contains the id, because trackio resumes runs by name."""
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=run.project or _PROJECT,
            name=f"{run.name}-{run.id}",
            config=dict(run.config),
            resume="allow",
            embed=False,
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Passes metrics to the client's thread."""
        self._run.log(dict(scalars), step=step)

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Passes a picture to the client's thread."""
        from PIL import Image

        image = self._trackio.Image(Image.open(io.BytesIO(picture)))
        self._run.log({name: image}, step=step)

    def close(self, failed: bool) -> None:
        """Waits until everything is written, at most half a minute."""
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def tracker_names(trackers: Sequence[str]) -> list[str]:
    """Returns the names in `config.trackers`; `--config.trackers=a,b` is one text with two."""
    names = dict.fromkeys(filter(None, map(str.strip, ",".join(trackers).split(","))))
    for name in names:
        if name not in TRACKERS:
            hint = suggest(name.lower(), TRACKERS)
            raise ValueError(f"config.trackers: there is no tracker '{name:.200}'; {hint}")
    return list(names)


def check_trackers(trackers: Sequence[str]) -> None:
    """Checks that this process could open the trackers; only the first process opens them."""
    for name in tracker_names(trackers):
        package = TRACKERS[name].package
        if package and jax.process_index() == 0:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:  # a mere folder of that name has no origin
                raise ValueError(
                    f"config.trackers: '{name}' needs the package {package}, which is not "
                    f"installed: `pip install {package}`, or leave it out of --config.trackers"
                )


def warn_without(kind: type[Tracker], error: Exception) -> None:
    """Logs that a run continues without a tracker."""
    logging.warning(
        "the run goes on without %s (%s); %s holds the same numbers",
        kind.title,
        str(error) or type(error).__name__,
        METRICS_FILE,
    )


def replace_file(path: epath.Path, data: bytes) -> None:
    """Writes a file atomically.

    Raises:
        Exception: the file cannot be written; the type depends on the storage.
    """
    if is_remote(os.fspath(path)):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)


class GrowingFile:
    """Appends to a file on a disk or in an object store.

    A kill leaves only whole records. It never waits for a failing store: data that cannot be
    written are kept, and a later call tries again.

    Objects of a store cannot be appended to, so the object is rewritten whenever it grows.
    """

    def __init__(self, path: epath.Path, data: bytes):
        """Writes the file at once; errors as in `replace_file`."""
        self._path, self._data, self._waiting = path, data, b""
        self._is_remote = is_remote(os.fspath(path))
        replace_file(path, data)

    def append(self, data: bytes) -> None:
        """Appends pending and new data; logs a warning if they cannot be written now."""
        self._waiting += data
        try:
            if self._is_remote:
                self._path.write_bytes(self._data + self._waiting)
            else:
                with open(self._path, "r+b") as file:
                    file.seek(len(self._data))
                    file.truncate()  # removes a partial write of an earlier attempt
                    file.write(self._waiting)
            self._data, self._waiting = self._data + self._waiting, b""
        except Exception as error:  # errors of stores are rarely an OSError
            logging.warning(
                "%s: a line is kept for later, it cannot be written: %s",
                self._path,
                str(error) or type(error).__name__,
            )

    def sync(self) -> None:
        """Writes pending data, and makes the file durable against a crash of the machine."""
        if self._waiting:
            self.append(b"")
        if not self._is_remote:
            with contextlib.suppress(OSError), open(self._path, "rb") as file:
                os.fsync(file.fileno())
