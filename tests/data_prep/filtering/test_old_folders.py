"""Folders filtered before the rules had versions: recognised, completed, and still guarded.

The hashes and digests below were written by the code of commit e74b9cc.
"""

import importlib.metadata
import json
import os
import pathlib
import shutil

import pytest

from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from data_prep.filtering import resharding, shard_log, stale_outputs
from data_prep.jobs import fingerprint, manifest, shards
from data_prep.steps import captions, text
from diht_jax.readers.registry import SourceShard
from tests.data_prep.filtering.jobs import job_config, part_names, read_counts, write_tars

_CAPTION_DIGEST = "947b331d88dcbba05ef3b1aa118324f52bb19d07ec7ef5de25b9bc904598522d"
_SPOTTING_DIGEST = "5fb768f15315445486dfa738e7d08d516284d3302c62ab5ea5005a76f2d86a09"


@pytest.fixture(autouse=True)
def version_1(monkeypatch) -> None:
    """Rules of the version that those folders were made by."""
    monkeypatch.setattr(captions.versions, "RULES_VERSION", 1)
    monkeypatch.setattr(text.spotter_config, "RULES_VERSION", 1)


def test_hashes_are_those_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "easyocr_version", lambda: "1.7.2")
    cat = job_config("a", tmp_path, "cat", text_spotting=True, image__max_side=300, label_field="n")
    cat.spotter.gate_size = 160  # the default of versions 1 and 2
    settings = filter_config.describe_settings(cat)
    # Keys of versions 2 and 3.
    for later in ("weigh_words", "join_lines", "closer_size", "closer_score", "closer_chars"):
        del settings["spotter"][later]
    assert filter_config.hash_settings(settings) == "0350f5709fb68186"
    assert filter_config.hash_config(job_config("a", tmp_path, "metadata")) == "a5f4e1d82382c4ba"
    assert filter_config.hash_config(job_config("a", tmp_path, "convert")) == "2312dd6c85107ec9"
    settings["min_complexity"] = 2
    assert filter_config.hash_settings(settings) != "0350f5709fb68186"
    assert filter_config.hash_config(cat) != "0350f5709fb68186"


def test_a_new_version_of_the_rules_is_another_hash(tmp_path, monkeypatch):
    config = job_config("a", tmp_path, "cat")
    before = filter_config.hash_config(config)
    monkeypatch.setattr(captions.versions, "RULES_VERSION", 2)
    assert filter_config.hash_config(config) != before


def test_digests_of_settings_mean_version_1():
    settings = {"caption_rules": _CAPTION_DIGEST, "spotting_rules": _SPOTTING_DIGEST, "seed": 0}
    assert filter_config.upgrade_settings(settings) == {
        "caption_rules": 1, "spotting_rules": 1, "seed": 0
    }  # fmt: skip
    other = {"caption_rules": "0" * 64}
    assert filter_config.upgrade_settings(other) == other


def _age(folder: pathlib.Path) -> None:
    """Turns a folder of today into one of before.

    No versions, a digest in the settings, hashed inputs, no hash of records, parts with numbers.
    """
    path = folder / "parts" / stale_outputs.SETTINGS
    settings = json.loads(path.read_bytes())
    assert settings["caption_rules"] == 1
    shards.write_json(path, settings | {"caption_rules": _CAPTION_DIGEST})
    parts = []
    for number, name in enumerate(part_names(folder).values()):
        old = f"pairs-train-{number:05d}.tfrecord"
        for path in (folder / "parts").glob(f"{name}*"):
            path.rename(path.with_name(path.name.replace(name, old)))
        task = shards.ShardTask(None, str(folder / "parts" / old), "")
        stats = shards.read_json(task.stats_path)
        source = SourceShard("webdataset", shards.read_json(task.location_path)["path"])
        stats["input"] = fingerprint.describe(source, "hash").contents | {"fingerprint": "0"}
        stats["output"]["file"] = old
        del stats["counts"]["versions"], stats["output"]["digest"]
        shards.write_json(task.stats_path, stats)
        parts.append((task, stats))
    (folder / "parts" / "manifest.json").unlink()
    for shard in _plan(parts, folder):
        stats = shards.read_json(shard.stats_path)
        stats["config_hash"] = shard.plan_hash
        names = [[os.path.basename(s.path), s.start, s.stop] for s in shard.slices]
        shards.write_json(shard.stats_path, stats | {"input": {"parts": names}})
    for name in ("stats.json", "report.json"):
        data = json.loads((folder / name).read_bytes())
        del data["versions"]
        shards.write_json(folder / name, data)


def _plan(parts, folder: pathlib.Path) -> list[resharding.BalancedShard]:
    return resharding.plan_shards(
        parts, str(folder), dataset="pairs", split="train", examples_per_shard=10_000
    )


