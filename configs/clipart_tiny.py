r"""Clip art: the small model `clipart_tiny` that is packaged with the library.

HN-NCE on the emoji of two artists (Noto Emoji, Twemoji): 7,572 images of 3,786 names. Images with
equal texts are positives of each other (`equal_pairs`); a quarter of the texts name the category
instead. A tenth of the images is held out. Every value is ours; none was tuned.

Run:

    python -m data_prep.examples emoji --output runs/emoji_data
    python -m data_prep.filter --config prep/convert \
        --config.input='runs/emoji_data/*.tar' --config.output=runs/clipart_records
    python -m diht_jax.train --config clipart_tiny \
        --config.data.train=runs/clipart_records --workdir runs/clipart_10

The packaged model was then trained for 8 more epochs: docs/guides/evaluate/clipart_tiny.md.

Meant for the local machine; a laptop is enough (`config.topology`: local).

Expected: text-to-image R@1 40.0%, R@10 79.1% on the 788 held-out images (chance: 0.1% and 1.3%);
InfoNCE reaches 38.2% and 80.0%. 530 steps, 20 minutes on two busy CPU cores.
"""

import ml_collections

from configs import common
from diht_jax.config import default_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; see `common.parse_arg` for `arg`."""
    args = common.parse_arg(arg)
    config = default_config()

    config.data.batch_size = 128
    config.data.crop_scale = (0.4, 1.0)
    config.data.num_workers = 0
    config.data.validation_share = 0.1
    config.total_epochs = 10.0
    # The name three times out of four, else the category, such as "plant-flower", "Food & Drink".
    config.data.captions = "sample"
    config.data.caption_columns = "kind=subcategory,group=category"
    config.data.caption_weights = "alt=6,kind=1,group=1"

    # 2.0M parameters: 4 MB in float16.
    config.model.name = "small_64px"
    config.model.dtype = "float32"
    config.model.patch_dropout = 0.5
    config.model.overrides.vision_layers = 5
    config.model.overrides.vision_width = 128
    config.model.overrides.vision_heads = 4
    config.model.overrides.text_width = 128
    config.model.overrides.text_heads = 4
    config.model.overrides.embed_dim = 128
    config.model.overrides.vocab_size = 4096  # the first of CLIP's merges; 49,408 rows are 13 MB

    config.loss.alpha = 1.0
    config.loss.beta = 0.25
    config.loss.equal_pairs = "positive"

    config.optimizer.kind = "muon"  # the schedule is a cosine
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1

    config.topology = "local"
    config.log_every_steps = 20
    config.checkpoint.every_steps = 100
    return common.finish(config, args)
