"""diht_jax: training, evaluation and use of CLIP-style models with DiHT's methods, in JAX.

`diht_jax.load_model` loads a model; the main commands are `python -m diht_jax.train` and
`python -m diht_jax.evaluate`.
"""

from typing import Any

__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazy, so that tools that only read records need not import JAX and Orbax.
    if name == "load_model":
        from diht_jax.loading import load_model

        return load_model
    if name == "LoadedModel":
        from diht_jax.weights.inference import LoadedModel

        return LoadedModel
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("diht_jax")
        except metadata.PackageNotFoundError:  # a checkout on the path that is not installed
            return "0+unknown"
    raise AttributeError(f"module 'diht_jax' has no attribute '{name}'")
