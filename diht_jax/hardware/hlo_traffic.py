"""Work, memory traffic and collectives of a compiled program, read from its optimised HLO.

Every instruction is multiplied by the trip counts of its enclosing loops. The FLOPs of a whole step
are counted from the jaxpr instead (`chips.count_flops`).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from diht_jax.hardware.hlo_text import (
    Instruction,
    Module,
    all_bytes,
    arrays_of,
    main_memory_bytes,
    parse_module,
    product_flops,
    read_groups,
    trip_count,
)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)

_PRODUCTS = ("dot", "convolution")
# Instructions without memory traffic.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "domain",
        "opt-barrier",
    ]
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication, summed over the program, for one device."""

    kind: str  # one of `COLLECTIVES`
    group_size: int  # devices of a group; 2 for a permutation
    count: int  # number of executions
    payload_bytes: int  # of the array that is reduced, gathered (the result) or sent
    # Bytes that a device sends with a bandwidth-optimal algorithm: (g-1)/g of the payload to
    # gather, scatter or exchange, twice that to all-reduce, all of it to permute.
    sent_bytes: int
    span: int  # largest extent of a group in the mesh, from its first to its last device


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one execution of an instruction on one device, in the order of the program."""

    # "products", "kernels" (attention), "element-wise" (includes reductions), "copies",
    # "collectives", or "loop".
    kind: str
    memory_bytes: int = 0  # read from and written to main memory (HBM)
    cycles: int = 0  # of a TPU core: the compiler's estimate for products, the count for kernels
    flops: int = 0  # of matrix products, without `float32_flops`; unknown on a TPU
    float32_flops: int = 0  # of matrix products of float32 numbers in full precision
    collective: Collective | None = None  # communication of one execution
    starts: str | None = None  # name of the asynchronous operation that it starts
    waits_for: str | None = None  # name of the asynchronous operation that it waits for
    body: tuple[Work, ...] = ()  # of a loop
    trips: int = 1  # trip count of the loop


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Memory traffic and communication of one device."""

    # Read from and written to the device's main memory (HBM) by operands and results of
    # instructions.
    memory_bytes: int
    collectives: tuple[Collective, ...]  # by kind, group size and span, most sent bytes first
    unknown_loops: int  # number of loops with an unknown trip count, counted as one iteration
    # `memory_bytes` by the `kind` of `Work`, largest first.
    bytes_by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    work: tuple[Work, ...] = ()  # all work, in the order of the program
    unknown_kernels: int = 0  # number of TPU (Mosaic) kernels whose cycles are unknown

    @property
    def sent_bytes(self) -> int:
        """Bytes sent over the links by all collectives."""
        return sum(c.sent_bytes for c in self.collectives)


def count_traffic(hlo_text: str, kernel_cycles: Mapping[str, int] | None = None) -> Traffic:
    """Counts the traffic and work of a program; `kernel_cycles` are those of its `tpu_kernels`."""
    return _Counter(parse_module(hlo_text), kernel_cycles or {}).run()


def tpu_kernels(hlo_text: str) -> list[str]:
    """Returns the names of the instructions that run TPU (Mosaic) kernels."""
    return re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*\"tpu_custom_call\"", hlo_text, re.MULTILINE)


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def _chain(instruction: Instruction) -> str | None:
    found = re.search(r'chain_id="(\d+)"', instruction.text)
    return found and found.group(1)


