"""Architecture fields: the values that a command line and a config may set."""

import pytest

from diht_jax.models.zoo import get_architecture, parse_fields


def test_fields_of_a_command_line_have_their_types():
    found = parse_fields(["causal_text=false", "vision_pool_heads=4", "text_pool=last"])
    assert found == {"causal_text": False, "vision_pool_heads": 4, "text_pool": "last"}
    with pytest.raises(ValueError, match="causal_text=no"):
        parse_fields(["causal_text=no"])


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"causal_text": 1}, "causal_text"),
        ({"vision_pool_heads": True}, "vision_pool_heads"),
        ({"text_pool": "mean"}, "text_pool 'mean': expected end or last"),
        ({"class_token": False}, "class_token=False needs vision_pool_heads"),
        ({"rotary_grid": 4}, "rotary_grid needs vision_pool_heads"),
        ({"vision_pool_heads": 3}, "vision_width 128 is no multiple of vision_pool_heads 3"),
        ({"vision_projection": "none", "embed_dim": 64}, "vision_projection 'none'"),
    ],
)
def test_what_makes_no_model_is_named(overrides, field):
    with pytest.raises(ValueError, match=field):
        get_architecture("tiny_32px", overrides)
