"""Programs that run for milliseconds are compiled without optimisations."""

import jax
import pytest


@pytest.fixture
def quick_compile():
    """Most of the time of a tiny training run would go into optimising its program."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
