"""A model's own tokenizer files give the token ids of transformers and open_clip."""

import io
import json
import pathlib
import pickle
import shutil
import unicodedata

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from data_prep.steps.base import Candidate
from data_prep.steps.scores import SCORE, ClipStep
from data_prep.teachers import clip
from diht_jax import load_model
from diht_jax.data import tokenizer
from diht_jax.export import export_model
from diht_jax.models.zoo import get_architecture
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair, Record
from diht_jax.training.loop import train
from diht_jax.training.workdir.saved_run import keep_tokenizer, open_tokenizer
from diht_jax.weights.export import write_model
from diht_jax.weights.source import choose_files, read_weights
from diht_jax.weights.tokenizer_file import copy_tokenizer, read_cleaning, read_tokenizer
from tests import make
from tests.data_prep.filtering.jobs import job_config
from tests.weights import conftest as reference

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

LENGTH = 16
PADDED = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
TEXT = """
a the photo of red CAT dogs riding İstanbul Straße über naïve façade don't it's U.S. snake_case
5,000 #1 (left) [right] {both} "quoted" «so» – — … C++ e-mail me@x.org half-time 3/4 50% Ⅻ ﬁne ① ㎏
Собака бежит по снегу ΟΔΥΣΣΕΥΣ γάτα στο σπίτι 狗在雪地里跑 一只红色的猫 犬が走る ネコ ｶﾀｶﾅ 고양이가
كلب يركض קטן कुत्ता दौड़ता है ประเทศไทย con chó Đà Nẵng 🐈 👩‍👩‍👧 🇮🇹 ☃ e\u0301 \u200b \ufeff
â€™ &amp; &lt;b&gt; &amp;eacute; ▁ </s> <unk> <s> <pad> <eos> <bos>
"""
WORDS = TEXT.split()


def make_captions(count):
    """Returns words of several languages, joined by various white space and punctuation."""
    rng = np.random.default_rng(7)
    gaps = [" ", " ", " ", " ", ", ", "  ", "\t", "\n", "\u3000", "\xa0", "", "."]
    captions = ["", " ", ".", "▁", "x" * 500, "</s>", "a </s>", "</s> a", "\u0130\u0130"]
    while len(captions) < count:
        words = rng.choice(WORDS, rng.integers(1, 12))
        joined = "".join(w + gaps[rng.integers(len(gaps))] for w in words)
        drawn = "".join(map(chr, rng.integers(0x20, 0x2FFF, rng.integers(0, 4))))
        captions.append(joined + drawn if rng.random() < 0.9 else drawn + joined)
    return captions


@pytest.fixture(scope="module")
def captions():
    return make_captions(3000)


def train_unigram(**options):
    """Returns a sentencepiece vocabulary as bytes; the texts have no markers or odd characters."""
    plain = [word for word in WORDS if not word.startswith(("<", "&", "▁", "\u200b", "\ufeff"))]
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(plain, 6)).lower() for _ in range(400)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        vocab_size=330,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return written.getvalue()


SIGLIP_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def pieces_of(vocabulary, first=0):
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(vocabulary)
    ids = range(first, processor.get_piece_size())
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in ids]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    (folder / "spiece.model").write_bytes(train_unigram(**SIGLIP_IDS))
    transformers.SiglipTokenizer(str(folder / "spiece.model")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_of_open_clip(tmp_path_factory):
    """The same vocabulary as a T5 tokenizer in one file, as in open_clip's repositories."""
    folder = tmp_path_factory.mktemp("siglip_of_open_clip")
    pieces = pieces_of(train_unigram(**SIGLIP_IDS))
    made = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, pad_token="</s>")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory):
    """Gemma's tokenizer with a small vocabulary: BPE without a leading space, byte fallback."""
    folder = tmp_path_factory.mktemp("siglip2")
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=200,
        show_progress=False,
    )
    made.train_from_iterator([word.lower() for word in WORDS], trainer)
    bpe = json.loads(made.to_str())["model"]
    transformers.Siglip2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def xlm(tmp_path_factory):
    """XLM-R's tokenizer; XLM-V's is one with more entries."""
    folder = tmp_path_factory.mktemp("xlm")
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab = [*special, *pieces_of(train_unigram(), first=3), ("<mask>", 0.0)]
    transformers.XLMRobertaTokenizer(vocab=vocab).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "xlm"])
def test_ids_are_those_of_transformers(kind, captions, request):
    folder = request.getfixturevalue(kind)
    other = transformers.AutoTokenizer.from_pretrained(folder)
    expected = other(captions, **PADDED, return_tensors="np").input_ids
    found = read_tokenizer(folder).tokenize(captions, LENGTH)
    wrong = np.flatnonzero((found != expected).any(axis=1))
    assert not len(wrong), (len(wrong), captions[wrong[0]], found[wrong[0]], expected[wrong[0]])
    assert len(np.unique(found)) > 150  # much of the vocabulary is used


