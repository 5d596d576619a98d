"""Memory traffic and collectives of a compiled program, read from its optimised HLO.

XLA's cost analysis counts the body of a loop once; here every instruction counts as often as it
runs, by the trip counts of the loops around it. FLOPs are counted by `flops`, on the jaxpr.
"""

from __future__ import annotations

import collections
import dataclasses
import re

from diht_jax.hardware.hlo_text import (
    Instruction,
    Module,
    all_bytes,
    arrays_of,
    main_memory_bytes,
    parse_module,
    read_groups,
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
# Instructions that read and write nothing themselves.
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
    """One kind of communication, summed over the program, for one device.

    Attributes:
        kind: one of `COLLECTIVES`.
        group_size: devices that take part together; 2 for a permutation.
        count: how often it runs.
        payload_bytes: of the array that is reduced, gathered (its whole) or passed on.
        sent_bytes: what a device sends over its links with a bandwidth-optimal algorithm:
            (g-1)/g of the payload to gather, to scatter or to exchange, twice that to reduce, all
            of it to permute.
        span: devices of the mesh from the first to the last one that communicate with each other,
            at most; None where that is not known.
    """

    kind: str
    group_size: int
    count: int
    payload_bytes: int
    sent_bytes: int
    span: int | None = None


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Memory traffic and communication of one device.

    Attributes:
        memory_bytes: read from and written to the device's main memory (HBM), by the operands and
            results of the program's instructions.
        collectives: by kind and group size, largest first.
        unknown_loops: loops whose trip count could not be read; their bodies are counted once.
        bytes_by_kind: `memory_bytes` by what the instructions do, largest first: "products",
            "kernels" (attention), "element-wise" (with sums), "copies", "collectives".
    """

    memory_bytes: int
    collectives: tuple[Collective, ...]
    unknown_loops: int
    bytes_by_kind: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def sent_bytes(self) -> int:
        """Over the links, all collectives together."""
        return sum(c.sent_bytes for c in self.collectives)


def count_traffic(hlo_text: str) -> Traffic:
    """Counts what the program moves.

    Args:
        hlo_text: `compiled.as_text()` of one program.
    """
    return _Counter(parse_module(hlo_text)).run()


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def _is_bookkeeping(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and bool(
        re.search(r"AllocateBuffer|AsyncCollective", instruction.text)
    )


class _Counter:
    """Walks the computations from the entry, with how often each is run."""

    def __init__(self, module: Module):
        self._module = module
        self._bytes_by_kind: collections.Counter[str] = collections.Counter()
        self._unknown_loops = 0
        self._chains: set[str] = set()
        self._collectives: dict[tuple[str, int, int], list[int]] = collections.defaultdict(
            lambda: [0, 0, 0]
        )

    def run(self) -> Traffic:
        self._visit(self._module.entry, 1, touches_memory=True)
        rows = [
            Collective(kind, size, *values, span)
            for (kind, size, span), values in self._collectives.items()
        ]
        rows.sort(key=lambda row: -row.sent_bytes)
        by_kind = dict(self._bytes_by_kind.most_common())
        return Traffic(sum(by_kind.values()), tuple(rows), self._unknown_loops, by_kind)

    def _visit(self, name: str, times: int, touches_memory: bool) -> None:
        computation = self._module.computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                self._add_collective(kind, instruction, name, times)
                continue
            if opcode == "while":
                trips = self._trip_count(instruction, computation)
                for attribute, runs in (("body", trips), ("condition", trips + 1)):
                    self._visit(instruction.callee(attribute), times * runs, touches_memory)
                continue
            if opcode == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", instruction.text):
                    if branch in self._module.computations:
                        self._visit(branch, times, touches_memory)
                continue
            called = instruction.called("calls")
            if opcode == "call":
                self._visit(called or instruction.callee("to_apply"), times, touches_memory)
                continue
            if opcode in ("fusion", "async-start"):
                self._visit(called or instruction.callee("to_apply"), times, touches_memory=False)
            if touches_memory and (size := self._instruction_bytes(instruction, computation)):
                self._bytes_by_kind[self._kind(instruction)] += times * size

    def _kind(self, instruction: Instruction) -> str:
        if instruction.opcode == "custom-call":
            is_attention = re.search(r"tpu_custom_call|fmha", instruction.text)
            return "kernels" if is_attention else "products"
        if instruction.opcode == "fusion" and self._has_product(instruction.callee("calls")):
            return "products"
        if instruction.opcode in _PRODUCTS:
            return "products"
        is_copy = instruction.opcode.removesuffix("-start") in ("copy", "transpose")
        return "copies" if is_copy else "element-wise"

    def _has_product(self, name: str) -> bool:
        """True if a computation holds a matrix product, at any depth."""
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
        if opcode == "copy-start":
            # (destination, source, context)
            arrays = list(arrays_of(instruction.type_text))[:2]
            return sum(size for size, in_main_memory in arrays if in_main_memory)
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
        """Like its parts: a slice of an operand reads the slice, an update in place writes it."""
        total = 0
        users = collections.defaultdict(list)
        for instruction in body.values():
            for position, name in enumerate(instruction.operands):
                users[name].append((instruction, position))
        for instruction in body.values():
            if instruction.opcode == "parameter":
                whole = read[int(instruction.operands[0])]
                total += min(whole, self._bytes_used(instruction, users, body, whole))
            if instruction.is_root:
                total += self._bytes_made(instruction, body)
        return total

    def _bytes_used(self, parameter, users, body, whole: int) -> int:
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

    def _add_collective(
        self, kind: str, instruction: Instruction, computation_name: str, times: int
    ) -> None:
        # The TPU compiler spreads one collective over several fusions, each a link of a chain.
        chain = re.search(r'chain_id="(\d+)"', instruction.text)
        if chain and chain.group(1) in self._chains:
            return
        if chain:
            self._chains.add(chain.group(1))
        computation = self._module.computations[computation_name]
        operands = [computation[name] for name in instruction.operands if name in computation]
        read = sum(main_memory_bytes(operand.type_text) for operand in operands)
        written = main_memory_bytes(instruction.type_text)
        if instruction.opcode == "collective-permute-start":
            written = read
        elif instruction.opcode == "all-gather-start":
            written = max(0, written - read)  # the type repeats the operands
        if read + written:
            self._bytes_by_kind["collectives"] += times * (read + written)

        payload = sum(all_bytes(operand.type_text) for operand in operands)
        groups = read_groups(instruction.text, self._module.num_devices)
        size = 2 if kind == "collective-permute" else groups.shape[1]
        span = int((groups.max(1) - groups.min(1)).max()) + 1
        share = (size - 1) / size
        sent = share * payload
        if kind == "all-reduce" and computation_name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # which the TPU compiler fuses of an all-reduce and a slice
        elif kind == "all-reduce":
            sent = 2 * share * payload
        elif kind == "all-gather":
            payload *= size
            sent = share * payload
        elif kind in ("collective-permute", "collective-broadcast"):
            sent = payload
        row = self._collectives[kind, size, span]
        row[0] += times
        row[1] += times * payload
        row[2] += times * round(sent)

    def _trip_count(self, loop: Instruction, computation) -> int:
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text)
        if known:
            return int(known.group(1))
        condition = self._module.computations[loop.callee("condition")]
        root = next(i for i in condition.values() if i.is_root)
        test = root
        if root.opcode == "fusion":
            return self._unknown_loop()
        ends = [condition[name] for name in test.operands if name in condition]
        if (
            test.opcode != "compare"
            or "direction=LT" not in test.text
            or len(ends) != 2
            or ends[0].opcode != "get-tuple-element"
            or ends[1].opcode != "constant"
            or not (counter := re.search(r"index=(\d+)", ends[0].text))
        ):
            return self._unknown_loop()
        start = self._start_value(loop, int(counter.group(1)), computation)
        return self._unknown_loop() if start is None else int(ends[1].operands[0]) - start

    def _start_value(self, loop: Instruction, index: int, computation) -> int | None:
        """The constant that a loop's counter starts from."""
        state = computation.get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return None
        value = computation.get(state.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = computation.get(value.operands[0])
        if value is None or value.opcode != "constant":
            return None
        return int(value.operands[0])

    def _unknown_loop(self) -> int:
        self._unknown_loops += 1
        return 1