@pytest.fixture
def old(tmp_path) -> tuple[str, pathlib.Path]:
    """An input of two tars, and its complete output as the code of before left it."""
    source = write_tars(tmp_path / "in", 2)
    # Captions are parsed, and none is dropped.
    run_filter(job_config(source, tmp_path / "out", concepts=True, keep_parts=True))
    _age(tmp_path / "out")
    return source, tmp_path / "out"


def test_a_complete_folder_is_done(old, capsys):
    source, output = old
    before = {path.relative_to(output): _version(path) for path in output.rglob("*.*")}
    assert run_filter(job_config(source, output, concepts=True, keep_parts=True)) == {}
    assert "10 pairs in 1 shards" in capsys.readouterr().out
    names = {entry.name: entry.before for entry in manifest.read_manifest(f"{output}/parts")}
    assert list(names.values()) == [(f"pairs-train-{i:05d}.tfrecord",) for i in range(2)]
    now = {}
    for path in output.rglob("*.*"):
        if path.name != manifest.NAME:
            name = path.name
            for new, (number,) in names.items():
                name = name.replace(new, number)
            now[path.with_name(name).relative_to(output)] = _version(path)
    assert now == before  # nothing but the names of the parts


def _version(path: pathlib.Path) -> tuple[bytes, int]:
    return path.read_bytes(), path.stat().st_mtime_ns


@pytest.mark.parametrize("moved", [False, True])
def test_an_incomplete_folder_is_completed(old, tmp_path, moved):
    source, output = old
    (output / "parts" / "pairs-train-00001.tfrecord.stats.json").unlink()
    before = (output / "parts" / "pairs-train-00000.tfrecord.stats.json").read_bytes()
    if moved:  # known by number, name and size, and then by the hash of every byte
        shutil.copytree(tmp_path / "in", tmp_path / "moved")
        source = source.replace("/in/", "/moved/")
    assert run_filter(job_config(source, output, concepts=True, keep_parts=True)) == {}
    names = list(part_names(output).values())
    assert (output / "parts" / f"{names[0]}.stats.json").read_bytes() == before
    assert not list((output / "parts").glob("pairs-train-0000*"))
    assert read_counts(output)["kept"] == 10
    versions = json.loads((output / "stats.json").read_bytes())["versions"]
    # Of the shard of before it is not known.
    assert versions["pillow"] == {importlib.metadata.version("pillow"): 1}


def test_other_rules_are_refused_and_named(old, monkeypatch):
    source, output = old
    monkeypatch.setattr(captions.versions, "RULES_VERSION", 2)
    with pytest.raises(ValueError, match="caption_rules 1 -> 2"):
        run_filter(job_config(source, output, concepts=True, keep_parts=True))


def test_a_folder_of_version_2_is_refused_and_named(tmp_path, monkeypatch):
    config = job_config(write_tars(tmp_path / "in", 1), tmp_path / "out", concepts=True)
    monkeypatch.setattr(captions.versions, "RULES_VERSION", 2)
    run_filter(config)
    monkeypatch.setattr(captions.versions, "RULES_VERSION", 3)
    with pytest.raises(ValueError, match="caption_rules 2 -> 3"):
        run_filter(config)


def test_another_config_is_refused_and_named(old):
    source, output = old
    with pytest.raises(ValueError) as refused:
        run_filter(job_config(source, output, concepts=True, keep_parts=True, image__min_side=2))
    assert "In the config: image.min_side 1 -> 2. Choose" in str(refused.value)
    assert "--overwrite" in str(refused.value)


def test_another_model_is_refused_and_other_packages_are_reported(tmp_path, monkeypatch, caplog):
    source = write_tars(tmp_path / "in", 2)
    config = job_config(source, tmp_path / "out", concepts=True, keep_parts=True)
    run_filter(config)
    versions = filter_config.package_versions(config)
    assert set(versions) == {"spacy", "spacy_model", "py3langid", "pillow"}

    def install(**other: str) -> None:
        for module in (filter_config, shard_log):
            monkeypatch.setattr(module, "package_versions", lambda _: versions | other)

    install(spacy_model="en_core_web_sm 9.0.0")
    with pytest.raises(ValueError, match=r"spacy_model \(en_core_web_sm .*, now .* 9.0.0\)"):
        run_filter(config)
    assert run_filter(config, overwrite=True) == {}
    stats = json.loads((tmp_path / "out" / "stats.json").read_bytes())
    assert stats["versions"]["spacy_model"] == {"en_core_web_sm 9.0.0": 2}

    install(spacy_model="en_core_web_sm 9.0.0", pillow="99")
    name = part_names(tmp_path / "out")["00001.tar"]
    (tmp_path / "out" / "parts" / f"{name}.stats.json").unlink()
    assert run_filter(config) == {}
    assert f"unlike versions of pillow: {versions['pillow']} (1 shards), 99 (1 shards)" in (
        caplog.text
    )
