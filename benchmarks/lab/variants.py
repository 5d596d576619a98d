"""Makers of the laboratory's data variants, by the pattern of a variant's name.

A maker gets the `Data` that provides its inputs, the folder to write, and the groups of the
pattern. This file may be long because it lists one maker after the other.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import io
import json
import pathlib
import shutil
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet

from benchmarks.distillation import write_pairs
from benchmarks.lab import clipart, concepts, second_web
from benchmarks.lab.experiments import AMOUNTS, SHOTS, STUDENTS, WEB_PAIRS
from benchmarks.lab.processes import run_command
from data_prep.labelling import embeddings
from data_prep.synthetic import captions, drawing, sampling, web
from data_prep.synthetic.scenes import COLORS, Scene, SceneObject
from data_prep.synthetic.shapes import SHAPES
from diht_jax.readers.registry import open_source
from diht_jax.records.catalog import find_shards
from diht_jax.records.dataset_info import STATS_SUFFIX
from diht_jax.records.formats import TFRecordWriter
from diht_jax.records.labels.shards import decode_features, decode_key
from diht_jax.records.samples import USUAL_KIND, with_captions
from diht_jax.records.schema import Record, decode_record, encode_record
from diht_jax.records.shard_files import read_records
from diht_jax.records.vocabulary import STATS_KEY, read_vocabulary, write_vocabulary
from diht_jax.storage.files import write_bytes

if TYPE_CHECKING:
    from benchmarks.lab.data import Data

NUM_SCENES = 2000  # in the retrieval task
UNSEEN = tuple(
    (shape, tuple(COLORS)[3 * number % len(COLORS)]) for number, shape in enumerate(SHAPES)
)
CLIPS = "clips"  # folder in a variant with a CLIP's embeddings of its records

_SHARD = "pairs-train-00000-of-00001.tfrecord"
_TEACHER_SCENES = 4000  # as in the demo
_TEST_SHOTS = 40  # test pictures per class for few-shot accuracy
_FILTERS = {"c": "complexity", "a": "action", "t": "text_spotting"}
_GATES = {"cat": "cat", "c_and_t": "ct", "only_c": "c", "only_a": "a", "only_t": "t"}
_CHANGES = {"double": 2.0, "half": 0.5}
_AMOUNT_SEED = 100  # plus a run's seed: none of these webs is the demo's
_DRAWN_SEED = 200  # plus a run's seed: different webs again
_PHOTO_SEED = 1  # plus a run's seed: no exchange equals that of `cifar10_wrong_*`
_VOTES = 10  # nearest neighbours


def _make_web(data: Data, folder: pathlib.Path, kind: str | None, change: str | None) -> None:
    noise = dict(web.DEFAULT_NOISE)
    if kind is not None:
        noise[kind] *= _CHANGES[change]
    run_command(
        "data_prep.synthetic",
        f"--output={folder}",
        f"--num_pairs={WEB_PAIRS}",
        f"--num_retrieval={NUM_SCENES if kind is None else 0}",
        f"--noise={','.join(f'{name}={share}' for name, share in noise.items())}",
    )


def _make_raw(data: Data, folder: pathlib.Path, of_web: str | None = None) -> None:
    _filter(data, folder, "convert", of_web or "web")


def _make_cat(data: Data, folder: pathlib.Path, of_web: str | None = None) -> None:
    _filter(data, folder, "cat", of_web or "web")


def _make_only(data: Data, folder: pathlib.Path, gate: str) -> None:
    others = [f"--config.{name}=False" for key, name in _FILTERS.items() if key != gate]
    _filter(data, folder, "cat", "web", *others)


def _filter(data: Data, folder: pathlib.Path, recipe: str, of_web: str, *flags: str) -> None:
    _run_filter(recipe, f"{data.make(of_web)}/train-*.tar", folder, *flags)


def _run_filter(recipe: str, pairs: str, folder: pathlib.Path, *flags: str) -> None:
    run_command(
        "data_prep.filter",
        f"--config=configs/prep/{recipe}.py",
        f"--config.input={pairs}",
        f"--config.output={folder}",
        *flags,
    )


def _make_of_web(data: Data, folder: pathlib.Path, kept: str, kind: str, change: str) -> None:
    {"raw": _make_raw, "cat": _make_cat}[kept](data, folder, f"web_{kind}_{change}")


def _make_random(data: Data, folder: pathlib.Path, seed: str) -> None:
    raw = read(data.make("raw"))
    size = len(read(data.make("cat")))
    chosen = np.random.default_rng(int(seed)).permutation(len(raw))[:size]
    write(folder, [raw[i] for i in sorted(chosen)])


def _make_clip_score(data: Data, folder: pathlib.Path, seed: str) -> None:
    _write_best(data, folder, f"{data.make('web')}/train-*.tar", "raw", "cat")


def _write_best(data: Data, folder: pathlib.Path, pairs: str, raw: str, kept: str) -> None:
    """Writes the pairs of `raw` with the best CLIP scores, the same number as `kept` has."""
    scored = folder / "scored"
    model = data.model_for(folder.name)
    _run_filter("convert", pairs, scored, f"--config.clip.model={model}")
    score_of_key: dict[str, float] = {}
    for path in sorted(glob.glob(f"{scored}/**/*.decisions.parquet", recursive=True)):
        table = pyarrow.parquet.read_table(path, columns=["key", "clip_score"]).to_pydict()
        score_of_key |= dict(zip(table["key"], table["clip_score"], strict=True))
    records = read(data.make(raw))
    size = len(read(data.make(kept)))
    scores = np.array([score_of_key[record.key] for record in records])
    write(folder, [records[i] for i in sorted(np.argsort(-scores, kind="stable")[:size])])
    shutil.rmtree(scored)


def _make_oracle(data: Data, folder: pathlib.Path) -> None:
    write(folder, [r for r in read(data.make("raw")) if r.metadata["noise"] == web.CLEAN])


def _make_second(data: Data, folder: pathlib.Path, size: str, arm: str, seed: str) -> None:
    """Makes a variant of a seed's second web; filters run alone, and arms intersect their pairs."""

    def name(of_arm: str) -> str:
        return f"second_{size}_{of_arm}_{seed}"

    if arm == "raw":
        write(folder, second_web.make_records(int(seed), int(size)))
        return
    if arm == "clip_score":
        _write_best(data, folder, str(data.make(name("raw"))), name("raw"), name("cat"))
        return
    if arm.startswith("only_"):
        _filter_by_one(folder, str(data.make(name("raw"))), arm[-1])
        return
    raw = read(data.make(name("raw")))
    if arm == "oracle":
        write(folder, [r for r in raw if r.metadata["noise"] in second_web.RIGHT])
    elif arm == "random":
        write(folder, _sample(raw, len(read(data.make(name("cat")))), int(seed)))
    else:
        gates = [data.make(name(f"only_{gate}")) for gate in _GATES[arm]]
        write(folder, _intersect(raw, gates))


