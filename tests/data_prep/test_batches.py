"""The batch classes: their columns equal the results of the underlying functions."""

import json

import numpy as np
import pyarrow as pa
import pytest

from data_prep.batches import CaptionFilter, Teacher, TextSpotter
from data_prep.captions import cat_reason, parse_captions
from tests.make import encoded, plain

_CAPTIONS = ["a black cat is chasing a small bird", "blue sky", None, "https://example.com/a.jpg"]


def test_captions_are_those_of_the_parser():
    table = pa.table({"id": range(4), "text": _CAPTIONS, "graph": ["old"] * 4})
    judge = CaptionFilter(2, caption_column="text", graphs=True)
    found = judge(table)
    assert found.column_names == ["id", "text", "complexity", "num_actions", "drop_reason", "graph"]
    graphs = parse_captions([text or "" for text in _CAPTIONS])
    assert found["complexity"].to_pylist() == [graph.complexity for graph in graphs]
    assert found["num_actions"].to_pylist() == [len(graph.actions) for graph in graphs]
    reasons = [cat_reason(graph, min_complexity=2) for graph in graphs]
    assert found["drop_reason"].to_pylist() == reasons == [None, "complexity", "empty", "url"]
    first = json.loads(found["graph"][0].as_py())
    assert set(first["objects"]) == set(graphs[0].objects)
    assert [tuple(edge) for edge in first["actions"]] == graphs[0].actions
    assert judge(table.slice(0, 0)).schema == found.schema
    with pytest.raises(ValueError, match="caption_column='text': no such column; the table has id"):
        judge(table.select(["id"]))


def test_pictures_that_need_no_network():
    pytest.importorskip("easyocr")
    table = pa.table(
        {
            "image": [b"no picture", None, b""],
            "caption": [["a caption", "another one"], ["東京タワー"], ["a caption", None]],
        }
    )
    found = TextSpotter(precision="float32", device="cpu")(table)
    assert found["image_error"].to_pylist() == ["unreadable", None, "empty"]
    assert found["match"].to_pylist() == [None] * 3
    assert found["spotted_texts"].to_pylist() == [[]] * 3
    with pytest.raises(ValueError, match="cofidence: expected one of .*min_confidence"):
        TextSpotter(cofidence=0.5)
    with pytest.raises(ValueError, match="gate_size=999"):
        TextSpotter(gate_size=999)


_COLORS = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
"""


def test_embeddings_are_those_of_the_teacher(tmp_path, monkeypatch):
    (tmp_path / "mean_colors.py").write_text(_COLORS)
    monkeypatch.syspath_prepend(tmp_path)
    scale = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    teacher = Teacher("torch", batch_size=2, function="mean_colors:build", image_size=8, **scale)
    images = [encoded(plain("red")), b"no picture", encoded(plain("blue"))]
    found = teacher(pa.table({"image": images}))
    assert found["embedding"].to_pylist() == [[1, 0, 0], None, [0, 0, 1]]
    assert found["embedding_error"].to_pylist() == [None, "image_unreadable", None]
    assert found.schema.field("embedding").type == pa.list_(pa.float32())
    for kind, section in (("batch_size", {}), ("torch", {"weight": "x"})):
        with pytest.raises(ValueError, match="expected"):
            Teacher(kind, **section)


def test_keys_that_are_numbers_are_found_by_their_text(tmp_path):
    np.savez(tmp_path / "a.npz", key=np.array([1, 2]), image_emb=np.eye(2, dtype=np.float32))
    teacher = Teacher("precomputed", key_column="id", files=str(tmp_path / "a.npz"))
    found = teacher(pa.table({"id": [2, 3], "image": [b"", b""]}))
    assert found["embedding"].to_pylist() == [[0, 1], None]
