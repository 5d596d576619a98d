"""Sequences that take little memory: what a driver holds of each of 100,000 parts."""

from __future__ import annotations

import itertools
import pickle
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

_T = TypeVar("_T")


class PackedList(Sequence[_T]):
    """Items that are pickled and compressed in blocks, and unpacked when they are looked at.

    Paths and tasks of the same folders take a tenth of the memory so. It is meant to be gone
    through in order: the block that an index met last is kept. An item is another object each
    time, equal to the one before.
    """

    __slots__ = ("_blocks", "_length", "_per_block", "_unpacked")

    def __init__(self, items: Iterable[_T], per_block: int = 128):
        """Packs the items, of which only a block is held at a time.

        Args:
            items: picklable.
            per_block: of them; 1 where each is large.
        """
        self._per_block = per_block
        self._blocks: list[bytes] = []
        self._length = 0
        self._unpacked: tuple[int, list[_T]] = (-1, [])
        rest = iter(items)
        while block := list(itertools.islice(rest, per_block)):
            self._blocks.append(zlib.compress(pickle.dumps(block, pickle.HIGHEST_PROTOCOL), 1))
            self._length += len(block)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_T]:
        for block in self._blocks:
            yield from _unpack(block)

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> PackedList[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | PackedList[_T]:
        """One item; of a slice another such list."""
        chosen = range(self._length)[index]
        if isinstance(chosen, range):
            return PackedList((self[i] for i in chosen), self._per_block)
        number, place = divmod(chosen, self._per_block)
        if self._unpacked[0] != number:
            self._unpacked = number, _unpack(self._blocks[number])
        return self._unpacked[1][place]

    def __reduce__(self) -> Any:
        """Without the block that was looked at."""
        return _restore, (self._blocks, self._length, self._per_block)


def _unpack(block: bytes) -> list[Any]:
    return pickle.loads(zlib.decompress(block))


def _restore(blocks: list[bytes], length: int, per_block: int) -> PackedList[Any]:
    packed: PackedList[Any] = PackedList((), per_block)
    packed._blocks, packed._length = blocks, length
    return packed
