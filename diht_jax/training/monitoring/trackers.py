"""Trackers of experiments, which get the metrics of a run, and files that grow while it goes on.

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
# For the end of a run, or of a machine that is taken away: what W&B has not sent by then stays on
# disk, where `wandb sync` finds it.
_FINISH_SECS = 60.0
_LOCAL_MODES = ("offline", "dryrun", "disabled")


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run, as its trackers know it."""

    workdir: epath.Path  # its work directory
    start_step: int  # steps that it has behind it; more than 0 where it goes on
    config: Mapping[str, Any]  # its config, JSON-able

    @functools.cached_property
    def id(self) -> str:
        """The same for as long as the work directory exists."""
        path = join(self.workdir, RUN_FILE)
        found = (read_object(path) or {}).get("id")
        if not isinstance(found, str):
            found = uuid.uuid4().hex[:8]
            write_object(path, {"id": found})
        return found

    @property
    def name(self) -> str:
        """Name for people."""
        return self.config["tracking"]["name"] or self.workdir.name or "run"

    @property
    def project(self) -> str | None:
        """The project that it belongs to; None where the recipe names none."""
        return self.config["tracking"]["project"]


class Tracker:
    """Writes the metrics of one run to one place.

    A new one is opened where a run starts or goes on. Any method may raise: the run then goes on
    without the tracker. None may wait for the network for long.
    """

    title: ClassVar[str]  # name for people
    package: ClassVar[str] = ""  # that it needs and that does not come with this one; "" for none
    takes_pictures: ClassVar[bool] = True  # `write_picture` does something

    def __init__(self, run: TrackedRun):
        """Opens the run, or goes on with the one of the same id."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds metrics of a step; those of evaluations come in a call of their own."""
        raise NotImplementedError

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Adds a picture, encoded as PNG."""

    def close(self, failed: bool) -> None:
        """Writes what is left; `failed` where an error ended the run."""


class TensorBoard(Tracker):
    """Writes TFRecord files of `Event` messages, one for each start of a run.

    TensorBoard's own writer is not used: it writes in a thread that dies with the first error, and
    then blocks the run. Pictures are left out, since a file in an object store is written anew for
    each line.
    """

    title = "TensorBoard"
    takes_pictures = False

    def __init__(self, run: TrackedRun):
        """Begins a file; TensorBoard hides what earlier files hold of later steps."""
        from tensorboard.compat.proto import event_pb2

        # Seconds alone would let a quick restart overwrite the file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = _event(file_version="brain.Event:2")
        first += _event(step=run.start_step + 1, session_log=start)
        self._events = GrowingFile(run.workdir / "tensorboard" / name, first)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends an event; one that cannot be written now is kept."""
        from tensorboard.compat.proto import summary_pb2

        summary = summary_pb2.Summary()
        for name, value in scalars.items():
            summary.value.add(tag=name, simple_value=value)
        self._events.append(_event(step=step, summary=summary))

    def close(self, failed: bool) -> None:
        """Writes what was kept."""
        self._events.sync()


def _event(**fields: Any) -> bytes:
    """The record of an event in a file."""
    from tensorboard.compat.proto import event_pb2

    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    return frame_header(len(data)) + data + frame_footer(data)


