"""The caption decoder against torch's, and decoding with and without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diht_jax
from diht_jax.export import export_model
from diht_jax.extras.captioning import DECODER, CaptionDecoder, decode_captions, merge_decoder
from diht_jax.models.parameters import model_parameters
from diht_jax.training.loop import Run
from tests import make

ARCH = make.small_architecture(
    vision_width=48, vision_heads=2, text_width=32, text_heads=4, context_length=10, vocab_size=50
)
LAYERS = 3
START, END = 48, 49


@pytest.fixture(scope="module")
def params():
    """Returns parameters with nonzero biases and logits that are far apart."""
    decoder = CaptionDecoder(ARCH, LAYERS, rngs=nnx.Rngs(params=jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.float32(leaf + 0.2 * rng.standard_normal(leaf.shape)),
        model_parameters(decoder),
    )


@pytest.fixture(scope="module")
def decoder(params):
    return merge_decoder(jax.tree.map(jnp.asarray, params), ARCH, dtype=jnp.float32)


@pytest.fixture(scope="module")
def image_tokens():
    return np.random.default_rng(1).standard_normal((6, 5, ARCH.vision_width)).astype(np.float32)


def torch_features(params, tokens, image_tokens):
    """Returns [b, t, width] of torch's decoder with the same parameters."""
    torch = pytest.importorskip("torch")
    width, image_width, heads = ARCH.text_width, ARCH.vision_width, ARCH.text_heads

    def fill(parameter, array):
        assert parameter.shape == array.shape
        parameter.data = torch.tensor(array)

    def fill_linear(layer, source):
        fill(layer.weight, source["kernel"].T)
        fill(layer.bias, source["bias"])

    x = torch.from_numpy(
        params["token_embedding"]["embedding"][tokens]
        + params["positional_embedding"][: tokens.shape[1]]
    )
    memory = torch.from_numpy(image_tokens)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
    for i in range(LAYERS):
        source = params["blocks"][str(i)]
        layer = torch.nn.TransformerDecoderLayer(
            *(width, heads, 4 * width, 0.0, "gelu"), batch_first=True, norm_first=True
        ).eval()
        layer.multihead_attn = torch.nn.MultiheadAttention(
            width, heads, kdim=image_width, vdim=image_width, batch_first=True
        ).eval()
        attention, cross = source["attention"], source["cross_attention"]
        fill(layer.self_attn.in_proj_weight, attention["in_proj"]["kernel"].T)
        fill(layer.self_attn.in_proj_bias, attention["in_proj"]["bias"])
        fill_linear(layer.self_attn.out_proj, attention["out_proj"])
        for kind in "qkv":
            weight = getattr(layer.multihead_attn, f"{kind}_proj_weight")
            fill(weight, cross[f"{kind}_proj"]["kernel"].T)
        biases = [cross[f"{kind}_proj"]["bias"] for kind in "qkv"]
        fill(layer.multihead_attn.in_proj_bias, np.concatenate(biases))
        fill_linear(layer.multihead_attn.out_proj, cross["out_proj"])
        fill_linear(layer.linear1, source["mlp"]["fc_in"])
        fill_linear(layer.linear2, source["mlp"]["fc_out"])
        norms = ("attention_norm", "cross_attention_norm", "mlp_norm")
        for norm, name in zip((layer.norm1, layer.norm2, layer.norm3), norms, strict=True):
            fill(norm.weight, source[name]["scale"])
            fill(norm.bias, source[name]["bias"])
        x = layer(x, memory, tgt_mask=mask)
    norm = torch.nn.LayerNorm(width)
    fill(norm.weight, params["final_norm"]["scale"])
    fill(norm.bias, params["final_norm"]["bias"])
    return norm(x).detach().numpy()


def test_features_equal_those_of_torch(params, decoder, image_tokens):
    tokens = np.random.default_rng(2).integers(0, 50, (6, 8)).astype(np.int32)
    found = decoder(tokens, image_tokens)
    np.testing.assert_allclose(found, torch_features(params, tokens, image_tokens), atol=2e-5)


@pytest.fixture(scope="module")
def next_logits(decoder):
    """Returns the logits after the tokens of one caption, computed without a cache."""
    features_of = jax.jit(decoder.__call__)

    def find(written, image_tokens):
        tokens = np.zeros((1, 10), np.int32)  # a token does not depend on later ones
        tokens[0, : len(written)] = written
        features = np.asarray(features_of(tokens, image_tokens[None]), np.float64)
        logits = features[0, len(written) - 1] @ np.asarray(decoder.output_kernel(), np.float64)
        logits[START] = -np.inf
        return logits

    return find


def decode(decoder, image_tokens, length=10, **settings):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(6))
    return np.asarray(
        jax.jit(
            lambda tokens: decode_captions(
                *(decoder, tokens, keys), start_id=START, end_id=END, length=length, **settings
            )
        )(image_tokens)
    )


def test_greedy_captions_are_those_of_whole_passes(decoder, image_tokens, next_logits):
    written = decode(decoder, image_tokens)
    lengths = set()
    for row, picture in zip(written, image_tokens, strict=True):
        expected = [START]
        while len(expected) < 10 and expected[-1] != END:
            expected.append(int(np.argmax(next_logits(expected, picture))))
        lengths.add(len(expected))
        assert row.tolist() == expected + [0] * (10 - len(expected))
    assert len(lengths) > 1, "all captions end together: the test shows less than it should"
    assert np.array_equal(decode(decoder, image_tokens, length=4), written[:, :4])


def test_draws_have_the_probabilities_of_the_logits(decoder, image_tokens, next_logits):
    """Draws the first token of 4,000 captions of one image."""
    count, picture = 4000, image_tokens[0]
    keys = jax.random.split(jax.random.key(0), count)
    written = decode_captions(
        *(decoder, np.repeat(picture[None], count, 0), keys),
        **{"start_id": START, "end_id": END, "length": 2, "top_k": 4, "temperature": 1.5},
    )
    logits = next_logits([START], picture)
    ids = np.argsort(logits)[-4:]
    expected = np.exp(logits[ids] / 1.5) / np.sum(np.exp(logits[ids] / 1.5))
    shares = np.mean(np.asarray(written)[:, 1:] == ids, axis=0)
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / count))
    assert np.isclose(shares.sum(), 1)


def test_a_loaded_run_has_the_decoder_that_it_has_saved(tmp_path, caplog):
    data = make.write_records(tmp_path / "records", 40)
    config = make.tiny_config(mesh__data=1, mesh__fsdp=2, data__train=str(data))
    config.model.overrides.context_length = 6
    config.captioning.update(weight=1.0, layers=1)
    run = Run(config, tmp_path / "run", jax.devices()[:2])
    run.checkpointer.save(run.state, run.iterator.get_state())
    run.close()
    model = diht_jax.load_model(tmp_path / "run", devices=jax.devices()[:1])
    picture = np.zeros((16, 16, 3), np.uint8)
    (text,) = model.caption(picture)
    assert text
    jax.tree.map(np.testing.assert_array_equal, model._decoder, run.state.params[DECODER])
    with caplog.at_level("WARNING"):
        export_model(str(tmp_path / "run"), "safetensors", tmp_path / "out")
    assert "the caption decoder is left out" in caplog.text
