r"""Demo: a tiny CLIP on the synthetic noisy web, in minutes on a laptop.

HN-NCE on the pairs that the caption filter kept. `run_demo.sh` trains it four times for the same
number of samples seen, and changes one thing at a time: raw pairs with InfoNCE, filtered pairs,
HN-NCE, and the concept labels of a small teacher. A batch is small, since in so short a run the
number of updates counts most, and the optimiser is Muon, with which the student learns shapes
(docs/benchmarks/index.md).

Run, as a part of `bash run_demo.sh`, or alone:

    python -m data_prep.synthetic --output demo_output/web
    python -m data_prep.filter --config prep/cat \
        --config.input='demo_output/web/train-*.tar' --config.output=demo_output/filtered
    python -m diht_jax.train --config demo \
        --config.data.train=demo_output/filtered --workdir demo_output/filtered_hn_nce

Meant for the machine it is started on; a laptop will do (`config.topology`: local).

Expected: the table of the README.
"""

import ml_collections

from configs import common
from diht_jax.config import default_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    args = common.parse_arg(arg)
    config = default_config()

    config.data.batch_size = 64
    config.data.crop_scale = (0.8, 1.0)
    config.data.num_workers = 0
    config.total_examples = 30_720

    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.context_length = 24  # the longest caption has 24 tokens
    config.model.overrides.text_width = 64
    config.model.overrides.text_heads = 1

    config.loss.alpha = 1.0  # of the web recipes
    config.loss.beta = 0.25

    config.optimizer.kind = "muon"  # the schedule is a cosine
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20

    config.topology = "local"
    config.log_every_steps = 20
    config.checkpoint.every_steps = 200
    return common.finish(config, args)