def _filter_by_one(folder: pathlib.Path, pairs: str, gate: str) -> None:
    others = [f"--config.{key}=False" for letter, key in _FILTERS.items() if letter != gate]
    _run_filter("cat", pairs, folder, *others)


def _sample(records: Sequence[Record], size: int, seed: int) -> list[Record]:
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in sorted(order[:size])]


def _intersect(records: Sequence[Record], folders: Iterable[pathlib.Path]) -> list[Record]:
    """Returns the records with keys that occur in all of the folders."""
    kept = [{record.key for record in read(folder)} for folder in folders]
    return [record for record in records if all(record.key in keys for keys in kept)]


def _make_clipart(data: Data, folder: pathlib.Path) -> None:
    """Makes two tars: training drawings, and held-out drawings with a title that names them."""
    run_command("data_prep.examples", "clipart", f"--output={folder}")
    pairs = list(open_source(str(folder / "clipart.tar")))
    judgements = clipart.read_judgements()
    if set(clipart.choose_held_out(pairs)) != set(judgements):
        raise ValueError(f"{folder}/clipart.tar: not the drawings that were judged")
    right = [pair for pair in pairs if judgements.get(pair.key) == "names"]
    write_pairs(folder / "test.tar", ((pair, pair.caption) for pair in right))
    others = [pair for pair in pairs if pair.key not in judgements]
    write_pairs(folder / "train.tar", ((pair, pair.caption) for pair in others))


def _make_clipart_all(data: Data, folder: pathlib.Path, gate: str) -> None:
    """Makes all training pairs, or those that one filter keeps."""
    pairs = str(data.make("clipart") / "train.tar")
    if gate == "raw":
        _run_filter("convert", pairs, folder)
    else:
        _filter_by_one(folder, pairs, gate[-1])


