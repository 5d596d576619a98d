"""Finds the record whose picture ends the process that decodes it.

A crash in a codec takes the whole worker with it, and nobody is left to tell which picture it was.
So a process of its own decodes the records in question one after the other, and reports each before
it begins. What it reported last is decoded once more, alone in a fresh process: only a record that
ends that one as well is to blame, and not, for example, a lack of memory.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection

from diht_jax.input.bad_records import CheckedExamples
from diht_jax.input.workers import start_worker


def find_crashing_index(examples: CheckedExamples, indices: Sequence[int]) -> int | None:
    """The index of a record whose decoding ends its process, each time.

    Args:
        examples: to be decoded; goes to the other process by pickle.
        indices: of the order; those of replacements are tried as well.

    Returns:
        The first such index; None where all can be decoded, or are bad in another way.
    """
    suspect = _index_at_death(examples, indices)
    if suspect is None:
        return None
    return suspect if _index_at_death(examples, [suspect]) == suspect else None


def _index_at_death(examples: CheckedExamples, indices: Sequence[int]) -> int | None:
    """What a new process was decoding when it died; None where it did not die."""
    context = multiprocessing.get_context("spawn")  # as grain starts its workers
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_decode_all,
        args=(os.getpid(), examples, list(indices), sender),
        name="crash_search",
        daemon=True,
    )
    process.start()
    sender.close()
    last = None
    try:
        while True:
            last = receiver.recv()
    except EOFError:
        process.join()
    return last


def _decode_all(
    parent: int, examples: CheckedExamples, indices: Sequence[int], sender: Connection
) -> None:
    start_worker(parent, None)
    for index in indices:
        for tried in examples.tried_indices(index):
            sender.send(tried)
    sender.send(None)
