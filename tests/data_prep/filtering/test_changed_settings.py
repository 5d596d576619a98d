"""A folder that was made with other rules, another config or another model is not mixed up."""

import json

import pytest

from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from tests.data_prep.filtering.jobs import job_config, write_tars


def test_another_model_is_refused(tmp_path, monkeypatch):
    source = write_tars(tmp_path / "in", 2)
    config = job_config(source, tmp_path / "out", concepts=True, keep_parts=True)
    run_filter(config)
    versions = filter_config.package_versions(config)
    assert set(versions) == {"spacy", "spacy_model", "py3langid", "pillow"}

    other = versions | {"spacy_model": "en_core_web_sm 9.0.0"}
    monkeypatch.setattr(filter_config, "package_versions", lambda _: other)
    with pytest.raises(ValueError, match=r"spacy_model \(en_core_web_sm .*, now .* 9.0.0\)"):
        run_filter(config)
    assert run_filter(config, overwrite=True) == {}
    stats = json.loads((tmp_path / "out" / "stats.json").read_bytes())
    assert stats["versions"]["spacy_model"] == {"en_core_web_sm 9.0.0": 2}
