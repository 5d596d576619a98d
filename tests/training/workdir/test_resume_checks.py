"""Hosts of one job with different configs: the texts that they exchange are injected here."""

import pytest

from diht_jax.training.workdir import resume_checks
from diht_jax.training.workdir.resume_checks import check_hosts_share_config


@pytest.fixture
def check_job(config, monkeypatch):
    """Runs the check on each process of a job whose configs have the given changes."""

    def check(*changes):
        configs = []
        for change in changes:
            configs.append(config.copy_and_resolve_references())
            configs[-1].update_from_flattened_dict(change)
        errors = []
        for own in configs:
            calls = []

            def gather(text, longest_bytes=4096, own=own, calls=calls):
                """What the others would send in their call of the same number."""
                calls.append(text)
                assert len(text.encode()) <= longest_bytes
                texts = [sent(each)[len(calls) - 1] for each in configs]
                assert texts[configs.index(own)] == text
                return texts

            monkeypatch.setattr(resume_checks, "gather_texts", gather)
            try:
                check_hosts_share_config(own)
                errors.append(None)
            except ValueError as error:
                errors.append(str(error))
        return errors

    def sent(other):
        """The texts that a process with this config sends where another one differs."""
        texts = []

        def record(text, longest_bytes=4096):
            texts.append(text)
            return [text, "another"] if len(texts) == 1 else [text]

        with monkeypatch.context() as patched:
            patched.setattr(resume_checks, "gather_texts", record)
            with pytest.raises(ValueError):
                check_hosts_share_config(other)
        return texts

    return check


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optimizer.learning_rate": 2e-3},
        {"loss.beta": 0.5, "seed": 7},
        {"optimizer.frozen": ("^vision/",)},
    ],
)
def test_the_keys_that_differ_are_named_on_all_hosts(check_job, change):
    errors = check_job({}, {}, change)
    assert errors[0] == (
        "processes 2 have another config than process 0; give every host the same command. "
        f"Different: {', '.join(sorted(change))}"
    )
    assert errors == [errors[0]] * 3


def test_equal_configs_and_paths_of_their_own_are_fine(check_job):
    own = {"data.train": "/local/1", "checkpoint.staging": "/tmp/1", "data.num_workers": 3}
    assert check_job({}, {}) == [None, None]
    assert check_job({}, own) == [None, None]
