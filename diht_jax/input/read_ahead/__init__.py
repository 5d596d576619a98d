"""Blocks of records that are fetched from an object store before they are decoded."""
