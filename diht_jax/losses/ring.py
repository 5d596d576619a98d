"""The ring of devices of the streaming loss: communication, and tiling of rows.

The ring has two levels. Neighbours along the last mesh axis of the batch (`fsdp`: inside a host or
a block of a torus) form groups of G. Once in each pass a group gathers its images. Then the texts
of every device travel round the ring of groups, to the same member of the next group. With D groups
and b rows on each of P = D G devices, the alternatives are

  * one ring of all devices: P rounds of transfers, each overlapped with b x b logits;
  * gathering texts instead of images: also D rounds, but with two more collectives in each;
  * this design: D rounds with [G b, b] logits each, and two small collectives in each pass. A
    device sends D b rows to the next group instead of P b to its neighbour. Between hosts, these
    are the same number of bytes, through G network cards instead of one.

The cost is memory for images and their gradients, [G b, d] each; `group_size` therefore limits G.

Source: ours; the ring is that of ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Shaped

from diht_jax.hardware.chips import Chip, find_chip
from diht_jax.losses.objective import Masks, Objective

Index = Integer[Array, ""] | int

# Upper bounds of the side of a tile; a device launches a few kernels for each tile.
TILES = (2048, 1024, 512)
# Largest fraction of a device's memory for the gathered images, and the number of bytes if its
# memory is unknown (that fraction of 16 GiB, the smallest TPU).
_GATHERED_SHARE = 1 / 8192
_GATHERED_BYTES = 2 << 20


def group_size(axis_sizes: tuple[int, ...], block_bytes: int, chip: Chip | None) -> int:
    """Returns how many neighbours along the last axis gather their images; 1 is one ring of all.

    Args:
        axis_sizes: of the mesh axes that the batch is split over, in the mesh's order. A single
            axis does not tell which links are faster, so the result is 1.
        block_bytes: of a device's images, in the dtype of their gradients.
        chip: of the mesh, if known.
    """
    if len(axis_sizes) < 2:
        return 1
    most = chip.hbm_bytes * _GATHERED_SHARE if chip else _GATHERED_BYTES
    for size in range(axis_sizes[-1], 1, -1):
        if axis_sizes[-1] % size == 0 and size * block_bytes <= most:
            return size
    return 1


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A division of rows into tiles of equal size."""

    num_rows: int
    num_tiles: int
    tile: int

    @classmethod
    def create(cls, num_rows: int, most: int) -> Tiling:
        """Divides rows into equal tiles of at most `most` rows, which minimises padding."""
        num_tiles = math.ceil(num_rows / most)
        return cls(num_rows, num_tiles, math.ceil(num_rows / num_tiles))

    @property
    def is_padded(self) -> bool:
        """Whether the last tile is padded with zeros."""
        return self.num_tiles * self.tile > self.num_rows

    def split(self, rows: Shaped[Array, "rows ..."]) -> Shaped[Array, "tiles tile ..."]:
        """Splits rows into tiles, padding the last one with zeros."""
        if self.is_padded:
            missing = self.num_tiles * self.tile - self.num_rows
            rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(self.num_tiles, self.tile, *rows.shape[1:])

    def join(self, tiles: Shaped[Array, "tiles tile ..."]) -> Shaped[Array, "rows ..."]:
        """The inverse of `split`."""
        return tiles.reshape(-1, *tiles.shape[2:])[: self.num_rows]

    def indices(self, tile_index: Index) -> Integer[Array, " tile"]:
        """Returns the indices of the rows of a tile."""
        return tile_index * self.tile + jnp.arange(self.tile)


