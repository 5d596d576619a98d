"""Features that a recipe does not enable add no operations to the compiled step."""

from jax.extend.core import jaxprs_in_params

from diht_jax.config import default_config
from diht_jax.training.program import TrainProgram
from diht_jax.training.terms.registry import TERMS
from tests.contributing.tiny_runs import tiny_config

# For each feature, the function that adds its operations to the step, and the keys that enable it.
# Some features exclude others and get steps of their own: adapters freeze the matrices that Muon
# updates, equal pairs are masked or positive, and FastCLIP has no embedding sizes.
FEATURES = {
    "Softmax.accumulate_equal": {"loss.equal_pairs": "positive"},
    "right_probabilities": {"loss.noise_share": 0.25},
    "first_numbers": {"matryoshka.sizes": (4, 8), "matryoshka.weights": (0.5, 1.0)},
    "ConceptDistillation.of_examples": {
        "concepts.object_weight": 1.0,
        "concepts.attribute_weight": 0.5,
    },
    "affinity_loss": {
        "affinity.weight": 1.0,
        "affinity.widths": (6,),
        "affinity.temperatures": (0.05,),
    },
    "CaptionDecoder.__call__": {"captioning.weight": 1.0},
    "VisionTransformer.tokens": {"captioning.layers": 2},
    "orthogonalize": {"optimizer.kind": "muon"},
    "learning_rate_schedule.<locals>.schedule": {
        "optimizer.schedule": "wsd",
        "optimizer.decay_steps": 3,
    },
    "update_average": {"ema.decay": 0.9},
}
ADAPTERS = {
    "adapter_product": {"lora.rank": 2},
    "Softmax.finish.<locals>.<lambda>": {"loss.equal_pairs": "mask"},  # rows without negatives
}
OTHERS = {
    "fastclip_loss": {"loss.kind": "fastclip", "loss.num_records": 64},
    "AttentionPool.__call__": {"model.overrides.vision_pool_heads": 1},
    "rotate": {"model.overrides.rotary_grid": 2},
}
# Keys of details while the feature is off, and keys of the input pipeline.
IDLE = {
    "lora.alpha": 3.0,
    "lora.towers": ("text",),
    "lora.matrices": ("fc_in",),
    "concepts.num_objects": 7,
    "concepts.num_attributes": 7,
    "concepts.top_k": 3,
    "concepts.feature": "projected",
    "concepts.learning_rate_multiplier": 2.0,
    "concepts.weight_decay_multiplier": 0.5,
    "concepts.chunk_rows": 4,
    "concepts.object_hash": "abc",
    "concepts.attribute_hash": "abc",
    "affinity.widths": (6,),
    "affinity.temperatures": (0.05,),
    "affinity.teachers_hash": "abc",
    "loss.gamma": 0.5,
    "loss.gamma_epochs": 2.0,
    "loss.rho": 1.0,
    "loss.epsilon": 1e-6,
    "loss.num_records": 64,
    "captioning.layers": 3,
    "captioning.remat": "full",
    "captioning.chunk_tokens": 64,
    "optimizer.muon.momentum": 0.5,
    "optimizer.muon.rms": 0.1,
    "data.captions": "sample",
    "data.caption_weights": "alt=1,synthetic=3",
    "data.caption_columns": "synthetic=re_caption",
    "data.caption_sentences": 1,
    "data.caption_words": 4,
}


def traced(changes):
    program = TrainProgram(tiny_config({"data.batch_size": 32, **changes}), total_steps=10)
    state, batch = program.abstract_state(), program.abstract_batch()
    return program.step(state).trace(state, batch)


def functions_of(jaxpr):
    """Returns the names of the project's functions from which a program's operations come."""
    found = set()
    for eqn in jaxpr.eqns:
        codes, _ = eqn.source_info.traceback.raw_frames()
        found |= {code.co_qualname for code in codes if "/diht_jax/" in code.co_filename}
        # jax.numpy functions are traced once, and keep the location of their first call.
        if eqn.primitive.name != "jit":
            for inner in jaxprs_in_params(eqn.params):
                found |= functions_of(inner)
    return found


def test_a_feature_that_is_off_adds_nothing_to_the_step():
    plain = traced({})
    assert plain.lower().as_text() == traced(IDLE).lower().as_text()
    in_plain = functions_of(plain.jaxpr.jaxpr)
    assert "train_step" in in_plain and "Softmax.accumulate" in in_plain
    for features in (FEATURES, ADAPTERS, OTHERS):
        settings = {key: value for keys in features.values() for key, value in keys.items()}
        in_step = functions_of(traced(settings).jaxpr.jaxpr)
        assert features.keys() - in_step == set(), "on, they are not in the step"
        assert features.keys() & in_plain == set(), "off, they are in the step"


def test_every_key_of_these_sections_is_tried():
    tried = {*IDLE, *(key for keys in (FEATURES | ADAPTERS).values() for key in keys)}
    config = default_config()
    for section in ("lora", "matryoshka", *TERMS):
        assert {f"{section}.{key}" for key in config[section]} <= tried
    assert {f"optimizer.muon.{key}" for key in config.optimizer.muon} <= tried
