"""Exports give the same embeddings in other libraries, and convert back bit for bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from diht_jax import load_model
from diht_jax.data.tokenizer import tokenize
from diht_jax.export import export_model
from diht_jax.loading import read_model
from diht_jax.models.zoo import ARCHITECTURES
from diht_jax.storage.files import write_bytes
from diht_jax.weights import clip_layout
from diht_jax.weights.model_card import model_card
from diht_jax.weights.source import ModelFiles, read_weights
from diht_jax.weights.tensor_files import write_safetensors
from tests import make
from tests.weights.conftest import one_device  # noqa: F401

ARCH = make.small_architecture(
    image_size=32, vision_layers=2, text_layers=2, embed_dim=40, context_length=16
)
PICTURES = [make.noise(1, size) for size in ((32, 32), (70, 40), (50, 90))]
FORMATS = ("clip", "open_clip", "huggingface", "safetensors")
TEXTS = [
    "a red heart",
    "Two men aren't  playing chess in the park's café at 19:45 &amp; drinking",
    "x" * 300,
    "☃️ naïve, 東京 — über!",
]


def random_tensors(arch):
    """Randomly draws every parameter, in CLIP's layout."""
    return clip_layout.to_clip(make.drawn_model(arch).params, arch)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A weight file, its architecture, and the fields that the shapes do not determine."""
    fields = {"activation": "quick_gelu", "layer_norm_epsilon": 1e-4}
    fields |= {"vision_heads": 2, "text_heads": 4}
    arch = dataclasses.replace(ARCH, vision_mlp_width=100, text_mlp_width=90, **fields)
    folder = tmp_path_factory.mktemp("source")
    write_safetensors(folder / "a.safetensors", random_tensors(arch))
    return folder / "a.safetensors", arch, fields


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    path, _, fields = source
    for format in FORMATS:
        export_model(str(path), format, folder / format, architecture=fields)
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_is_bit_for_bit(source, exported, format):
    path, arch, fields = source
    before = read_weights(path, architecture=fields)
    after = read_weights(exported / format)
    assert after.arch == arch == before.arch
    expected = dict(jax.tree_util.tree_leaves_with_path(before.params))
    found = dict(jax.tree_util.tree_leaves_with_path(after.params))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].tobytes() == value.tobytes(), key
    # Exporting to the next format: a chain of exports loses nothing.
    tensors = clip_layout.to_clip(after.params, arch)
    for name, value in random_tensors(arch).items():
        assert tensors[name].tobytes() == value.tobytes(), name


def test_open_clip_loads_it_and_agrees(exported):
    open_clip = pytest.importorskip("open_clip")
    name = f"local-dir:{exported / 'open_clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    ours = load_model(exported / "open_clip")
    np.testing.assert_array_equal(ours.tokenize(TEXTS), tokens.numpy())
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in PICTURES])
        image_emb = model.eval().encode_image(pixels, normalize=True).numpy()
        text_emb = model.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(ours.encode_image(PICTURES), image_emb, atol=1e-5)
    np.testing.assert_allclose(ours.encode_text(TEXTS), text_emb, atol=1e-5)
    assert ours.logit_scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert np.abs(image_emb[0] - image_emb[1]).max() > 1e-3


def test_transformers_loads_it_and_agrees(exported):
    transformers = pytest.importorskip("transformers")
    folder = exported / "huggingface"
    model, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # The processor's default backend, torchvision, rounds resized pixels differently.
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.CLIPProcessor.from_pretrained(folder).tokenizer
    tokens = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )["input_ids"]
    ours = load_model(folder)
    for own, other in zip(ours.tokenize(TEXTS), tokens.numpy(), strict=True):
        end = list(own).index(49407)
        np.testing.assert_array_equal(own[: end + 1], other[: end + 1])
        # transformers pads with the end token, this package with 0; later tokens have no effect.
        assert not own[end + 1 :].any() and (other[end:] == 49407).all()
    with torch.no_grad():
        out = model.eval()(**processor(PICTURES, return_tensors="pt"), input_ids=tokens)
    np.testing.assert_allclose(ours.encode_image(PICTURES), out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(ours.encode_text(TEXTS), out.text_embeds, atol=1e-5)


def test_tokenizer_file_cleans_texts_as_ours(exported, shared_data):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPProcessor.from_pretrained(exported / "huggingface").tokenizer
    captions = (shared_data / "captions_web.txt").read_text(encoding="utf-8").splitlines()
    texts = [
        *("It’s a “quoted” thing", "l‘homme", "ﬁne oﬃce", "ＡＢＣ　１２", "cafe\u0301 CAFÉ"),
        *("AT&amp;T &lt;b&gt; &#39;x&#39;", "&amp;amp; &amp;quot;", "it&rsquo;s", "a\xa0b\tc  d"),
        *("", " ", "\ufeffbom\x00", "don't", "x" * 500),
        *captions[:1500],
    ]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=16)["input_ids"]
    for text, own, other in zip(texts, tokenize(texts, 16).tolist(), tokens, strict=True):
        end = own.index(49407)
        assert own[: end + 1] == other[: end + 1], text


@pytest.mark.parametrize("vocab_size", [700, 49500], ids=["small", "unused_entries"])
def test_the_vocabulary_of_a_run_comes_along(vocab_size, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = make.tiny_config(model__overrides__vocab_size=vocab_size)
    run = load_model(make.write_run(tmp_path / "run", config))
    tokens, expected = run.tokenize(TEXTS), run.encode_text(TEXTS)
    assert tokens.max() == min(vocab_size - 1, 49407)
    # A file in CLIP's own layout cannot state a smaller vocabulary.
    for format in FORMATS[vocab_size < 49408 :]:
        export_model(str(tmp_path / "run"), format, tmp_path / format)
        found = load_model(tmp_path / format)
        np.testing.assert_array_equal(found.tokenize(TEXTS), tokens, format)
        np.testing.assert_array_equal(found.encode_text(TEXTS), expected, format)
    folder = tmp_path / "huggingface"
    ids = transformers.AutoProcessor.from_pretrained(folder).tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )["input_ids"]
    for own, other in zip(tokens, ids.tolist(), strict=True):
        assert [i for i in own if i] == other[: np.count_nonzero(own)]
    with torch.no_grad():
        out = transformers.AutoModel.from_pretrained(folder).eval()(
            pixel_values=torch.zeros((1, 3, 16, 16)), input_ids=ids
        )
    np.testing.assert_allclose(out.text_embeds, expected, atol=1e-5)


def test_another_vocabulary_takes_ids_alone(tmp_path):
    write_safetensors(
        tmp_path / "a.safetensors", random_tensors(dataclasses.replace(ARCH, vocab_size=700))
    )
    for format in ("safetensors", "huggingface"):
        export_model(str(tmp_path / "a.safetensors"), format, tmp_path / format)
        model = load_model(tmp_path / format)
        with pytest.raises(ValueError, match="vocabulary of 700 entries is not CLIP's"):
            model.encode_text(["a red heart"])


def test_concept_heads_are_left_out_or_kept(tmp_path):
    arch = dataclasses.replace(ARCH, vocab_size=600)
    heads = clip_layout.heads_to_clip(
        {"objects": {"kernel": np.ones((64, 7), np.float32), "bias": np.arange(7.0)}}
    )
    assert heads["concept_heads.objects.weight"].shape == (7, 64)
    path = str(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "a.safetensors", {**random_tensors(arch), **heads})
    for format in ("clip", "safetensors"):
        for keep in (False, True):
            output = tmp_path / f"{format}_{keep}"
            export_model(path, format, output, keep_heads=keep)
            found = read_weights(output).heads
            assert found.keys() == (heads.keys() if keep else set())
            card = (output / "README.md").read_text()
            assert ("concept_heads.objects.bias" in card) == keep
    np.testing.assert_array_equal(found["concept_heads.objects.bias"], np.arange(7))
    with pytest.raises(ValueError, match="'open_clip' cannot hold concept heads"):
        export_model(path, "open_clip", tmp_path / "x", keep_heads=True)
    export_model(path, "open_clip", tmp_path / "x")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A work directory at step 7 with the counts of its data and evaluation results."""
    folder = tmp_path_factory.mktemp("workdir")
    config = make.tiny_config(ema__decay=0.5, data__train=str(folder / "records"))
    (folder / "records").mkdir()
    counts = {"read": 30, "kept": 20, "dropped": {"caption": {"no_action": 10}}}
    (folder / "records" / "stats.json").write_text(json.dumps({"counts": counts}))
    run = make.write_run(folder / "run", config)
    rows = [
        {"step": 5, "loss": 1.0, "evaluation/cifar10/top1": 0.25},
        {"step": 7, "evaluation/cifar10/top1": 0.375},
        {"step": 9, "evaluation/cifar10/top1": 0.999},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(f'{lines}{{"step": 7, "evaluati')  # killed while writing
    return run


def test_work_directory_plain_and_averaged_with_its_card(workdir, tmp_path):
    results = {
        "results": [{"task": "emoji", "metrics": {"t2i_r1": 0.106}, "counts": {"images": 3786}}]
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    for ema, seed in ((False, 0), (True, 1)):
        output = tmp_path / f"out_{ema}"
        export_model(
            str(workdir),
            "safetensors",
            output,
            ema=ema,
            results=[str(tmp_path / "results.json")],
            license="cc-by-4.0: as the data",
        )
        found = read_weights(output)
        expected = make.drawn_model(found.arch, seed).params
        jax.tree.map(np.testing.assert_array_equal, found.params, expected)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        load_model(output).encode_image(images),
        load_model(workdir, ema=True).encode_image(images),
        atol=1e-6,
    )
    card = (output / "README.md").read_text()
    for line in (
        'license: "cc-by-4.0: as the data"',  # a quoted YAML string
        "| dropped, caption: no_action | 10 |",
        "| in training, at step 7 | cifar10/top1 | 0.375 |",
        "| results.json | emoji/t2i_r1 | 0.106 |",
    ):
        assert line in card, card
    assert "0.999" not in card


def test_the_card_of_a_run_in_a_store_has_its_results(workdir):
    url = "memory://card/run"
    write_bytes(f"{url}/metrics.jsonl", (workdir / "metrics.jsonl").read_bytes())
    model = dataclasses.replace(read_model(str(workdir)), path=url)
    card = model_card("safetensors", model, url, results=[])
    assert "| in training, at step 7 | cifar10/top1 | 0.375 |" in card


@pytest.mark.parametrize(
    ("name", "names"), [("siglip2_vitb16_224px", "open_clip"), ("tiny_32px", "OpenAI's CLIP")]
)
def test_the_card_says_whose_names_it_has_and_of_clips_tokenizer_where_it_has_that(name, names):
    model = ModelFiles(ARCHITECTURES[name], {}, name, has_tokenizer=names != "open_clip")
    assert f"names of {names}" in model_card("safetensors", model, name, results=[])
    card = model_card("huggingface", model, name, results=[])
    assert ("CLIPTokenizer" in card) == model.has_tokenizer


def test_the_bias_that_a_sigmoid_loss_has_learnt_is_named_where_it_is_left_out(tmp_path, caplog):
    config = make.tiny_config(loss__kind="sigmoid")
    run = make.write_run(tmp_path / "run", config, logit_bias=-9.25)
    export_model(str(run), "clip", tmp_path / "out")
    assert "logit_bias=-9.25" in caplog.text
    assert "| logit_bias, not in the file | -9.25 |" in (tmp_path / "out/README.md").read_text()


def test_the_first_numbers_of_the_embeddings_are_a_model_of_their_own(source, tmp_path):
    path, _, fields = source
    whole, part = (load_model(path, architecture=fields, dim=dim) for dim in (None, 24))
    export_model(str(path), "huggingface", tmp_path / "part", architecture=fields, dim=24)
    expected = whole.encode_text(TEXTS)[:, :24].astype(np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    for model in (part, load_model(tmp_path / "part")):
        assert model.embed_dim == 24
        np.testing.assert_allclose(model.encode_text(TEXTS), expected, atol=1e-6)
    assert part.fingerprint() != whole.fingerprint()
    with pytest.raises(ValueError, match="dim=41; expected 1 to 40, the embeddings' size"):
        load_model(path, architecture=fields, dim=41)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"format": "tflite"}, "format 'tflite': expected one of clip, open_clip"),
        ({"ema": True}, "only work directories of diht_jax.train have steps"),
        ({"output": "."}, "is not an empty directory"),
        ({"output": "README.md/out"}, "README.md/out: nothing can be written to .*README.md; name"),
    ],
)
def test_wrong_requests(source, tmp_path, changed, message):
    arguments = {"format": "clip", "output": tmp_path / "out", **changed}
    format, output = arguments.pop("format"), arguments.pop("output")
    with pytest.raises(ValueError, match=message):
        export_model(str(source[0]), format, output, architecture=source[2], **arguments)
    assert not (tmp_path / "out").exists()