@dataclasses.dataclass(frozen=True)
class Ring:
    """The ring's communication and tiling; all sizes are static when the step is traced."""

    objective: Objective  # the loss of one row
    axes: tuple[str, ...]  # mesh axes that the batch is split over, in the mesh's order
    num_rounds: int  # number of groups, and so of the blocks of texts that visit a device
    group: int  # G, neighbours along the last axis that gather their images
    images: Tiling  # tiles of the images of a group, the rows of a block of logits
    texts: Tiling  # tiles of the texts of a device, the columns of a block of logits

    @classmethod
    def create(
        cls,
        objective: Objective,
        axes: tuple[str, ...],
        block: jax.ShapeDtypeStruct,
        most_tile: int | None,
    ) -> Ring:
        """Creates the ring of the devices of a `shard_map`, inside of the `shard_map`.

        Args:
            objective, axes: see the fields; the axes in any order.
            block: images of a device, [b, d], with the dtype of their gradients.
            most_tile: upper bound of the side of a tile; None is the largest of `TILES` for which
                the logits need no more memory than the images of a group.
        """
        mesh = jax.sharding.get_abstract_mesh()
        # The order of the ring does not matter, but newer JAX's `ppermute` needs the mesh's order.
        if set(axes) <= set(mesh.axis_names):
            axes = tuple(sorted(axes, key=mesh.axis_names.index))
        sizes = tuple(map(jax.lax.axis_size, axes))
        num_rows, width = block.shape
        device = getattr(mesh, "abstract_device", None)
        chip = find_chip(device.device_kind) if device else None
        group = group_size(sizes, block.size * block.dtype.itemsize, chip)
        fitting = (tile for tile in TILES if tile**2 <= group * num_rows * width)
        most_tile = most_tile or next(fitting, TILES[-1])
        images = Tiling.create(group * num_rows, most_tile)
        texts = Tiling.create(num_rows, most_tile)
        return cls(objective, axes, math.prod(sizes) // group, group, images, texts)

    def blocks(self, image_emb: jax.Array, text_emb: jax.Array, pair_ids: jax.Array | None) -> Any:
        """Returns tiles of the group's images and this device's texts, each with ids or None."""
        images = self.images.split(self.gather(image_emb)), None
        texts = self.texts.split(text_emb), None
        if pair_ids is None:
            return images, texts
        image_ids = self.images.split(self.gather(pair_ids))
        return (images[0], image_ids), (texts[0], self.texts.split(pair_ids))

    def shift(self, block: jax.Array) -> jax.Array:
        """Sends `block` to the next group, and returns the block of the previous group."""
        if self.num_rounds == 1:
            return block
        num_devices = self.num_rounds * self.group
        to_next = [(i, (i + self.group) % num_devices) for i in range(num_devices)]
        return jax.lax.ppermute(block, self.axes, to_next)

    def shift_rows(self, rows: Any) -> Any:
        """Shifts a tree of arrays of equal shape, as one array."""
        return _as_one(self.shift, rows) if self.num_rounds > 1 else rows

    def gather(self, rows: jax.Array, axis: int = 0) -> jax.Array:
        """Gathers the rows of all members of the group; `axis` becomes G times as long."""
        if self.group == 1:
            return rows
        return jax.lax.all_gather(rows, axis=axis, tiled=True, **self._members())

    def gather_rows(self, rows: Any) -> Any:
        """Gathers a tree of arrays [b] as one array."""
        if self.group == 1:
            return rows
        return _as_one(lambda stacked: self.gather(stacked, axis=1), rows)

    def exchange_rows(self, parts: Any) -> Any:
        """Collects all members' parts for this device's rows: arrays [G b] become [G, b]."""

        def exchange(stacked: jax.Array) -> jax.Array:
            stacked = stacked.reshape(-1, self.group, self.texts.num_rows)
            return jax.lax.all_to_all(stacked, split_axis=1, concat_axis=1, **self._members())

        return _as_one(exchange, parts)

    def sum_of_members(self, parts: Shaped[Array, "G_b d"]) -> Shaped[Array, "b d"]:
        """Sums the parts of this device's rows over the members of the group."""
        if self.group == 1:
            return parts
        return jax.lax.psum_scatter(parts, tiled=True, **self._members())

    def tour(
        self,
        add_block: Callable[..., tuple[Any, Any]],
        block: Any,
        *,
        rows: Any = (),
        sums: Any,
        stays: Any,
        merge: Callable[[Any, Any], Any] | None = None,
    ) -> tuple[Any, Any]:
        """Sends the texts of every device, with their running sums, round the ring of groups.

        Args:
            add_block: maps (round, visiting texts, their `rows`, `stays`) to the part of `sums` of
                these texts with the images of this group, and the new `stays`.
            block: tree of arrays: tiles of this device's texts, and their ids for the masks.
            rows: tree of further values that travel with the texts, in tiles of equal shape.
            sums: tree of initial values of the running sums of the texts.
            stays: tree of initial values of the state that stays on the device.
            merge: combines the sums of previous groups and a new part; None adds arrays.

        Returns:
            `sums` of this device's texts with the images of all groups, and `stays`.
        """
        shift_sums = self.shift_rows if merge else self.shift

        def one_round(rounds, carry):
            block, rows, sums, stays = carry
            next_block, next_rows = jax.tree.map(self.shift, block), self.shift_rows(rows)
            # The sums of the current block, from the device that it came from.
            sums = shift_sums(sums)
            part, stays = add_block(rounds, block, rows, stays)
            if self.num_rounds > 1:
                # Without the barrier the compiler fuses the addition into a product, which would
                # then wait for the transfer.
                part = merge(sums, part) if merge else sums + jax.lax.optimization_barrier(part)
            return next_block, next_rows, part, stays

        _, _, sums, stays = jax.lax.fori_loop(
            0, self.num_rounds, one_round, (block, rows, sums, stays)
        )
        # The last block that visits a device is that of the next group.
        return shift_sums(sums), stays

    def masks(
        self,
        rounds: Index,
        row_tile: Index,
        column_tile: Index,
        row_ids: Integer[Array, "m k"] | None = None,
        column_ids: Integer[Array, "n k"] | None = None,
    ) -> Masks:
        """Returns the masks of the logits of a tile, after `rounds` of the ring.

        The ids are None if equal pairs are negatives.
        """
        rows = self.images.indices(row_tile)[:, None]
        columns = self.texts.indices(column_tile)[None, :]
        # In the first round, the texts are those of this device.
        own_row = columns
        if self.group > 1:
            member = jax.lax.axis_index(self.axes[-1]) % self.group
            own_row = columns + member * self.texts.num_rows
        is_positive = (rounds == 0) & (rows == own_row)
        is_negative = ~is_positive
        if self.images.is_padded or self.texts.is_padded:
            is_negative &= (rows < self.images.num_rows) & (columns < self.texts.num_rows)
        if row_ids is None or column_ids is None:
            return Masks(is_positive, is_negative)
        is_equal = jnp.all(row_ids[:, None] == column_ids[None, :], axis=-1)
        return Masks(is_positive, is_negative & ~is_equal, is_negative & is_equal)

    def for_each_tile(self, body: Callable, carry: Any) -> Any:
        """Runs `body(row_tile, column_tile, carry) -> carry` on all tiles of a block."""
        num_columns = self.texts.num_tiles
        if self.images.num_tiles * num_columns == 1:
            return body(0, 0, carry)

        def step(index, carry):
            return body(index // num_columns, index % num_columns, carry)

        return jax.lax.fori_loop(0, self.images.num_tiles * num_columns, step, carry)

    def _members(self) -> dict[str, Any]:
        """Returns the arguments of a collective inside the groups."""
        inner = jax.lax.axis_size(self.axes[-1])
        groups = None
        if self.group < inner:
            groups = [list(range(i, i + self.group)) for i in range(0, inner, self.group)]
        return {"axis_name": self.axes[-1], "axis_index_groups": groups}


def _as_one(send: Callable[[jax.Array], jax.Array], rows: Any) -> Any:
    """Sends a tree of arrays of equal shape as one array, since latency bounds the ring."""
    leaves, structure = jax.tree.flatten(rows)
    return jax.tree.unflatten(structure, list(send(jnp.stack(leaves)))) if leaves else rows


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Returns zeros with the dtype and the varying mesh axes of `like`."""
    return vary(varying_axes(like), jnp.zeros(shape, like.dtype))


def vary(axes: frozenset[str], x: jax.Array) -> jax.Array:
    """Marks an array as varying over these mesh axes."""
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Returns the mesh axes that `x` varies over; empty without `check_vma`."""
    return jax.typeof(x).manual_axis_type.varying


def at(tree: Any, index: Index) -> Any:
    """Returns one tile of each array [num_tiles, ...] of a tree."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
    return jax.tree.map(take, tree)


def put(tree: Any, part: Any, index: Index) -> Any:
    """Replaces one tile of each array of a tree; the inverse of `at`."""
    replace = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
    return jax.tree.map(replace, tree, part)
