"""Command: export a model to a format of other libraries.

    python -m diht_jax.export --model runs/b32 --format open_clip --output exported/b32

`--model` is any model of `diht_jax.load_model`. `--push hf-hub:OWNER/NAME` also uploads the result
to the Hugging Face hub. `docs/guides/evaluate/weights.md` describes the formats.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from diht_jax import command_line
from diht_jax.storage.files import refuse_url
from diht_jax.storage.hub import check_upload, upload


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_model_flags()
    flags.DEFINE_string(
        "format", None, "clip, open_clip, huggingface, safetensors, stablehlo or onnx."
    )
    flags.DEFINE_string("output", None, "Directory to make.")
    flags.DEFINE_string("dtype", "float32", "Of the parameters: float32, bfloat16 or float16.")
    flags.DEFINE_bool("keep_heads", False, "Keep concept heads (clip, safetensors).")
    flags.DEFINE_list("results", [], "Results files of diht_jax.evaluate, for the card.")
    flags.DEFINE_string("license", None, "Licence of the weights, for the card.")
    flags.DEFINE_string("push", None, "Model on the Hugging Face hub to write: hf-hub:OWNER/NAME.")
    flags.DEFINE_bool("private", False, "Of --push: a new one is not public.")


def main() -> None:
    """Exports the model of the flags."""
    command_line.require_flags("model", "format", "output")
    export_model(
        **command_line.values("model", "format", "output", "dtype", "keep_heads", "results"),
        **command_line.values("license", "push", "private"),
        **command_line.model_options(),
    )


def export_model(
    model: str,
    format: str,
    output: str | pathlib.Path,
    *,
    dtype: str = "float32",
    keep_heads: bool = False,
    results: Sequence[str] = (),
    license: str | None = None,
    push: str | None = None,
    private: bool = False,
    **model_options: Any,
) -> None:
    """Writes a model directory with its model card.

    Arguments have the names of the command's flags, see `define_flags`. The output directory must
    be empty or missing. `model_options` are arguments of `loading.read_model`.

    Raises:
        ValueError: the model cannot be read, or cannot be written in this format or to the hub.
    """
    refuse_url(output, "output")
    import jax
    import numpy as np

    from diht_jax.evaluation.results import named_metrics, read_results
    from diht_jax.loading import read_model
    from diht_jax.weights.export import check_target, write_model
    from diht_jax.weights.model_card import model_card

    output = pathlib.Path(output)
    check_target(output, format, dtype)
    if push is not None:
        check_upload(push)
    measured = [
        (pathlib.Path(path).name, named_metrics(read_results(path)["results"])) for path in results
    ]
    source = read_model(model, **model_options)
    if keep_heads and not source.heads:
        logging.warning("%s: there are no concept heads to keep", model)
    if source.decoder is not None:
        logging.warning("%s: the caption decoder is left out, no format has one", model)
    source = dataclasses.replace(source, params=jax.tree.map(np.asarray, source.params))
    card = model_card(
        format,
        source,
        model,
        results=measured,
        heads=sorted(source.heads) if keep_heads else (),
        license=license,
        hub_name=push,
    )
    write_model(output, format, source, card=card, dtype=dtype, keep_heads=keep_heads)
    logging.info("wrote %s (%s)", output, ", ".join(sorted(p.name for p in output.iterdir())))
    if push is not None:
        message = f"{source.arch.image_size} px, {format}, by diht_jax.export"
        logging.info("pushed: %s", upload(output, push, message=message, private=private))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
