"""What the caption rules make of fixed captions, by version: a change must raise `RULES_VERSION`.

    python -m tests.data_prep.captions.test_rules_version

writes the golden file anew, once the version was raised. It holds the graphs of the captions of
caption_examples.toml (by id) and of `_OTHERS`, and a digest of the graphs of 5,000 web captions.
"""

import hashlib
import pathlib
import tomllib

from data_prep.captions import parse_captions
from data_prep.captions.graph import CaptionGraph, cat_reason, format_edges, format_objects
from data_prep.captions.versions import RULES_VERSION, package_versions
from tests.data_prep import golden

_FOLDER = pathlib.Path(__file__).parent
_GOLDEN = _FOLDER / "rules_golden.json"
_WEB = _FOLDER.parents[3] / "shared" / "data" / "captions_web.txt"
# Kinds that the examples have few of: refused before the parse, cleaned, or of many clauses.
_OTHERS = """
IMG_2041.JPG
black-dog-running-on-the-grass
https://example.com/cat.jpg
see: http://a.example/b
www.example.com
!!! ... ???
2019
Untitled
Schwarzer Hund spielt im Garten
Femme avec un chapeau rouge
Gato durmiendo
Rio de Janeiro carnival dancers
Café de Flore in Paris
sushi chef
die cast toy car
It 's a dog , and he 's riding a bike
A MAN IN A BLUE SHIRT IS COOKING
Young Woman Doing Yoga On The Beach
<PERSON> riding a horse &amp; smiling
a dog running <b>fast</b> on grass
dog running on grass  |  Getty Images
Image may contain: dog running on grass
a snow - covered hill
1. a dog running
#dog running on #grass
House for sale in Boise, ID 83702
Leather Wallet - Brown - Gift for Men
two dogs and three cats are sleeping under an old wooden table
the boy who wears a green cap throws a ball to his sister
a woman is being helped by a man to cross a busy street
birds fly over the lake while a fisherman waits in his small boat
a cup of coffee next to an open book on a white table
people standing in front of a burning house at night
a tall man with a long beard plays the guitar and sings
the car that was parked on the hill has been towed away
cutting a tomato with a sharp knife
i love my new red shoes
a child jumps, runs and laughs
an empty street in the rain
surfers paddling out to catch a wave
a cat sits on top of a pile of books
a chef in a white hat preparing food in a kitchen
a train passing through a tunnel in the mountains
three horses grazing in a field
a smiling girl holding a teddy bear
a bride and a groom cut a cake
the sun sets behind the mountains
a plane taking off from a runway
a close up of a bee on a yellow flower
a dog that does not bark
stop sign covered in snow
a man is about to hit a tennis ball
broken window of an abandoned house
a group of elephants drinking water from a river
a baker's hands kneading dough
nobody is in the room
""".strip().splitlines()


def _describe(graph: CaptionGraph) -> str:
    parts = (format_objects(graph), format_edges(graph.actions), format_edges(graph.relations))
    return " | ".join((*parts, cat_reason(graph) or "keep"))


def _own_graphs() -> dict[str, str]:
    text = (_FOLDER / "caption_examples.toml").read_text(encoding="utf-8")
    captions = {example["id"]: example["caption"] for example in tomllib.loads(text)["example"]}
    captions |= {caption: caption for caption in _OTHERS}
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
