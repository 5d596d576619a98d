"""Weights & Biases: one run there for each work directory, however often it was interrupted."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping

from diht_jax.storage.stores import is_remote
from diht_jax.training.monitoring.trackers.base import TrackedRun, Tracker

_PROJECT = "diht_jax"
# For the end of a run, or of a machine that is taken away: what was not sent by then stays on
# disk, where `wandb sync` finds it.
_FINISH_SECS = 60.0
_LOCAL_MODES = ("offline", "dryrun", "disabled")


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
