"""Command `python -m data_prep.synthetic`: writes the noisy web of `data_prep.synthetic.web`."""

import dataclasses
import functools
from collections.abc import Sequence

from absl import flags, logging

from data_prep.synthetic import web
from diht_jax import command_line
from diht_jax.terminal import print_escaped


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    defaults = web.Settings()
    flags.DEFINE_string("output", None, "Directory to write to.")
    integer = functools.partial(flags.DEFINE_integer, lower_bound=0)
    integer("num_pairs", defaults.num_pairs, "Training pairs, clean and noisy.")
    integer("seed", defaults.seed, "Seed of everything; same seed, same bytes.")
    # Rendered text is not legible in smaller pictures.
    integer("image_size", defaults.image_size, "Side of the pictures in pixels.", lower_bound=128)
    flags.DEFINE_list(
        "noise",
        [f"{kind}={share}" for kind, share in defaults.noise.items()],
        "Shares of the kinds of noise among the training pairs, KIND=SHARE,...; the kinds are "
        f"{', '.join(web.NOISE_KINDS)}; empty for none.",
    )
    integer("pairs_per_tar", defaults.pairs_per_tar, "Training pairs per tar.", lower_bound=1)
    integer("num_retrieval", defaults.num_retrieval, "Pairs of val_retrieval.tar.")
    shapes_and_colors = "Pairs of val_shape.tar and of val_color.tar."
    integer("num_classification", defaults.num_classification, shapes_and_colors)
    integer("num_workers", 0, "Processes; 0 for one per core.")
    flags.DEFINE_alias("workers", "num_workers")


def main() -> None:
    """Writes the data set that the flags describe; prints count and example of each kind."""
    given = flags.FLAGS
    command_line.require_flags("output")
    names = [field.name for field in dataclasses.fields(web.Settings) if field.name != "noise"]
    settings = web.Settings(
        noise=_parse_noise(given.noise), **{name: getattr(given, name) for name in names}
    )
    counts = web.write_dataset(settings, given.output, workers=given.num_workers)
    logging.info("%d training pairs in %s", settings.num_pairs, given.output)
    for kind, count in counts.items():
        share = count / max(settings.num_pairs, 1)
        print_escaped(
            f"{kind:14s} {count:7d}  {share:6.1%}  {_find_caption(settings, kind)}".rstrip()
        )


def _parse_noise(items: Sequence[str]) -> dict[str, float]:
    """Reads KIND=SHARE items."""
    shares = {}
    for item in items:
        kind, _, share = item.partition("=")
        try:
            shares[kind] = float(share)
        except ValueError:
            raise ValueError(
                f"--noise takes KIND=SHARE,... (as mismatched=0.1), got {item!r}"
            ) from None
    return shares


def _find_caption(settings: web.Settings, kind: str) -> str:
    """Returns the caption of the first training pair of a kind, or "" if there is none."""
    indices = (i for i in range(settings.num_pairs) if web.noise_kind(settings, i) == kind)
    index = next(indices, None)
    return "" if index is None else web.make_pair(settings, "train", index).caption


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
