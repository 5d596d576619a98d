"""What all recipes share: the argument after the colon, and the shrunken `debug` form.

The form is asked for on the command line:

    --config configs/diht_vitb32.py:debug=True
"""

import ml_collections


def parse_debug(arg: str) -> bool:
    """Whether the text after the colon of --config asks for the debug form.

    Args:
        arg: "", "debug=True" or "debug=False".

    Raises:
        ValueError: anything else.
    """
    choices = {"": False, "debug=True": True, "debug=False": False}
    if arg not in choices:
        raise ValueError(f"recipe argument '{arg}': expected debug=True or nothing")
    return choices[arg]


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks a recipe, in place, to seconds on a CPU; losses, schedule and rules stay its own."""
    config.total_steps, config.total_examples, config.total_epochs = 4, None, None
    config.model.dtype = "float32"
    config.model.overrides.update(
        image_size=32,
        patch_size=8,
        vision_layers=2,
        vision_width=32,
        vision_heads=2,
        text_layers=2,
        text_width=32,
        text_heads=2,
        embed_dim=32,
    )
    config.optimizer.warmup_steps = 2
    config.data.batch_size = 16
    config.micro_batch = 8 if config.micro_batch else None
    config.topology = "local"
    config.data.num_workers = 0
    config.log_every_steps = 1
    config.checkpoint.every_steps = 2
    config.evaluation.every_steps = None
    config.evaluation.tasks = ""
    config.checkpoint.best_metric = None
    return config