@pytest.mark.parametrize(
    "kind, options",
    [
        ("siglip_of_open_clip", {"clean": "canonicalize"}),
        ("siglip2", {"clean": "canonicalize"}),
        ("xlm", {}),
        ("xlm", {"clean": "lower"}),
    ],
)
def test_ids_are_those_of_open_clip(kind, options, captions, request):
    open_clip = pytest.importorskip("open_clip")
    folder = request.getfixturevalue(kind)
    other = open_clip.tokenizer.HFTokenizer(str(folder), context_length=LENGTH, **options)
    text = {"hf_tokenizer_name": "someone/else", "tokenizer_kwargs": options}
    clean = read_cleaning(text, "open_clip_config.json")
    found = read_tokenizer(folder, clean).tokenize(captions, LENGTH)
    np.testing.assert_array_equal(found, other(captions).numpy())


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "xlm"])
def test_a_copy_and_a_worker_give_the_same_ids(kind, request, tmp_path):
    made = read_tokenizer(request.getfixturevalue(kind))
    copy_tokenizer(made, str(tmp_path / "copy"))
    captions = make_captions(50)
    expected = made.tokenize(captions, LENGTH)
    for other in (read_tokenizer(tmp_path / "copy"), pickle.loads(pickle.dumps(made))):
        assert other.describe() == made.describe()
        np.testing.assert_array_equal(other.tokenize(captions, LENGTH), expected)


def test_a_damaged_copy_is_refused(siglip, tmp_path):
    copy_tokenizer(read_tokenizer(siglip), str(tmp_path))
    path, model = tmp_path / "tokenizer_settings.json", tmp_path / "spiece.model"
    whole = model.read_bytes()
    model.write_bytes(whole.replace(b"a", b"b", 1))
    with pytest.raises(ValueError, match=r"spiece\.model: damaged"):
        read_tokenizer(tmp_path)
    model.write_bytes(whole)
    path.write_text(path.read_text().replace('"lower_case": true', '"lower_case": false'))
    with pytest.raises(ValueError, match=r"tokenizer_settings\.json: damaged"):
        read_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def model(siglip, tmp_path_factory):
    """A SiglipModel, and its folder with tokenizer and image processor."""
    made, folder = reference.siglip_model(layers=1), tmp_path_factory.mktemp("model") / "model"
    made.save_pretrained(folder)
    pictures = {"size": {"height": 24, "width": 24}, "resample": 2}
    transformers.SiglipImageProcessorPil(**pictures).save_pretrained(folder)
    for path in siglip.iterdir():
        shutil.copy(path, folder)
    return made, folder


@pytest.fixture(scope="module")
def inputs():
    return make_captions(13)[5:], [make.noise(i, (20 + i, 31), cell=4) for i in range(4)]


def test_a_run_keeps_the_tokenizer_and_the_pictures_of_its_start(model, inputs, tmp_path):
    texts, pictures = inputs
    source = shutil.copytree(model[1], tmp_path / "source")
    # A crop of the whole area is the whole image only if its aspect ratio is allowed.
    squares = [picture.resize((30, 30)) for picture in pictures]
    records = [make.record(i, image=make.encoded(p)) for i, p in enumerate(squares)]
    config = make.tiny_config(
        data__train=str(make.write_records(tmp_path / "records", records)),
        data__batch_size=4,
        data__crop_scale=(1.0, 1.0),
        data__fast_decode=False,
        model__init_from=str(source),
        loss__kind="sigmoid",
        optimizer__learning_rate=0.0,
        total_steps=1,
    )
    for field in config.model.overrides:
        config.model.overrides[field] = None
    train(config, tmp_path / "run", devices=jax.devices()[:1], set_keys=("data.train",))
    shutil.rmtree(source)
    run, expected = load_model(tmp_path / "run"), load_model(model[1])
    np.testing.assert_array_equal(run.tokenize(texts), expected.tokenize(texts))
    np.testing.assert_allclose(run.encode_text(texts), expected.encode_text(texts), atol=1e-6)
    assert run.preprocessing == expected.preprocessing
    np.testing.assert_allclose(
        run.encode_image(pictures), expected.encode_image(pictures), atol=1e-6
    )
    text_emb = expected.encode_text([record.caption for record in records]).astype(np.float64)
    logits = expected.logit_scale * expected.encode_image(squares) @ text_emb.T
    signs = 2 * np.eye(4) - 1
    loss = np.log1p(np.exp(-signs * (logits + expected.logit_bias))).sum() / 4
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(loss, abs=1e-4)


