"""Command: write the embeddings of a data set to npz or Parquet files.

    python -m diht_jax.embed --model runs/b32 --input 'photos/*.tar' --output embedded

`--input` is any source of `diht_jax.readers` (tars, tables, folders, TFRecords, TFDS), or a
folder of images without captions. The output is `embeddings-SHARD-PART.npz` (or `.parquet`), each
with a `.json` that describes its input. To resume, run the same command again. Input and output may
be URLs (`s3://BUCKET/photos/*.tar`). On a cluster, run the same command on every host. Each embeds
a part of the files (or of the images of a folder, or of a few large files). If a host fails, the
others finish their parts, and all exit with its error.
"""

from __future__ import annotations

import collections
import dataclasses

from absl import flags

from diht_jax import command_line, distributed
from diht_jax.evaluation.embedding.entries import Processes
from diht_jax.evaluation.embedding.files import (
    DTYPES,
    FORMATS,
    MODALITIES,
    EmbedOptions,
    embed_source,
)
from diht_jax.evaluation.embedding.inputs import list_inputs, refuse_unusable
from diht_jax.storage.locks import check_writable
from diht_jax.storage.stores import is_remote


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_model_flags()
    command_line.define_encoding_flags()
    command_line.define_job_array_flags()
    distributed.define_flags()
    flags.DEFINE_list("input", None, "Source of pairs, or several; or a folder of pictures.")
    flags.DEFINE_string("output", None, "Directory of the embeddings, or its URL.")
    flags.DEFINE_enum("format", "npz", FORMATS, "Of the files.")
    flags.DEFINE_list("modalities", list(MODALITIES), "image, text or both.")
    flags.register_validator(
        "modalities",
        lambda given: given and set(given).issubset(MODALITIES),
        f"expected some of {', '.join(MODALITIES)}",
    )
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the embeddings in the files.")
    flags.DEFINE_string("caption_template", "{caption}", "Text that is embedded for a caption.")
    flags.DEFINE_integer(
        "shard_size", 10_000, "Entries of the source a file, at most.", lower_bound=1
    )


def main() -> None:
    """Embeds the source of the flags."""
    given = flags.FLAGS
    command_line.require_flags("model", "input", "output")
    fields = [field.name for field in dataclasses.fields(EmbedOptions)]
    options = EmbedOptions(**command_line.values(*fields))
    source = given.input[0] if len(given.input) == 1 else given.input
    list_inputs(source)  # reports a missing file before the model is loaded
    if is_remote(given.output):
        check_writable(given.output, "--output")
    distributed.start_from_flags()
    import jax

    from diht_jax.loading import load_model
    from diht_jax.training.multihost import check_same_step

    # The processes of a job divide the part of this task of a job array.
    options = dataclasses.replace(
        options,
        task_index=options.task_index * jax.process_count() + jax.process_index(),
        num_tasks=options.num_tasks * jax.process_count(),
    )

    model = load_model(given.model, **command_line.model_options(), batch_size=given.batch_size)
    check_same_step(model.step)
    processes = Processes.of_job()
    done = processes.exchange(
        processes.together(lambda: embed_source(model, source, given.output, options))
    )
    # A task of a job array sees only its own part, and another task may have usable pairs.
    if given.num_tasks == 1 and not any(share["pairs"] for share in done):
        dropped = collections.Counter()
        for share in done:
            dropped.update(share["dropped"])
        refuse_unusable(f"--input={','.join(given.input)}", dropped)


if __name__ == "__main__":
    define_flags()
    command_line.run(main, writes_to_stores=True)
