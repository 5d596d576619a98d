"""Text-spotting: finds pictures that show their caption as text (DiHT, arXiv 2301.02280)."""

from data_prep.text_spotting.match import caption_matches

__all__ = ["caption_matches"]