def test_a_run_in_a_store_keeps_its_tokenizer(siglip2, tmp_path):
    config = make.tiny_config(model__tokenizer=str(siglip2), model__text_cleaning="canonicalize")
    url = f"memory://runs/{tmp_path.name}"
    keep_tokenizer(open_tokenizer(config, url), url)
    config.model.tokenizer = "gone"
    found = open_tokenizer(config, url)
    expected = read_tokenizer(siglip2, "canonicalize")
    assert found.describe() == expected.describe()
    texts = make_captions(50)
    np.testing.assert_array_equal(found.tokenize(texts, LENGTH), expected.tokenize(texts, LENGTH))


def test_transformers_reads_the_tokenizer_of_an_export(model, inputs, tmp_path):
    export_model(str(model[1]), "huggingface", str(tmp_path / "out"))
    found = load_model(tmp_path / "out").tokenize(inputs[0])
    np.testing.assert_array_equal(found, load_model(model[1]).tokenize(inputs[0]))
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(found, other(inputs[0], **PADDED).input_ids)


def write_drawn(folder, format, made, vocab_size):
    overrides = {"vocab_size": vocab_size, "context_length": LENGTH}
    config = make.tiny_config()
    arch = get_architecture("tiny_32px", config.model.overrides.to_dict() | overrides)
    write_model(folder, format, make.drawn_model(arch, tokenizer=made), card="")


@pytest.mark.parametrize("format", ["huggingface", "safetensors"])
def test_another_tokenizer_with_a_vocabulary_of_clips_size_comes_back(xlm, format, tmp_path):
    made = read_tokenizer(xlm, "canonicalize")
    write_drawn(tmp_path / "out", format, made, tokenizer.VOCAB_SIZE)
    (tmp_path / "hub").mkdir()
    for name in choose_files([path.name for path in (tmp_path / "out").iterdir()]):
        shutil.copy(tmp_path / "out" / name, tmp_path / "hub")
    for folder in ("out", "hub"):
        found = read_weights(tmp_path / folder).tokenizer
        assert found is not None and found.describe() == made.describe()


def test_open_clip_reads_the_tokenizer_of_an_export(xlm, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path / "out"
    write_drawn(folder, "open_clip", read_tokenizer(xlm, "canonicalize"), 400)
    captions = make_captions(300)
    expected = open_clip.get_tokenizer(f"local-dir:{folder}")(captions).numpy()
    np.testing.assert_array_equal(load_model(folder).tokenize(captions), expected)


def test_pe_core_has_the_tokenizer_of_clip(captions):
    open_clip = pytest.importorskip("open_clip")
    # `tokenizers` has the characters of an older Unicode version than open_clip.
    texts = ["".join(c for c in t if unicodedata.category(c) != "Cn") for t in captions]
    expected = open_clip.get_tokenizer("PE-Core-B-16")(texts).numpy()
    np.testing.assert_array_equal(tokenizer.tokenize(texts, 32), expected)


def test_data_preparation_embeds_as_transformers(model, inputs):
    """The filter's CLIP score, and the teacher's embeddings that labels store."""
    import torch

    other, folder = model
    texts, pictures = inputs[0][:4], inputs[1]
    ids = transformers.AutoTokenizer.from_pretrained(folder)(texts, **PADDED, return_tensors="pt")
    own = transformers.SiglipImageProcessorPil.from_pretrained(folder)
    pixels = own(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = other(input_ids=ids.input_ids, pixel_values=pixels)
    image_emb, text_emb = expected.image_embeds.numpy(), expected.text_embeds.numpy()
    images = [make.encoded(picture) for picture in pictures]
    config = job_config("a.tar", pathlib.Path("out"), clip__model=str(folder), clip__batch_size=3)
    step = ClipStep(config, SourceShard("webdataset", "a.tar"))
    pairs = [Pair(str(i), *pair) for i, pair in enumerate(zip(images, texts, strict=True))]
    scores = step.measure([Candidate.of(pair) for pair in pairs])[SCORE]
    np.testing.assert_allclose(scores, (image_emb * text_emb).sum(axis=1), atol=1e-5)
    section = clip.default_config()
    section.update(models=str(folder), crops=0, dtype="float32")
    records = [Record(*pair) for pair in zip("0123", images, texts, strict=True)]
    found = np.stack([row for batch in clip.ClipTeachers(section).embed(records) for row in batch])
    np.testing.assert_allclose(found[:, 0], image_emb, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], text_emb, atol=1e-5)
