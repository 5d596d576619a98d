"""Reads the files that W&B's client writes offline, and that `wandb sync` sends.

The format is LevelDB's log: after a header of 7 bytes, blocks of 32 KiB with parts of records. Each
part is a CRC32, a length, and a type: 1 the whole record, 2 its first part, 3 one in the middle, 4
its last. Records are W&B's own protocol buffers.
"""

import json
import pathlib
import struct
import zlib

_BLOCK, _HEADER = 2**15, 7


def read_wandb_file(folder: pathlib.Path) -> list:
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, parts, position = [], [], 7
    while position + _HEADER <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _HEADER:  # the rest of a block is empty
            position += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + _HEADER : position + _HEADER + length]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        parts.append(part)
        position += _HEADER + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return records


def history_of(records: list) -> list[dict]:
    """The rows that were logged, without W&B's own entries."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item for item in record.history.item}
            row = {name: json.loads(item.value_json) for name, item in items.items()}
            rows.append({name: value for name, value in row.items() if name[0] != "_"})
    return rows
