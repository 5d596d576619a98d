r"""Fine-tuning on CIFAR-10, initialised with class prompts: FLYP, a linear probe, or adapters.

FLYP (Goyal et al. 2022, arXiv 2212.00638) continues training with the contrastive loss on pairs of
an image and the prompt of its class. The classifier always consists of the text embeddings of the
prompts: it starts as the zero-shot classifier, and evaluation, WiSE-FT, soups and export work as
usual. The captions of `cifar10_train.tar` are such prompts ("a photo of a airplane."). For captions
that are class names, set `--config.data.text_template="a photo of a {caption}."`.

The argument `train` selects the trained parameters:

    all     both towers and the logit scale
    probe   the projection of the image tower only: a linear map of fixed features
    lora    adapters of rank 8 in both towers

Run, from a model of the same architecture, here the demo's:

    python -m diht_jax.train --config cifar10_finetune \
        --config.model.init_from=runs/base --config.data.train=runs/cifar10_records \
        --workdir runs/tuned
    python -m diht_jax.train --config cifar10_finetune:train=lora \
        --config.model.init_from=runs/base --config.data.train=runs/cifar10_records \
        --workdir runs/tuned_lora

Meant for the local machine; a laptop is enough (`config.topology`: local).

Expected: in the laboratory (docs/experiments/students.md), adapters are 2.9 points worse than all
parameters and 7.2 better than the projection only; the synthetic web is a bad start for photos.
"""

import ml_collections

from configs import common
from diht_jax.config import default_config

TRAINED = ("all", "probe", "lora")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; see `common.parse_arg` for `arg`."""
    args = common.parse_arg(arg, train="all")
    if args.train not in TRAINED:
        raise ValueError(f"recipe argument 'train={args.train}': expected {', '.join(TRAINED)}")
    config = default_config()

    # The model of the demo.
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.context_length = 24  # the longest caption has 24 tokens
    config.model.overrides.text_width = 64
    config.model.overrides.text_heads = 1

    config.data.batch_size = 64
    config.data.crop_scale = (0.5, 1.0)
    config.data.num_workers = 0
    config.total_examples = 30_720

    config.loss.alpha = 1.0
    config.loss.beta = 0.0  # batches contain equal prompts, which are not hard negatives

    config.optimizer.kind = "muon"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 20
    if args.train == "probe":
        config.optimizer.frozen = ("^text/", "^vision/(?!projection)", "^log_logit_scale$")
        config.optimizer.learning_rate = 3e-3
    if args.train == "lora":
        config.lora.rank = 8
        config.optimizer.learning_rate = 1e-3

    config.topology = "local"
    config.log_every_steps = 20
    config.checkpoint.every_steps = 200
    return common.finish(config, args)