class WeightsAndBiases(Tracker):
    """Writes by W&B's client, which sends in a process of its own.

    Its environment variables count (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR, ...). The
    step is a metric, and all others are drawn over it: W&B drops what comes for a step of its own
    that is in the past, such as an evaluation that was caught up on.
    """

    title = "Weights & Biases"
    package = "wandb"

    def __init__(self, run: TrackedRun):
        """Opens the run.

        Raises:
            Exception: no login, no network, or what else W&B's client reports.
        """
        import wandb

        settings = wandb.Settings(finish_timeout=_FINISH_SECS)
        folder = os.fspath(run.workdir)
        # Without `prompt`, a run without a login would wait for somebody at the terminal.
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
        """Hands metrics over to the client."""
        self._run.log({"step": step, **scalars})

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Hands a picture over to the client."""
        from PIL import Image

        image = self._wandb.Image(Image.open(io.BytesIO(picture)))
        self._run.log({"step": step, name: image})

    def close(self, failed: bool) -> None:
        """Waits until all is sent, a minute at most."""
        self._run.finish(exit_code=int(failed))


class Trackio(Tracker):
    """Writes by trackio's client, into TRACKIO_DIR or, with TRACKIO_SPACE_ID, a Space."""

    title = "trackio"
    package = "trackio"

    def __init__(self, run: TrackedRun):
        """Opens the run. trackio finds one that goes on by its name, so the id belongs there."""
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
        """Hands metrics over to the client's thread."""
        self._run.log(dict(scalars), step=step)

    def write_picture(self, step: int, name: str, picture: bytes) -> None:
        """Hands a picture over to the client's thread."""
        from PIL import Image

        image = self._trackio.Image(Image.open(io.BytesIO(picture)))
        self._run.log({name: image}, step=step)

    def close(self, failed: bool) -> None:
        """Waits until all is written, half a minute at most."""
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def tracker_names(trackers: Sequence[str]) -> list[str]:
    """The names in `config.trackers`; `--config.trackers=a,b` gives one text of two."""
    names = dict.fromkeys(filter(None, map(str.strip, ",".join(trackers).split(","))))
    for name in names:
        if name not in TRACKERS:
            hint = suggest(name.lower(), TRACKERS)
            raise ValueError(f"config.trackers: there is no tracker '{name:.200}'; {hint}")
    return list(names)


def check_trackers(trackers: Sequence[str]) -> None:
    """Checks that this process could open them; only the first process of a job opens any."""
    for name in tracker_names(trackers):
        package = TRACKERS[name].package
        if package and jax.process_index() == 0:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:  # a folder of the same name has none
                raise ValueError(
                    f"config.trackers: '{name}' needs the package {package}, which is not "
                    f"installed: `pip install {package}`, or leave it out of --config.trackers"
                )


def warn_without(kind: type[Tracker], error: Exception) -> None:
    """Logs that a run goes on without a tracker."""
    logging.warning(
        "the run goes on without %s (%s); %s holds the same numbers",
        kind.title,
        str(error) or type(error).__name__,
        METRICS_FILE,
    )


def replace_file(path: epath.Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all.

    Raises:
        Exception: it cannot be written; which one depends on the storage.
    """
    if is_remote(os.fspath(path)):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)


class GrowingFile:
    """Appends to a file, on a disk or in an object store, while the run goes on.

    A kill leaves whole records. Nothing here waits for a store that fails: what cannot be written
    is kept, and a later call tries again.

    Nothing can be appended to an object of a store: it is written anew whenever it grows.
    """

    def __init__(self, path: epath.Path, data: bytes):
        """Writes the file at once; errors are those of `replace_file`."""
        self._path, self._data, self._waiting = path, data, b""
        self._is_remote = is_remote(os.fspath(path))
        replace_file(path, data)

    def append(self, data: bytes) -> None:
        """Adds to the end, after what was kept; a warning where that cannot be written now."""
        self._waiting += data
        try:
            if self._is_remote:
                self._path.write_bytes(self._data + self._waiting)
            else:
                with open(self._path, "r+b") as file:
                    file.seek(len(self._data))
                    file.truncate()  # a part of what could not be written before
                    file.write(self._waiting)
            self._data, self._waiting = self._data + self._waiting, b""
        except Exception as error:  # few errors of stores are an OSError
            logging.warning(
                "%s: a line is kept for later, it cannot be written: %s",
                self._path,
                str(error) or type(error).__name__,
            )

    def sync(self) -> None:
        """Writes what was kept, and makes the file outlive a crash of the machine."""
        if self._waiting:
            self.append(b"")
        if not self._is_remote:
            with contextlib.suppress(OSError), open(self._path, "rb") as file:
                os.fsync(file.fileno())
