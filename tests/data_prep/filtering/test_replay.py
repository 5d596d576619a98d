"""A replay decides like the filter itself, or reports that the decision is not known."""

import collections
import io
import itertools
import json

import duckdb
import numpy as np
import pyarrow.parquet
import pytest

from data_prep.captions.graph import cat_reason
from data_prep.decisions import table
from data_prep.filter import run_filter
from data_prep.filtering import replay
from data_prep.steps import cat, models
from data_prep.steps.base import Candidate, Columns
from data_prep.text_spotting.match import caption_matches
from data_prep.text_spotting.readings import Lines, find_match
from data_prep.text_spotting.settings import Settings
from data_prep.text_spotting.spotter import Spot, Verdict
from diht_jax.input.transforms import decode_rgb
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from tests import make
from tests.data_prep.filtering.jobs import job_config, read_outcomes, read_records
from tests.docs.pages import REPOSITORY, python_blocks

# Captions of each pair; if there are several, the text file has the first one.
_CAPTIONS = [
    ["a black cat is chasing a small brown bird"],
    ["a dog runs"],
    ["a red car"],
    ["sunset"],
    ["IMG_1234.jpg"],
    [""],
    ["blue sky over the green hills"],
    ["sunset", "a dog runs", "a black cat is chasing a small brown bird"],
    ["http://a.b/c", "a small brown bird is singing a sad old song"],
    ["a red car", "a dog runs"],
    ["a woman in a long red dress is holding a very large black umbrella"],
]
_SIZES = [(40, 20), (8, 60), (64, 64), (30, 200)]


_STRICT = {"min_complexity": 2, "image__min_side": 25}
_WITHOUT_C_AND_A = {"complexity": False, "action": False}
_SMALL = {"image__max_pixels": 2000}
_UNSURE = {"spotter__min_confidence": 0.6}
_SCORED = {"clip__model": "clipart_tiny"}
_ALIKE = {**_SCORED, "clip__min_score": 0.05}