def _make_clipart_arm(data: Data, folder: pathlib.Path, arm: str, seed: str) -> None:
    """Makes a seed's draw, or what an arm's filter keeps of it."""
    if arm == "clip_score":
        raw, own = f"clipart_raw_{seed}", f"clipart_own_title_{seed}"
        _write_best(data, folder, str(data.make(raw)), raw, own)
        return
    everything = read(data.make("clipart_all_raw"))
    drawn = clipart.draw(everything, int(seed))
    if arm == "raw":
        write(folder, drawn)
    elif arm == "own_title":
        own = clipart.has_own_title(everything)
        keys = {r.key for r, is_own in zip(everything, own, strict=True) if is_own}
        write(folder, [r for r in drawn if r.key in keys])
    elif arm == "random":
        write(folder, _sample(drawn, len(read(data.make(f"clipart_only_c_{seed}"))), int(seed)))
    else:
        gates = [data.make(f"clipart_all_only_{gate}") for gate in _GATES[arm]]
        write(folder, _intersect(drawn, gates))


def _make_amount(data: Data, folder: pathlib.Path, size: str, arm: str, seed: str) -> None:
    """Makes the first pairs of a seed's web, or those that CAT keeps of them."""
    if arm == "raw":
        _write_web(folder, _AMOUNT_SEED + int(seed), int(size))
    elif int(size) == max(AMOUNTS):
        _run_filter("cat", str(data.make(f"amount_{size}_raw_{seed}")), folder)
    else:
        kept = data.make(f"amount_{max(AMOUNTS)}_cat_{seed}")
        write(folder, _intersect(read(data.make(f"amount_{size}_raw_{seed}")), [kept]))


def _write_web(folder: pathlib.Path, seed: int, size: int) -> None:
    settings = web.Settings(seed=seed)
    made = (web.make_pair(settings, "train", index) for index in range(size))
    write(folder, [Record(p.key, p.image, p.caption, dict(p.metadata)) for p in made])


def _make_drawn(data: Data, folder: pathlib.Path, arm: str, seed: str) -> None:
    """Makes a seed's web, a selection of it, its teacher, or a change of CAT's selection."""

    def make(of_arm: str) -> str:
        return str(data.make(f"drawn_{of_arm}_{seed}"))

    if arm == "raw":
        _write_web(folder, _DRAWN_SEED + int(seed), WEB_PAIRS)
    elif arm == "cat":
        _run_filter("cat", make("raw"), folder)
    elif arm == "random":
        write(folder, _sample(read(make("raw")), len(read(make("cat"))), int(seed)))
    elif arm == "clip_score":
        _write_best(data, folder, make("raw"), f"drawn_raw_{seed}", f"drawn_cat_{seed}")
    elif arm == "teacher":
        _train_teacher(folder, make("raw"), f"--seed={_DRAWN_SEED + int(seed)}")
    elif arm == "labelled":
        _label_web(folder, make("cat"), make("teacher"))
    elif arm == "recaptioned":
        _make_recaptioned(data, folder, f"drawn_cat_{seed}")
    else:
        _make_unseen(data, folder, f"drawn_cat_{seed}")


def _make_teacher(data: Data, folder: pathlib.Path) -> None:
    _train_teacher(folder, f"{data.make('web')}/train-*.tar")


def _train_teacher(folder: pathlib.Path, pairs: str, *flags: str) -> None:
    run_command(
        "data_prep.synthetic.teacher",
        f"--input={pairs}",
        f"--output={folder}/teacher.npz",
        f"--num_scenes={_TEACHER_SCENES}",
        *flags,
    )


def _make_cat_labelled(data: Data, folder: pathlib.Path) -> None:
    _label_web(folder, data.make("cat"), data.make("teacher"))


def _label_web(
    folder: pathlib.Path, pairs: pathlib.Path | str, teacher: pathlib.Path | str
) -> None:
    run_command(
        "data_prep.label",
        "--config=configs/prep/concepts.py",
        f"--config.input={pairs}",
        f"--config.output={folder}",
        "--config.teacher.kind=precomputed",
        f"--config.teacher.precomputed.files={teacher}/teacher.npz",
    )


def _make_unseen(data: Data, folder: pathlib.Path, of_variant: str = "cat") -> None:
    write(folder, [r for r in read(data.make(of_variant)) if not _shows_unseen(r)])


def _shows_unseen(record: Record) -> bool:
    scenes = [record.metadata.get(name) for name in ("scene", "caption_scene")]
    kinds = {(o["shape"], o["color"]) for scene in scenes if scene for o in scene["objects"]}
    return bool(kinds & set(UNSEEN))


