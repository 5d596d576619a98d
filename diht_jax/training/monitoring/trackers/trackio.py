"""trackio: runs in a database on this machine, or in a Space of the Hugging Face hub."""

from __future__ import annotations

import io
from collections.abc import Mapping

from diht_jax.training.monitoring.trackers.base import TrackedRun, Tracker

_PROJECT = "diht_jax"


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
