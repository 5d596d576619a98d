"""Results of the caption rules by version: a changed result must raise `RULES_VERSION`.

    python -m tests.data_prep.captions.test_rules_version

rewrites the golden file after the version was raised. The file holds the graphs of the captions
in caption_examples.toml (by id), and a digest of the graphs of 5,000 web captions.
"""

import hashlib
import pathlib
import tomllib

from data_prep.captions import RULES_VERSION, package_versions, parse_captions
from data_prep.captions.graph import CaptionGraph, cat_reason, format_edges, format_objects
from tests.data_prep import golden

_FOLDER = pathlib.Path(__file__).parent
_GOLDEN = _FOLDER / "rules_golden.json"
_WEB = _FOLDER.parents[3] / "shared" / "data" / "captions_web.txt"


def _describe(graph: CaptionGraph) -> str:
    parts = (format_objects(graph), format_edges(graph.actions), format_edges(graph.relations))
    return " | ".join((*parts, cat_reason(graph) or "keep"))


def _own_graphs() -> dict[str, str]:
    text = (_FOLDER / "caption_examples.toml").read_text(encoding="utf-8")
    captions = {example["id"]: example["caption"] for example in tomllib.loads(text)["example"]}
    graphs = parse_captions(list(captions.values()))
    return dict(zip(captions, map(_describe, graphs), strict=True))


def _web_digest(path: pathlib.Path) -> str:
    captions = path.read_text(encoding="utf-8").splitlines()
    lines = map(_describe, parse_captions(captions))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_graphs_change_only_with_the_version():
    graphs = _own_graphs()
    assert len(graphs) > 250
    golden.require_unchanged(_GOLDEN, RULES_VERSION, graphs)


def test_graphs_of_web_captions_change_only_with_the_version(shared_data):
    digest = _web_digest(shared_data / "captions_web.txt")
    golden.require_unchanged(_GOLDEN, RULES_VERSION, {_WEB.name: digest})


if __name__ == "__main__":
    graphs = _own_graphs() | {_WEB.name: _web_digest(_WEB)}
    golden.write(_GOLDEN, RULES_VERSION, graphs, packages=package_versions())