def _is_bookkeeping(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and bool(
        re.search(r"AllocateBuffer|AsyncCollective", instruction.text)
    )


def flatten(work: Iterable[Work], times: int = 1) -> Iterator[tuple[int, Work]]:
    """Yields (number of executions, work) for all work inside and outside of loops."""
    for item in work:
        if item.body:
            yield from flatten(item.body, times * item.trips)
        else:
            yield times, item


class _Counter:
    """Counts the traffic of a module by visiting its computations from the entry."""

    def __init__(self, module: Module, kernel_cycles: Mapping[str, int]):
        self._module = module
        self._kernel_cycles = kernel_cycles
        self._unknown_loops = self._unknown_kernels = 0
        # The TPU compiler splits a collective over several fusions, which form a chain.
        self._links_left = collections.Counter(
            chain
            for computation in module.computations.values()
            for instruction in computation.values()
            if _is_collective(instruction) and (chain := _chain(instruction))
        )
        self._begun: set[str] = set()

    def run(self) -> Traffic:
        work = tuple(self._visit(self._module.entry, touches_memory=True))
        sizes: collections.Counter[str] = collections.Counter()
        rows: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
        for times, item in flatten(work):
            sizes[item.kind] += times * item.memory_bytes
            if row := item.collective:
                counts = (times, times * row.payload_bytes, times * row.sent_bytes)
                before = rows[row.kind, row.group_size, row.span]
                before[:] = [old + new for old, new in zip(before, counts, strict=True)]
        found = [Collective(kind, size, *sums, span) for (kind, size, span), sums in rows.items()]
        found.sort(key=lambda row: -row.sent_bytes)
        by_kind = {kind: size for kind, size in sizes.most_common() if size}
        total = sum(by_kind.values())
        unknown = self._unknown_loops
        return Traffic(total, tuple(found), unknown, by_kind, work, self._unknown_kernels)

    def _visit(self, name: str, touches_memory: bool) -> list[Work]:
        computation = self._module.computations[name]
        work = []
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode.removesuffix("-start") in COLLECTIVES:
                work.append(self._collective(instruction, name))
            elif opcode == "while":
                trips = trip_count(self._module, instruction, computation)
                if trips is None:
                    self._unknown_loops += 1
                    trips = 1
                for attribute, runs in (("body", trips), ("condition", trips + 1)):
                    body = self._visit(instruction.callee(attribute), touches_memory)
                    if body:
                        work.append(Work("loop", body=tuple(body), trips=runs))
            elif opcode == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", instruction.text):
                    if branch in self._module.computations:
                        work += self._visit(branch, touches_memory)
            elif opcode == "call":
                work += self._visit(instruction.callee("calls|to_apply"), touches_memory)
            elif opcode.endswith("-done"):
                work.append(Work("copies", waits_for=instruction.operands[0]))
            else:
                work += self._instruction_work(instruction, computation, touches_memory)
        return work

    def _instruction_work(self, instruction, computation, touches_memory: bool) -> list[Work]:
        inner = []
        if instruction.opcode in ("fusion", "async-start"):
            inner = self._visit(instruction.callee("calls|to_apply"), touches_memory=False)
        if not touches_memory:
            flops = product_flops(instruction, computation)
            return [*inner, Work("products", 0, 0, *flops)] if any(flops) else inner
        communication = [item for item in inner if item.collective or item.waits_for]
        sums = [product_flops(instruction, computation)]
        sums += [(item.flops, item.float32_flops) for item in inner]
        kind = self._kind(instruction)
        own = Work(
            kind,
            self._instruction_bytes(instruction, computation),
            self._cycles(instruction, kind),
            *(sum(parts) for parts in zip(*sums, strict=True)),
            starts=instruction.name if instruction.opcode.endswith("-start") else None,
        )
        has_any = own.memory_bytes or own.cycles or own.flops or own.float32_flops
        return [*communication, own] if has_any else communication

    def _cycles(self, instruction: Instruction, kind: str) -> int:
        if kind == "kernels" and "tpu_custom_call" in instruction.text:
            self._unknown_kernels += instruction.name not in self._kernel_cycles
            return self._kernel_cycles.get(instruction.name, 0)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
        return int(estimate.group(1)) if estimate and kind == "products" else 0

    def _kind(self, instruction: Instruction) -> str:
        if instruction.opcode == "custom-call":
            is_attention = re.search(r"tpu_custom_call|fmha", instruction.text)
            return "kernels" if is_attention else "products"
        if instruction.opcode == "fusion" and self._has_product(instruction.callee("calls")):
            return "products"
        if instruction.opcode in _PRODUCTS:
            return "products"
        is_copy = instruction.opcode in ("copy", "copy-start", "slice-start", "transpose")
        return "copies" if is_copy else "element-wise"

    def _has_product(self, name: str) -> bool:
        """Returns whether a computation contains a matrix product, at any depth."""
        return any(
            instruction.opcode in _PRODUCTS
            or (instruction.opcode == "fusion" and self._has_product(instruction.callee("calls")))
            for instruction in self._module.computations[name].values()
        )

    def _instruction_bytes(self, instruction: Instruction, computation) -> int:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        if _is_bookkeeping(instruction):
            return 0
        operands = [computation[name] for name in instruction.operands if name in computation]
        written = main_memory_bytes(instruction.type_text)
        if opcode in ("copy-start", "slice-start"):
            # (destination, source, context); for a slice the whole source is first.
            arrays = list(arrays_of(instruction.type_text))[:2]
            moved = min(size for size, _ in arrays)
            return sum(moved for _, in_main_memory in arrays if in_main_memory)
        if opcode.endswith("-start"):
            written = main_memory_bytes(operands[0].type_text) if operands else 0
        if opcode in ("dynamic-slice", "slice", "gather", "broadcast"):
            return 2 * written if opcode != "broadcast" else written
        if opcode == "dynamic-update-slice":
            return 2 * main_memory_bytes(operands[1].type_text)
        read = [main_memory_bytes(operand.type_text) for operand in operands]
        if opcode == "fusion":
            return self._fusion_bytes(self._module.computations[instruction.callee("calls")], read)
        return sum(read) + written

    def _fusion_bytes(self, body: dict[str, Instruction], read: list[int]) -> int:
        """Counts only the slices that a fusion reads of its operands or updates in place."""
        total = 0
        users = collections.defaultdict(list)
        for instruction in body.values():
            for position, name in enumerate(instruction.operands):
                users[name].append((instruction, position))
        for instruction in body.values():
            if instruction.opcode == "parameter":
                whole = read[int(instruction.operands[0])]
                total += min(whole, self._bytes_used(instruction, users, whole))
            if instruction.is_root:
                total += self._bytes_made(instruction, body)
        return total

    def _bytes_used(self, parameter, users, whole: int) -> int:
        used, pending = 0, [parameter]
        while pending:
            source = pending.pop()
            for user, position in users[source.name]:
                if user.opcode in ("bitcast", "copy", "get-tuple-element"):
                    pending.append(user)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
                    used += all_bytes(user.type_text)
                elif (
                    user.opcode == "dynamic-update-slice"
                    and position == 0
                    or user.opcode == "tuple"
                    or _is_collective(user)
                    or _is_bookkeeping(user)
                ):
                    continue
                else:
                    return whole
        return used

    def _bytes_made(self, root: Instruction, body) -> int:
        if root.opcode == "tuple":
            return sum(self._bytes_made(body[name], body) for name in root.operands)
        if root.opcode in ("bitcast", "copy") and root.operands[0] in body:
            inner = body[root.operands[0]]
            if inner.opcode == "dynamic-update-slice":
                return self._bytes_made(inner, body)
        if root.opcode == "dynamic-update-slice":
            return all_bytes(body[root.operands[1]].type_text)
        if root.opcode == "parameter" or _is_collective(root) or _is_bookkeeping(root):
            return 0
        return main_memory_bytes(root.type_text)

    def _collective(self, instruction: Instruction, computation_name: str) -> Work:
        kind = instruction.opcode.removesuffix("-start")
        chain = _chain(instruction)
        starts = chain or (instruction.name if instruction.opcode.endswith("-start") else None)
        if chain:
            self._links_left[chain] -= 1
            if chain in self._begun:
                last = chain if not self._links_left[chain] else None
                return Work("collectives", waits_for=last)
            self._begun.add(chain)
        computation = self._module.computations[computation_name]
        operands = [computation[name] for name in instruction.operands if name in computation]
        read = sum(main_memory_bytes(operand.type_text) for operand in operands)
        written = main_memory_bytes(instruction.type_text)
        if instruction.opcode == "collective-permute-start":
            written = read
        elif instruction.opcode == "all-gather-start":
            written = max(0, written - read)  # the type repeats the operands

        payload = sum(all_bytes(operand.type_text) for operand in operands)
        groups = read_groups(instruction.text, self._module.num_devices)
        size = 2 if kind == "collective-permute" else groups.shape[1]
        span = int((groups.max(1) - groups.min(1)).max()) + 1
        share = (size - 1) / size
        sent = share * payload
        if kind == "all-reduce" and computation_name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the TPU compiler fuses an all-reduce with a slice
        elif kind == "all-reduce":
            sent = 2 * share * payload
        elif kind == "all-gather":
            payload *= size
            sent = share * payload
        elif kind in ("collective-permute", "collective-broadcast"):
            sent = payload
        once = Collective(kind, size, 1, payload, round(sent), span)
        return Work("collectives", read + written, collective=once, starts=starts)
