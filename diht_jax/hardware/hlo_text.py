"""Parser of the text of optimised HLO: instructions, array sizes, and groups of devices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "f8": 8, "token": 0, "tuple": 0, "opaque": 0}
# Devices in HLO's iota notation: [4,8]T(1,0) is 0, 1, ... 31 as [4, 8], transposed.
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction (line) of a computation."""

    name: str
    type_text: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # attributes after the operands
    is_root: bool

    def callee(self, attribute: str) -> str:
        """Returns the name of the computation in an attribute such as `body`."""
        found = re.search(rf"\b(?:{attribute})=%?([\w.\-]+)", self.text)
        assert found is not None
        return found.group(1)


@dataclasses.dataclass(frozen=True)
class Module:
    """An HLO module: its computations by name, each with its instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_devices: int


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


def parse_module(text: str) -> Module:
    """Parses `compiled.as_text()`."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            instruction = _parse_instruction(line[found.end() :], found.group(2), found.group(1))
            current[instruction.name] = instruction
    assert entry is not None
    partitions, replicas = (
        re.search(rf"\b{name}=(\d+)", text[: text.find("\n")])
        for name in ("num_partitions", "replica_count")
    )
    num_devices = math.prod(int(found.group(1)) for found in (partitions, replicas) if found)
    return Module(computations, entry, num_devices)


def _parse_instruction(text: str, name: str, root: str | None) -> Instruction:
    type_end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    type_text, rest = text[:type_end], text[type_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : end]))
    if opcode in ("constant", "parameter"):
        operands = (rest[len(opcode) + 1 : end],)
    return Instruction(name, type_text, opcode, operands, rest[end + 1 :], root is not None)


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"HLO line without its closing parenthesis: {text[:80]}")


def arrays_of(type_text: str) -> Iterator[tuple[int, bool]]:
    """Yields (bytes, whether it is in HBM) for each array of a type, which may be a tuple."""
    pattern = r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?"
    for dtype, sizes, layout in re.findall(pattern, type_text):
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        yield elements * _bits(dtype) // 8, not re.search(r"S\([1-9]", layout)


def _bits(dtype: str) -> int:
    for prefix in (dtype, dtype[:2]):
        if prefix in _BITS:
            return _BITS[prefix]
    return int(re.findall(r"\d+", dtype)[0])


def all_bytes(type_text: str) -> int:
    """Returns the bytes of all arrays of a type."""
    return sum(size for size, _ in arrays_of(type_text))


def main_memory_bytes(type_text: str) -> int:
    """Returns the bytes of the arrays of a type that are in HBM."""
    return sum(size for size, in_main_memory in arrays_of(type_text) if in_main_memory)


def _shape(type_text: str) -> list[int]:
    """Returns the shape of the first array of a type."""
    sizes = re.search(r"\[([\d,]*)\]", type_text)
    return _integers(sizes.group(1)) if sizes and sizes.group(1) else []


def product_flops(instruction: Instruction, computation: dict[str, Instruction]) -> tuple[int, int]:
    """Returns the FLOPs of one matrix product, as (lower precision, full-precision float32).

    Counts `dot`, and calls of cuBLAS and of cuDNN's convolutions and attention. On TPUs, matrix
    products are convolutions, whose cost the compiler estimates.
    """
    text = instruction.text
    library = re.search(r"__cublas\$|__cudnn\$(?:conv|fmha)", text)
    if instruction.opcode != "dot" and not library:
        return 0, 0
    operands = [_shape(computation[name].type_text) for name in instruction.operands[:2]]
    if library and library.group().endswith("fmha"):
        num_products = 5 if "Backward" in text else 2
        logits = _json_integers("dimensions", text[text.index('"intermediate_tensor_shape"') :])
        return num_products * 2 * math.prod(logits) * operands[0][-1], 0
    result = _shape(instruction.type_text)
    if library and library.group().endswith("conv"):
        kernel, output = operands[1], result
        if "convBackwardFilter" in text:
            kernel, output = result, operands[1]
        elif "convBackwardInput" in text:
            output = operands[0]
        (labels,) = re.findall(r"dim_labels=\w+?_(\w+)->", text)[:1]
        return 2 * math.prod(output) * math.prod(kernel) // kernel[labels.index("o")], 0
    listed = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", text)
    contracted = listed and _integers(listed.group(1))
    contracted = contracted or _json_integers("lhs_contracting_dimensions", text)
    flops = 2 * math.prod(result) * math.prod(operands[0][axis] for axis in contracted)
    in_full = re.search(r'operand_precision(?:=\{|":\s*\[")highest', text, re.IGNORECASE)
    is_float32 = computation[instruction.operands[0]].type_text.startswith("f32")
    return (0, flops) if in_full and is_float32 else (flops, 0)


def _json_integers(key: str, text: str) -> list[int]:
    """Returns the first list of quoted integers with this key in the text of a JSON object."""
    found = re.search(rf'"{key}":\s*\[([^\]]*)\]', text)
    return [int(number) for number in re.findall(r"\d+", found.group(1))] if found else []


def read_groups(text: str, num_devices: int) -> np.ndarray:
    """Reads `replica_groups` in any of its three notations, or the pairs of a permutation.

    Returns:
        int [groups, devices], positions in the mesh; one group of all devices if the text has none.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", text)
    if iota:
        return _iota(*iota.groups()[2:]).reshape(int(iota.group(1)), int(iota.group(2)))
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]+)\}\}", text)
    if listed:
        return np.array([_integers(group) for group in listed.group(1).split("},{")])
    return np.arange(num_devices)[None]


def _mesh_groups(axes_text: str, devices_text: str, together_text: str) -> np.ndarray:
    """Reads ("'a'=4,'b'=8", ", device_ids=([4,8])", "'b'") as groups along the axis b."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes_text)}
    together = re.findall(r"'([^']+)'", together_text)
    order = sorted(range(len(axes)), key=lambda axis: list(axes)[axis] in together)
    named = re.search(rf"device_ids=\({_IOTA}\)", devices_text)
    devices = _iota(*named.groups()) if named else np.arange(math.prod(axes.values()))
    grid = devices.reshape(*axes.values()).transpose(order)
    return grid.reshape(-1, math.prod(axes[name] for name in together))


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _integers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_integers(order) if order else None)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def trip_count(
    module: Module, loop: Instruction, computation: dict[str, Instruction]
) -> int | None:
    """Returns the trip count of a `while` of a computation, or None if it is unknown."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.callee("condition")]
    test = next(instruction for instruction in condition.values() if instruction.is_root)
    ends = [condition[name] for name in test.operands if name in condition]
    if (
        test.opcode != "compare"
        or "direction=LT" not in test.text
        or len(ends) != 2
        or ends[0].opcode != "get-tuple-element"
        or ends[1].opcode != "constant"
        or not (counter := re.search(r"index=(\d+)", ends[0].text))
    ):
        return None
    start = _start_value(loop, int(counter.group(1)), computation)
    return None if start is None else int(ends[1].operands[0]) - start


def _start_value(loop: Instruction, index: int, computation: dict[str, Instruction]) -> int | None:
    """Returns the constant initial value of a loop's counter, or None."""
    state = computation.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    value = computation.get(state.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = computation.get(value.operands[0])
    if value is None or value.opcode != "constant":
        return None
    return int(value.operands[0])
