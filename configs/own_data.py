r"""Your own pairs: a small CLIP on a laptop, a larger one on one GPU or the GPUs of one node.

The defaults depend on the number of pairs and on the devices. HN-NCE without concept labels; no
ImageNet and no pretrained weights are needed. Up to 5,000 pairs (a tenth of fewer than 50,000) are
held out: retrieval on them is evaluated ten times, and the best checkpoint is kept.

Run, with your pairs in any form of docs/guides/prepare/sources.md:

    python -m data_prep.filter --config prep/convert \
        --config.input=runs/data/pictures/captions.csv --config.output=runs/pairs
    python -m diht_jax.train --config own_data:data=runs/pairs --workdir runs/own
    python -m diht_jax.evaluate --model runs/own --tasks validation --output runs/own.json

The argument `data` replaces the `--config.data.train` of other recipes. The number of pairs can be
given instead, for example to compile for another machine:

    python -m diht_jax.compile --config own_data:pairs=10_000_000,topology=h100:8

Meant for the local machine (`config.topology`: local). A run that resumes on another kind of
device, for which the default model differs, reports the keys that changed: take their values from
the config.json of the run.

Expected: with 951 emoji, 45.7% of 94 held-out captions find their image among the top ten (chance:
10.6%) after 268 steps, five minutes on two CPU cores. Every value below is ours; the second row is
like `emoji`, and the larger ones have not been run at full length here.
"""

import dataclasses
import os

import ml_collections

from configs import common
from diht_jax.config import default_config
from diht_jax.records.formats import open_source


@dataclasses.dataclass(frozen=True)
class Size:
    """Settings for data sets up to a number of pairs."""

    most_pairs: float  # upper limit of this row
    model: str  # name in `diht_jax.models.zoo`
    batch_size: int  # maximum; a fifth of the pairs for small data sets
    epochs: float
    learning_rate: float  # peak, for AdamW
    crop_scale: float  # minimum share of the image area in a crop


SIZES = (
    Size(2_000, "small_64px", 128, 40, 1e-3, 0.25),
    Size(30_000, "small_64px", 256, 40, 1e-3, 0.25),
    Size(300_000, "small_64px", 512, 16, 1e-3, 0.5),
    # Without an accelerator, the row above is used for all larger data sets.
    Size(3_000_000, "diht_vitb32_224px", 1024, 30, 5e-4, 0.5),
    Size(float("inf"), "diht_vitb16_224px", 4096, 30, 5e-4, 0.8),
)
# About eight hours for the small model on two cores.
MOST_EXAMPLES_ON_CPU = 5_000_000
MOST_VALIDATION_PAIRS = 5_000


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; see `common.parse_arg` for `arg`.

    Raises:
        ValueError: neither `data` nor `pairs` is given, or there are no pairs.
    """
    args = common.parse_arg(arg, data="", pairs=0)
    args.data = os.path.expanduser(args.data)  # the shell does not expand a path after a colon
    pairs = args.pairs or count_pairs(args)
    if pairs < 1:
        raise ValueError(f"recipe argument '{arg}': expected at least one pair, found {pairs}")
    machine = common.find_machine(args.topology)
    sizes = SIZES if machine.has_accelerator else SIZES[:3]
    size = next((size for size in sizes if pairs <= size.most_pairs), sizes[-1])
    is_small = size.model == "small_64px"
    config = default_config()

    # Data.
    config.data.train = args.data or None
    config.data.validation_share = min(0.1, MOST_VALIDATION_PAIRS / pairs)
    batch_size = machine.divisible(min(size.batch_size, max(8, pairs // 5)))
    config.data.batch_size, streams = batch_size, config.data.num_streams
    if batch_size > streams:  # the streams must divide the batch if the data are in a store
        config.data.num_streams = next(n for n in range(streams, 0, -1) if batch_size % n == 0)
    config.data.crop_scale = (size.crop_scale, 1.0)
    config.data.captions = "sample"
    config.data.num_workers = None if machine.has_accelerator else 0
    trained = round(pairs * (1 - config.data.validation_share))
    config.total_examples = round(trained * size.epochs)
    if not machine.has_accelerator:
        config.total_examples = min(config.total_examples, MOST_EXAMPLES_ON_CPU)
    steps = config.total_examples // config.data.batch_size

    # Architecture: the small model takes 64 px and 32 tokens, the others 224 px and 77.
    config.model.name = size.model
    config.model.dtype = "bfloat16" if machine.has_accelerator else "float32"
    config.model.patch_dropout = 0.5 if is_small else 0.0

    # Contrastive loss: HN-NCE with the beta of the web recipes. No distillation.
    config.loss.alpha = 1.0
    config.loss.beta = 0.25
    config.concepts.object_weight = 0.0
    config.concepts.attribute_weight = 0.0

    # Optimiser and schedule.
    config.optimizer.kind = "adamw"
    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = size.learning_rate
    config.optimizer.warmup_steps = min(2000, steps // 10)
    config.optimizer.weight_decay = 0.2

    # Machine: affects how the step is computed, not its result.
    config.topology = args.topology or "local"
    config.mesh.fsdp = 1
    config.micro_batch = machine.micro_batch(size.model, config.data.batch_size)

    # Evaluation and checkpoints.
    config.log_every_steps = min(50, max(1, steps // 50))
    config.checkpoint.every_steps = min(1000, max(1, steps // 10))
    saves = max(1, round(steps / 10 / config.checkpoint.every_steps))
    config.evaluation.every_steps = saves * config.checkpoint.every_steps
    config.evaluation.batch_size = min(512, config.data.batch_size)
    config.checkpoint.best_metric = "validation/t2i_r10"
    return common.finish(config, args)


def count_pairs(args: ml_collections.ConfigDict) -> int:
    """Counts the records in the folder `args.data`."""
    if args.data:
        try:
            return len(open_source(args.data))
        except ValueError as error:
            raise ValueError(f"recipe argument 'data={args.data}': {error}") from error
    if args.debug:
        return SIZES[0].most_pairs
    raise ValueError(
        "recipe argument 'data' is missing: expected the folder of your pairs after a colon, such "
        "as --config own_data:data=runs/pairs (written by data_prep.filter), or how many "
        "there are, such as pairs=1000"
    )
