"""Captions that stand in their picture, T of CAT (DiHT, arXiv 2301.02280), for batches.

How text is spotted and matched belongs in `data_prep.text_spotting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from data_prep.batches.columns import append_columns, read_column
from data_prep.text_spotting.config import check_spotter, default_spotter, open_spotter
from data_prep.text_spotting.spotter import Settings, Verdict
from diht_jax.input.decode import MAX_PIXELS


class TextSpotter:
    """Reads pictures as far as their captions demand it."""

    def __init__(
        self,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        max_pixels: int = MAX_PIXELS,
        shard: str = "batches",
        **settings: Any,
    ):
        """Checks the settings; EasyOCR's networks are loaded for the first picture.

        Args:
            image_column: of the tables; encoded images, where null is an empty one.
            caption_column: of the tables; text, or several of them in a list.
            max_pixels: of a picture that is still decoded.
            shard: name of the file in `cache`, where there is one.
            **settings: keys of `text_spotting.config.default_spotter`, those of `config.spotter`.

        Raises:
            ValueError: an unknown setting, or a value out of its range.
        """
        config = default_spotter()
        unknown = sorted(settings.keys() - config.keys())
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: expected one of {', '.join(sorted(config))}")
        config.update(settings)
        check_spotter(config)
        self._spotter = open_spotter(config, max_pixels, shard)
        self._image_column = image_column
        self._caption_column = caption_column

    @property
    def settings(self) -> Settings:
        """Settings of the reader and of the matching."""
        return self._spotter.settings

    def judge(self, images: Sequence[bytes], captions: Sequence[Sequence[str]]) -> list[Verdict]:
        """Gives one verdict per picture; arguments and errors of `spotter.TextSpotter.judge`."""
        return self._spotter.judge(images, captions)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Appends the decisions.

        Returns:
            The table with `spotted_texts` (list of strings, the lines that were read), `match`
            (string: the line that repeats the caption, of several captions the first one's; null
            where some caption is not repeated, and the pair is kept) and `image_error` (string,
            why the picture could not be decoded, else null).
        """
        images = read_column(table, self._image_column, "image_column")
        captions = read_column(table, self._caption_column, "caption_column")
        verdicts = self.judge(
            [image or b"" for image in images],
            [[text or ""] if not isinstance(text, list) else text for text in captions],
        )
        texts = [[spot.text for spot in v.spots if spot.text is not None] for v in verdicts]
        matches = [None if None in v.matches or not v.matches else v.matches[0] for v in verdicts]
        errors = [None if v.error is None else v.error.reason for v in verdicts]
        return append_columns(
            table,
            {
                "spotted_texts": pa.array(texts, pa.list_(pa.string())),
                "match": pa.array(matches, pa.string()),
                "image_error": pa.array(errors, pa.string()),
            },
        )