def _text_of(image: bytes) -> str:
    """Returns the text that the test's spotter reads, chosen by the red value of the picture."""
    red = decode_rgb(image).getpixel((0, 0))[0]
    return ["", "dog runs", "black cat is ch", "umbrella"][red // 60 % 4]


class _Spotter:
    """Spots the text of `_text_of` with confidence 0.5, and matches like the real spotter."""

    def __init__(self, config, *_):
        names = ("min_confidence", "min_chars", "misread_min_chars", "weigh_words")
        self.settings = Settings(**{name: config[name] for name in names})

    def judge(self, images, captions):
        verdicts = []
        for image, several in zip(images, captions, strict=True):
            found = _text_of(image)
            sure = found and self.settings.min_confidence <= 0.5
            matches = [found if sure and self._matches(found, one) else None for one in several]
            spots = (Spot((0.0, 1.0, 0.0, 1.0), found, 0.5),) if found else ()
            verdicts.append(Verdict(tuple(matches), "read", spots=spots))
        return verdicts

    def _matches(self, found, caption):
        s = self.settings
        return caption_matches([found], caption, s.min_chars, weigh_words=s.weigh_words)


class _Encoder:
    """Scores a caption by its length, from 0 to 0.9."""

    def __init__(self, *_):
        pass

    def embed_images(self, images):
        return [np.array([1.0, 0.0])] * len(images)

    def embed_texts(self, texts):
        return [np.array([len(text) % 10 / 10, 0.0]) for text in texts]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """An input of 132 pairs in three tars, and functions that configure and filter it."""
    folder = tmp_path_factory.mktemp("replay")
    rng = np.random.default_rng(0)
    for number in range(3):
        members = {}
        for i in range(44):
            captions = _CAPTIONS[rng.integers(len(_CAPTIONS))]
            color = (int(rng.integers(4)) * 60 + 10, 0, 0)
            data = make.encoded(make.plain(color, _SIZES[rng.integers(4)]))
            image = data[:-20] if rng.random() < 0.1 else data
            uid = f"{rng.integers(2**62):032x}"
            metadata = {"captions": captions, "uid": uid} if len(captions) > 1 else {"uid": uid}
            key = f"{number}-{i:02d}"
            members |= make.pair_members(key, captions[0], image)
            members[f"{key}.json"] = json.dumps(metadata).encode()
        make.write_tar(folder / "in" / f"{number}.tar", members)
    made: dict = {}

    def config(name="unused", **changes):
        settings = {
            "text_spotting": True,
            "spotter__weigh_words": False,
            "batch_size": 16,
        } | changes
        return job_config(str(folder / "in" / "*.tar"), folder / name, "cat", **settings)

    def filtered(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = folder / f"out{len(made)}"
            assert run_filter(config(made[key].name, **changes)) == {}
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cat, "open_spotter", _Spotter)
        patch.setattr(cat, "resolve_for_networks", lambda settings: settings)
        patch.setattr(models, "Encoder", _Encoder)
        yield filtered, config, folder


def _decide_all(found: replay.Replay) -> list[tuple[str, str | None]]:
    return [
        outcome
        for path in found.paths
        for rows in table.read_decisions(path)
        for outcome in found.decide(rows)
    ]


@pytest.mark.parametrize(
    ("before", "now", "not_known"),
    [
        ({}, {}, 0),
        # In some pairs the picture shows one caption, and the stricter limit now drops another one.
        ({}, _STRICT, 4),
        (_STRICT, {}, 42),
        (_WITHOUT_C_AND_A, _STRICT, 4),
        ({}, _SMALL, 0),
        (_SMALL, {}, 36),
        ({}, {"spotter__min_chars": 8}, 10),
        (_UNSURE, {}, 65),
        ({}, {"spotter__gate_size": 100}, 65),
        # With another score limit, other captions of a pair reach text-spotting.
        (_ALIKE, _SCORED, 19),
        (_SCORED, _ALIKE, 8),
    ],
)
def test_a_replay_decides_as_the_filter_does(work, before, now, not_known):
    filtered, config, _ = work
    replayed = _decide_all(replay.Replay(str(filtered(**before)), config(**now)))
    if now.get("spotter__gate_size"):
        now = {}  # this spotter has no gate
    truth = [(stage, reason) for _, stage, reason in read_outcomes(filtered(**now))]
    assert len(replayed) == len(truth) == 132
    for mine, theirs in zip(replayed, truth, strict=True):
        # The filter did not measure undecodable pictures, which may also be too large.
        if mine != ("image", "unreadable") or theirs != ("image", "too_large"):
            assert mine == theirs or mine[0] == "not known"
    assert sum(stage == "not known" for stage, _ in replayed) == not_known


def test_the_lists_are_those_of_the_filter(work):
    filtered, config, folder = work
    finished, other = filtered(), filtered(**_SMALL)
    result = replay.Replay(str(finished), config(**_SMALL)).run(str(folder / "lists"))
    truth = json.loads((other / "stats.json").read_text())["counts"]
    assert result.funnel.kept == truth["kept"] and result.funnel.read == 132
    assert {stage: sum(found.values()) for stage, found in result.funnel.dropped().items()} == {
        stage: sum(found.values()) for stage, found in truth["dropped"].items()
    }
    for name in ("kept_keys.txt", "kept_uids.npy"):
        assert (folder / "lists" / name).read_bytes() == (other / name).read_bytes()
    lines = (folder / "lists" / "dropped.tsv").read_text().splitlines()
    assert [line.rpartition("/")[0] for line in lines] == [
        f"{key}\t{stage}" for key, stage, reason in read_outcomes(other) if reason
    ]
    assert (folder / "lists" / "not_known.txt").read_text() == ""
    # Without a config the lists equal the folder's, also if the parts are the output.
    for done in (finished, filtered(examples_per_shard=None)):
        replay.Replay(str(done), None).run(str(folder / "lists"))
        for name in ("kept_keys.txt", "kept_uids.npy"):
            assert (folder / "lists" / name).read_bytes() == (done / name).read_bytes()


def test_a_line_of_a_list_is_one_pair_whatever_its_key_holds():
    keys = pyarrow.array(["a\tb", "c\nd", "e\u2028f\tg", "h"])
    rows, column = io.BytesIO(), io.BytesIO()
    table.write_lines(rows, keys, pyarrow.array(["x/1", "x/2", "x/3", "x/4"]))
    table.write_lines(column, keys)
    assert rows.getvalue() == b"a b\tx/1\nc d\tx/2\ne f g\tx/3\nh\tx/4\n"
    assert column.getvalue() == b"a\tb\nc d\ne f\tg\nh\n"


def test_folders_that_cannot_be_replayed(work, tmp_path):
    filtered, config, _ = work
    with pytest.raises(ValueError, match=r"--replay='.*': no finished folder"):
        replay.Replay(str(tmp_path))
    (tmp_path / "stats.json").write_text('{"counts": {"read": 3}}')
    with pytest.raises(ValueError, match=f"{tmp_path}/stats.json: "):
        replay.Replay(str(tmp_path))
    finished = filtered()
    with pytest.raises(ValueError, match=rf"--lists='{finished}': a filter has written"):
        replay.Replay(str(finished)).run(str(finished))
    copied = (finished / "stats.json", finished / "parts" / "manifest.json")
    for path in (*copied, *(finished / "parts").glob("*.decisions.parquet")):
        target = tmp_path / path.relative_to(finished)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    next((tmp_path / "parts").glob("*.decisions.parquet")).unlink()
    with pytest.raises(ValueError, match=r"2 files of decisions hold 88 pairs, .* has read 132"):
        replay.Replay(str(tmp_path)).run()


@pytest.mark.parametrize(
    ("before", "now", "is_unknown"), [(0.1, 0.5, False), (0.1, 0.7, True), (0.7, 0.1, True)]
)
def test_a_line_that_speaks_against_a_match_may_count_no_longer(before, now, is_unknown):
    boxes = [(0.0, 100.0, top, top + 20.0) for top in (0.0, 200.0)]
    look = Lines(boxes, [("zebra", 0.9), ("unrelated words", 0.6)])
    configs = [job_config("", "", spotter__min_confidence=least) for least in (before, now)]
    first, second = (
        find_match(look, "a zebra drinks water", Settings(min_confidence=least))
        for least in (before, now)
    )
    assert (first != second) == is_unknown
    columns = Columns({"captions": [1], "match": [first], "match_confidence": [0.9]}, 1)
    assert cat.TextStep.find_unknown(columns, *configs).tolist() == [is_unknown]


def test_the_queries_of_the_page_run(work, tmp_path, monkeypatch, capfd):
    filtered, config, folder = work
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "kept").symlink_to(filtered())
    replay.Replay(str(filtered()), None).run(str(tmp_path / "runs" / "lists"))
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    (block,) = (
        b
        for b in python_blocks(REPOSITORY / "docs/guides/prepare/decisions.md")
        if "import duckdb" in b
    )
    exec(block, {})
    counts = collections.Counter((stage, reason) for _, stage, reason in read_outcomes(filtered()))
    answers = duckdb.sql("SELECT outcome, reason, count(*) FROM decisions GROUP BY ALL").fetchall()
    assert {(stage, reason): pairs for stage, reason, pairs in answers} == counts
    kept = duckdb.sql("SELECT lower(hex(uid)) FROM decisions WHERE outcome = 'kept'").fetchall()
    records = read_records(filtered())
    assert [uid for (uid,) in kept] == [record.metadata["uid"] for record in records]
    assert "with_action" in capfd.readouterr().out


