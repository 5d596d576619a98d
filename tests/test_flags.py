"""The spellings that flags had before."""

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


def own_flags():
    """The flags that are defined in this process, without absl's."""
    module_of = flags.FLAGS.find_module_defining_flag
    names = [name for name in flags.FLAGS if not str(module_of(name)).startswith("absl")]
    return {name: flags.FLAGS[name] for name in names}


@pytest.fixture
def no_flags():
    """Takes away what modules of other tests have defined, and later what the test defines."""
    before = own_flags()
    for name in before:
        delattr(flags.FLAGS, name)
    yield
    for name in own_flags():
        delattr(flags.FLAGS, name)
    for name, flag in before.items():
        flags.FLAGS[name] = flag


@pytest.mark.parametrize(("command", "old", "new", "text"), OLD_SPELLINGS)
def test_old_spellings_still_work(command, old, new, text, no_flags):
    importlib.import_module(command).define_flags()
    flags.FLAGS[old].parse(text)
    parsed = flags.FLAGS[new].parser.parse(text)
    assert flags.FLAGS[new].value == flags.FLAGS[old].value == parsed
