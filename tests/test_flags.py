"""The flags of all commands: one convention, and the spellings that they had before."""

import importlib

import pytest
from absl import flags

OLD_SPELLINGS = [
    ("diht_jax.compile", "global_batch", "batch_size", "64"),
    ("diht_jax.evaluate", "bootstrap", "num_resamples", "0"),
    ("diht_jax.fewshot", "draws", "num_draws", "3"),
    ("diht_jax.fewshot", "fit_steps", "num_steps", "7"),
    ("diht_jax.search", "images", "input", "photos"),
    ("diht_jax.search", "count", "num_matches", "2"),
    ("diht_jax.search", "template", "caption_template", "a {caption}"),
    ("data_prep.reports.__main__", "inputs", "input", "a,b"),
    ("data_prep.synthetic.__main__", "workers", "num_workers", "2"),
    ("data_prep.synthetic.teacher", "images", "input", "a.tar"),
    ("data_prep.synthetic.teacher", "epochs", "num_epochs", "2"),
]


@pytest.fixture
def define():
    """Defines the flags of a command and returns them by name; they are gone after the test."""
    defined = []
    # Flags that modules of other tests have defined in this process.
    foreign = {
        name: flags.FLAGS[name]
        for name in list(flags.FLAGS)
        if not str(flags.FLAGS.find_module_defining_flag(name)).startswith("absl")
    }
    for name in foreign:
        delattr(flags.FLAGS, name)

    def define_flags(command):
        undefine()
        module = importlib.import_module(command)
        before = set(flags.FLAGS)
        module.define_flags()
        defined.extend(set(flags.FLAGS) - before)
        return {name: flags.FLAGS[name] for name in defined}

    def undefine():
        for name in defined:
            delattr(flags.FLAGS, name)
        defined.clear()

    yield define_flags
    undefine()
    for name, flag in foreign.items():
        flags.FLAGS[name] = flag


@pytest.mark.parametrize(("command", "old", "new", "text"), OLD_SPELLINGS)
def test_old_spellings_still_work(command, old, new, text, define):
    defined = define(command)
    defined[old].parse(text)
    parsed = defined[new].parser.parse(text)
    assert flags.FLAGS[new].value == parsed
    assert flags.FLAGS[old].value == parsed