def test_captions_decide_from_columns_as_their_graphs_do(tmp_path):
    """Same reasons as `cat_reason` for each single caption; a pair keeps its best caption."""
    texts = ["sunset", "a red car", "a dog runs", "IMG_1.jpg", "", "a black cat is chasing a bird"]
    config = job_config("a", tmp_path, "cat")
    step = cat.CaptionStep(config, SourceShard("table", "t.jsonl"))
    for complexity, least, action in itertools.product((True, False), (0, 1, 2, 3), (True, False)):
        config.update({"complexity": complexity, "min_complexity": least, "action": action})
        batch = [Candidate.of(Pair("k", b"", t, {"captions": [t, *texts]})) for t in texts]
        batch += [Candidate.of(Pair("k", b"", t, {})) for t in texts]
        measured = step.measure(batch)
        found = [None] * len(batch)
        for reason, holds in step.decide(Columns(measured, len(batch)), config).items():
            found = [f or (reason if h else None) for f, h in zip(found, holds, strict=True)]
        limits = cat.caption_limits(config)
        for candidate, reason in zip(batch, found, strict=True):
            truth = [cat_reason(graph, **limits) for graph in candidate.graphs]
            is_asked = complexity or action
            assert reason == (None if None in truth or not is_asked else truth[0])
