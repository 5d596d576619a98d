"""The lists of kept pairs that other programs read."""

import numpy as np
import pyarrow

from data_prep.decisions import table
from data_prep.decisions.table import DecisionWriter, decisions_path, pack_uid


def _write(output: str, rows: list[tuple[str, str | None]]) -> None:
    """Writes decisions for kept pairs, with a dropped pair before each of them."""
    writer = DecisionWriter()
    dropped = {"key": "dropped", "outcome": "caption", "uid": pack_uid("0123456789abcdef" * 2)}
    for number, (key, uid) in enumerate(rows):
        writer.add(2 * number, dropped)
        writer.add(2 * number + 1, {"key": key, "outcome": "kept", "uid": pack_uid(uid)})
    writer.write(decisions_path(output))


def test_lists_of_keys_and_uids(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    uids = ["".join(rng.choice(list("0123456789abcdef"), 32)) for _ in range(300)]
    uids += ["ffffffffffffffff0000000000000001", "00000000000000020000000000000003"]
    outputs = []
    for i in range(3):
        rows = [(f"key {n}", uids[n].upper() if n % 2 else uids[n]) for n in range(i, len(uids), 3)]
        rows += [("repeated", uids[0]), ("without\na uid", "no uid")]
        outputs.append(str(tmp_path / f"{i}.tfrecord"))
        _write(outputs[-1], rows)
    for block in (2**20, 40):  # in one write, and block by block
        monkeypatch.setattr(table, "_BLOCK_UIDS", block)
        table.write_lists(str(tmp_path), table.read_kept(outputs))
        found = np.load(tmp_path / "kept_uids.npy")
        # Built like in DataComp's own tools.
        expected = np.array(
            sorted({(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids}), np.dtype("u8,u8")
        )
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    keys = (tmp_path / "kept_keys.txt").read_text().splitlines()
    assert keys[:2] == ["key 0", "key 3"]
    assert len(keys) == len(uids) + 6 and keys.count("without a uid") == 3
    assert sorted(path.name for path in tmp_path.iterdir() if "decisions" not in path.name) == [
        "kept_keys.txt",
        "kept_uids.npy",
    ]


def test_no_column_is_read_as_a_dictionary(tmp_path):
    # Indices of missing texts are undefined then, and Arrow crashes where it unifies dictionaries.
    _write(str(tmp_path / "x"), [("a", None)])
    for rows in table.read_decisions(decisions_path(str(tmp_path / "x"))):
        assert not any(pyarrow.types.is_dictionary(field.type) for field in rows.schema)


def test_without_uids_there_is_no_array(tmp_path):
    _write(str(tmp_path / "x"), [("a", None)])
    (tmp_path / "kept_uids.npy").write_bytes(b"old")
    table.write_lists(str(tmp_path), table.read_kept([str(tmp_path / "x")]))
    assert not (tmp_path / "kept_uids.npy").exists()
    assert (tmp_path / "kept_keys.txt").read_text() == "a\n"