def _make_unseen_shots(data: Data, folder: pathlib.Path) -> None:
    # A fifth of the training pictures is held out for choosing the settings.
    for split, per_class in (("train", max(SHOTS) * 5 // 4), ("test", _TEST_SHOTS)):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for index in range(per_class * len(UNSEEN)):
                shape, color = UNSEEN[index % len(UNSEEN)]
                rng = np.random.default_rng([len(split), index])
                scene = sampling.sample_single(rng, shape, color)
                picture = io.BytesIO()
                drawing.render_scene(rng, scene, web.Settings().image_size).save(picture, "PNG")
                label = {"label": index % len(UNSEEN), "class_name": f"{color} {shape}"}
                caption = captions.describe_scene(rng, scene, complete=True)
                for ending, content in (
                    ("png", picture.getvalue()),
                    ("txt", caption.encode()),
                    ("json", json.dumps(label).encode()),
                ):
                    member = tarfile.TarInfo(f"{split}-{index:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _make_recaptioned(data: Data, folder: pathlib.Path, variant: str) -> None:
    """Adds four captions of the scene to each record of a variant that shows a scene."""
    changed = []
    for index, record in enumerate(read(data.make(variant))):
        kind_of = {record.caption: USUAL_KIND}
        for text in _describe(record.metadata, 4, index):
            kind_of.setdefault(text, "synthetic")
        changed.append(with_captions(record, kind_of))
    write(folder, changed)


def _make_long(data: Data, folder: pathlib.Path, variant: str) -> None:
    """Appends three sentences about the picture to each caption of a variant."""
    records = enumerate(read(data.make(variant)))
    texts = ((r, [r.caption, *_describe(r.metadata, 3, index)]) for index, r in records)
    write(folder, [dataclasses.replace(record, caption=_join(each)) for record, each in texts])


def _make_long_scenes(data: Data, folder: pathlib.Path) -> None:
    """Makes the held-out scenes with four sentences each, which may be incomplete."""
    pairs = enumerate(open_source(str(data.make("web") / "val_retrieval.tar")))
    texts = ((pair, _join(_describe(pair.metadata, 4, index))) for index, pair in pairs)
    write_pairs(folder / "val_retrieval.tar", texts)


def _describe(metadata: Mapping[str, Any], count: int, index: int) -> list[str]:
    """Returns sentences about the scene that a picture shows; none if it shows no scene."""
    shown = metadata.get("scene")
    if not shown:
        return []
    looks = [{k: v for k, v in o.items() if k != "box"} for o in shown["objects"]]
    scene = Scene(shown["relation"], tuple(SceneObject(**look) for look in looks))
    rng = np.random.default_rng([count, index])
    return [captions.describe_scene(rng, scene) for _ in range(count)]


def _join(sentences: Sequence[str]) -> str:
    return ". ".join(sentence.rstrip(".") for sentence in sentences)


def _make_rewritten(data: Data, folder: pathlib.Path, seed: str) -> None:
    run_command(
        "diht_jax.caption",
        f"--model={data.model_for(folder.name)}",
        f"--input={data.make('raw')}",
        f"--output={folder}",
    )


def _make_emoji(data: Data, folder: pathlib.Path) -> None:
    run_command(
        "data_prep.filter",
        "--config=configs/prep/convert.py",
        f"--config.input={data.shared / 'emoji_google.tar'}",
        f"--config.output={folder}",
    )


def _make_emoji_shuffled(data: Data, folder: pathlib.Path, share: str, seed: str) -> None:
    records = read(data.make("emoji"))
    texts = exchange([r.caption for r in records], int(share) / 100, int(seed))
    changed = zip(records, texts, strict=True)
    write(folder, [dataclasses.replace(r, caption=text, metadata={}) for r, text in changed])


def _make_openmoji(data: Data, folder: pathlib.Path) -> None:
    run_command("data_prep.examples", "openmoji", f"--output={folder}")


def _make_concepts(data: Data, folder: pathlib.Path, seed: str) -> None:
    """Makes three tars: Noto for training, OpenMoji for validation, and Twemoji for the test."""
    captions_of = concepts.choose_concepts(open_source(str(data.shared / "emoji_google.tar")))
    found = concepts.split([*captions_of.values()], int(seed))
    for name, source, texts in (
        ("train", data.shared / "emoji_google.tar", found.train),
        ("validation", data.make("openmoji") / "openmoji.tar", found.validation),
        ("test", data.shared / "emoji_twitter.tar", found.test),
    ):
        wanted, chosen = set(texts), {}
        for pair in open_source(str(source)):
            text = captions_of.get(concepts.code_points(pair.key))
            if text in wanted:
                chosen[text] = pair, text
        write_pairs(folder / f"{name}.tar", chosen.values())


def _make_concepts_train(data: Data, folder: pathlib.Path, seed: str) -> None:
    _run_filter("convert", str(data.make(f"concepts_{seed}") / "train.tar"), folder)


def _make_photos(data: Data, folder: pathlib.Path, share: str, seed: int = 0) -> None:
    pairs = list(open_source(str(data.shared / "cifar10_train.tar")))
    texts = exchange([pair.caption for pair in pairs], int(share) / 100, seed)
    tar = folder.with_name(f"{folder.name}.tar")
    write_pairs(tar, zip(pairs, texts, strict=True))
    run_command(
        "data_prep.filter",
        "--config=configs/prep/convert.py",
        "--config.concepts=True",
        f"--config.input={tar}",
        f"--config.output={folder}",
    )
    tar.unlink()


def _make_photo_labels(data: Data, folder: pathlib.Path, share: str, labels: str) -> None:
    if labels == "shuffled":
        shuffle_labels(data.make(f"cifar10_wrong_{share}_teacher"), folder)
        return
    builder = "build" if labels == "random" else None
    _label_photos(folder, data.make(f"cifar10_wrong_{share}"), builder)


def _label_photos(
    folder: pathlib.Path, photos: pathlib.Path | str, random_builder: str | None = None
) -> None:
    """Adds labels of EfficientNet-Lite0, or of a `random_teacher` function, to the records."""
    function = f"--config.teacher.torch.function=benchmarks.lab.random_teacher:{random_builder}"
    run_command(
        "data_prep.label",
        "--config=configs/prep/concepts_efficientnet.py",
        f"--config.input={photos}",
        f"--config.output={folder}",
        "--config.merge=True",
        *([function] if random_builder else []),
    )


def _make_drawn_photos(data: Data, folder: pathlib.Path, share: str, arm: str, seed: str) -> None:
    """Makes photos with a seed's exchange of captions, and with labels or captions of an arm."""
    if arm == "given":
        _make_photos(data, folder, share, _PHOTO_SEED + int(seed))
        return
    given = data.make(f"photos_{share}_given_{seed}")
    if arm != "neighbours":
        _label_photos(folder, given, f"build_{seed}" if arm == "random" else None)
        return
    labelled = data.make(f"photos_{share}_teacher_{seed}")
    keys, vectors = read_teacher_embeddings(labelled)
    of_key = {record.key: record for record in read(given)}
    records = [of_key[key] for key in keys]
    changed = zip(records, vote(vectors, [r.caption for r in records]), strict=True)
    write(folder, [dataclasses.replace(r, caption=text, metadata={}) for r, text in changed])


def read_teacher_embeddings(labelled: pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Reads the keys and the teacher's embeddings, float32 [n, d], that `data_prep.label` kept."""
    keys, found = [], []
    for path in sorted((labelled / embeddings.FOLDER).glob("*.tfrecord")):
        for data in read_records(path):
            features = decode_features(data)
            keys.append(decode_key(features["key"]))
            found.append(np.frombuffer(features["embedding_float16"], "<f2").astype(np.float32))
    return keys, np.stack(found)


def vote(vectors: np.ndarray, texts: Sequence[str]) -> list[str]:
    """Returns the most frequent text of each row's nearest rows by cosine; ties go to the nearest.

    A row's own text has no vote.
    """
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :_VOTES]
    counts = (collections.Counter(texts[i] for i in row) for row in nearest)
    return [found.most_common(1)[0][0] for found in counts]


def shuffle_labels(labelled: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the records with their labels permuted among the records."""
    records = read(labelled)
    order = np.random.default_rng(0).permutation(len(records))
    names = ("object_ids", "object_probs", "attribute_ids", "attribute_probs")
    write(
        folder,
        [
            dataclasses.replace(record, **{name: getattr(records[i], name) for name in names})
            for record, i in zip(records, order, strict=True)
        ],
    )
    vocabulary = read_vocabulary(labelled)
    write_vocabulary(folder, vocabulary)
    # The part of the statistics of `data_prep.label` that training reads.
    text = json.dumps({"counts": {STATS_KEY: vocabulary.describe()}})
    write_bytes(folder / f"{_SHARD}{STATS_SUFFIX}", text.encode())


def _make_clips(data: Data, folder: pathlib.Path, variant: str) -> None:
    family = variant.partition("_")[0]
    write(folder, read(data.make(variant)))
    crop_scale = STUDENTS[family].config["data.crop_scale"]
    run_command(
        "data_prep.label",
        "--config=configs/prep/concepts.py",
        "--config.concepts=False",
        f"--config.clip_teachers.models={data.model_for(folder.name)}",
        "--config.clip_teachers.crops=4",
        f"--config.clip_teachers.crop_scale={crop_scale}",
        f"--config.input={folder}",
        f"--config.output={folder / CLIPS}",
    )


def _make_emoji_labelled(data: Data, folder: pathlib.Path) -> None:
    """Labels the emoji with the teacher of the photos."""
    kept = folder / "kept"
    run_command(
        "data_prep.filter",
        "--config=configs/prep/convert.py",
        "--config.concepts=True",
        f"--config.input={data.shared / 'emoji_google.tar'}",
        f"--config.output={kept}",
    )
    run_command(
        "data_prep.label",
        "--config=configs/prep/concepts_efficientnet.py",
        f"--config.input={kept}",
        f"--config.output={folder}",
        "--config.merge=True",
    )


def exchange(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """Permutes a share of the texts; each of these positions gets a different text."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(texts))[: round(share * len(texts))]
    given = rng.permutation(chosen)
    while True:
        unchanged = [i for i in range(len(chosen)) if texts[chosen[i]] == texts[given[i]]]
        if not unchanged:
            break
        for i in unchanged:
            j = rng.integers(len(chosen))
            given[i], given[j] = given[j], given[i]
    changed = list(texts)
    for target, origin in zip(chosen, given, strict=True):
        changed[target] = texts[origin]
    return changed


def read(folder: pathlib.Path | str) -> list[Record]:
    """Reads the records of a variant."""
    return [decode_record(each) for shard in find_shards(folder) for each in read_records(shard)]


def write(folder: pathlib.Path, records: Iterable[Record]) -> None:
    """Writes records as the single shard of a variant."""
    with TFRecordWriter(folder / _SHARD) as writer:
        for record in records:
            writer.write(encode_record(record))


_KIND = "|".join(web.NOISE_KINDS)
MAKERS: dict[str, Callable] = {
    rf"web(?:_({_KIND})_(double|half))?": _make_web,
    "raw": _make_raw,
    "cat": _make_cat,
    "only_([cat])": _make_only,
    r"random_(\d+)": _make_random,
    r"clip_score_(\d+)": _make_clip_score,
    "oracle": _make_oracle,
    rf"(raw|cat)_of_({_KIND})_(double|half)": _make_of_web,
    "teacher": _make_teacher,
    "cat_labelled": _make_cat_labelled,
    r"second_(\d+)_(raw|random|only_[cat]|c_and_t|cat|clip_score|oracle)_(\d+)": _make_second,
    "clipart": _make_clipart,
    "clipart_all_(raw|only_[cat])": _make_clipart_all,
    r"clipart_(raw|own_title|random|only_[cat]|c_and_t|cat|clip_score)_(\d+)": _make_clipart_arm,
    r"amount_(\d+)_(raw|cat)_(\d+)": _make_amount,
    r"drawn_(raw|cat|random|clip_score|teacher|labelled|recaptioned|unseen)_(\d+)": _make_drawn,
    "openmoji": _make_openmoji,
    r"concepts_(\d+)": _make_concepts,
    r"concepts_train_(\d+)": _make_concepts_train,
    "unseen": _make_unseen,
    "unseen_shots": _make_unseen_shots,
    "(raw|cat)_recaptioned": _make_recaptioned,
    "(cat)_long": _make_long,
    "long_scenes": _make_long_scenes,
    r"raw_rewritten_(\d+)": _make_rewritten,
    "emoji": _make_emoji,
    r"emoji_shuffled_(\d+)_(\d+)": _make_emoji_shuffled,
    r"(emoji_shuffled_\d+_\d+|cifar10_wrong_\d+)_clips": _make_clips,
    "(cifar10_wrong_50)_own_clips": _make_clips,
    "emoji_labelled": _make_emoji_labelled,
    r"photos_(\d+)_(given|teacher|random|neighbours)_(\d+)": _make_drawn_photos,
    r"cifar10_wrong_(\d+)": _make_photos,
    r"cifar10_wrong_(\d+)_(teacher|random|shuffled)": _make_photo_labels,
}
