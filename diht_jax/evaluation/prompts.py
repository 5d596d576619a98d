"""Class names and prompt templates, and where to read them.

Words only: no model, no image.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
from collections.abc import Sequence

CLASS_SLOT = "{}"
CAPTION_SLOT = "{caption}"

_BENCHMARK_PREFIX = "clip_benchmark:"

PLAIN_TEMPLATES = ("a photo of a {}.",)
# The retrieval prompt of the official DiHT inference code.
CAPTION_TEMPLATE = "a photo of {caption}."

# No installed package has them: clip-benchmark takes them from the data set, whose file
# `batches.meta.txt` names the labels 0 to 9 (Krizhevsky, "Learning Multiple Layers of Features from
# Tiny Images", 2009).
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

# The folders of UCF-101 with spaces, and its prompts, as the file `data/prompts.md` of CLIP's
# repository (github.com/openai/CLIP, MIT licence) has them.
UCF101_CLASSES = tuple(
    name.strip()
    for name in """
    Apply Eye Makeup, Apply Lipstick, Archery, Baby Crawling, Balance Beam, Band Marching, Baseball
    Pitch, Basketball, Basketball Dunk, Bench Press, Biking, Billiards, Blow Dry Hair, Blowing
    Candles, Body Weight Squats, Bowling, Boxing Punching Bag, Boxing Speed Bag, Breast Stroke,
    Brushing Teeth, Clean And Jerk, Cliff Diving, Cricket Bowling, Cricket Shot, Cutting In Kitchen,
    Diving, Drumming, Fencing, Field Hockey Penalty, Floor Gymnastics, Frisbee Catch, Front Crawl,
    Golf Swing, Haircut, Hammer Throw, Hammering, Hand Stand Pushups, Handstand Walking, Head
    Massage, High Jump, Horse Race, Horse Riding, Hula Hoop, Ice Dancing, Javelin Throw, Juggling
    Balls, Jump Rope, Jumping Jack, Kayaking, Knitting, Long Jump, Lunges, Military Parade, Mixing,
    Mopping Floor, Nunchucks, Parallel Bars, Pizza Tossing, Playing Cello, Playing Daf, Playing
    Dhol, Playing Flute, Playing Guitar, Playing Piano, Playing Sitar, Playing Tabla, Playing
    Violin, Pole Vault, Pommel Horse, Pull Ups, Punch, Push Ups, Rafting, Rock Climbing Indoor, Rope
    Climbing, Rowing, Salsa Spin, Shaving Beard, Shotput, Skate Boarding, Skiing, Skijet, Sky
    Diving, Soccer Juggling, Soccer Penalty, Still Rings, Sumo Wrestling, Surfing, Swing, Table
    Tennis Shot, Tai Chi, Tennis Swing, Throw Discus, Trampoline Jumping, Typing, Uneven Bars,
    Volleyball Spiking, Walking With Dog, Wall Pushups, Writing On Board, Yo Yo
    """.replace("\n    ", " ").split(",")
)
UCF101_TEMPLATES = tuple(
    f"a {medium} of {article} person {verb}{{}}."
    for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
    for article in ("a", "the")
    for medium in ("photo", "video", "example", "demonstration")
)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple; none at all, or one without exactly one "{}", is a ValueError."""
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates: expected a list of at least one template, got {templates!r}")
    for template in templates:
        if template.count(CLASS_SLOT) != 1:
            raise ValueError(
                f"template {template!r}: expected '{CLASS_SLOT}' once, where the class name goes, "
                "such as 'a photo of a {}.'"
            )
    return tuple(templates)


def fill_template(template: str, class_name: str) -> str:
    """The template with the class name instead of "{}"; braces in the name stay."""
    return template.replace(CLASS_SLOT, class_name)


def fill_caption_template(template: str, caption: str) -> str:
    """The template with the caption instead of "{caption}"; braces in the caption stay.

    The caption goes in as it is (a full stop at its end is kept), as in the official code.

    Raises:
        ValueError: the template does not hold "{caption}" exactly once.
    """
    if template.count(CAPTION_SLOT) != 1:
        raise ValueError(
            f"caption template {template!r}: expected '{CAPTION_SLOT}' once, such as "
            f"'{CAPTION_TEMPLATE}', or '{CAPTION_SLOT}' alone for the plain caption"
        )
    return template.replace(CAPTION_SLOT, caption)


def parse_templates(text: str) -> tuple[str, ...]:
    """Templates from a command line.

    Args:
        text: "cifar10" or "imagenet" for the sets of CLIP, "clip_benchmark:NAME" for any of that
            package, "@FILE" for a file with one template a line, else templates with ";" between
            them.
    """
    if text.startswith(_BENCHMARK_PREFIX):
        return benchmark_templates(text.removeprefix(_BENCHMARK_PREFIX))
    if text == "cifar10":
        return benchmark_templates(text)
    if text == "imagenet":
        return imagenet_prompts()[1]
    parts = read_lines(text[1:]) if text.startswith("@") else text.split(";")
    return check_templates([part.strip() for part in parts if part.strip()])


def read_class_names(path: str | pathlib.Path) -> tuple[str, ...]:
    """Class names from a text file, one a line; the line number (from 0) is the integer label.

    Args:
        path: of the file, or of a `.json` list; or "clip_benchmark:NAME" for those of that package.

    Raises:
        ValueError: no such file, a blank line, or no names.
    """
    text = str(path)
    if text.startswith(_BENCHMARK_PREFIX):
        return benchmark_class_names(text.removeprefix(_BENCHMARK_PREFIX))
    if text.endswith(".json"):
        return _read_json_names(pathlib.Path(path))
    return check_class_names(read_lines(path), path)


def check_class_names(lines: Sequence[str], path: str | pathlib.Path) -> tuple[str, ...]:
    """The lines of a file of class names as a tuple; a blank one, or none, is a ValueError."""
    names = tuple(lines)
    blank = [number for number, name in enumerate(names, start=1) if not name]
    if not names or blank:
        raise ValueError(
            f"{path}: expected one class name a line, "
            + (f"line {blank[0]} is blank" if blank else "the file is empty")
        )
    return names


def benchmark_class_names(name: str) -> tuple[str, ...]:
    """Class names of the installed package clip_benchmark, in label order.

    Raises:
        ValueError: it is not installed, or has no such names.
    """
    return tuple(_read_benchmark("en_classnames.json", name))


def benchmark_templates(name: str) -> tuple[str, ...]:
    """Templates of the installed package clip_benchmark, with its "{c}" as "{}".

    Raises:
        ValueError: it is not installed, or has no such templates.
    """
    lines = _read_benchmark("en_zeroshot_classification_templates.json", name)
    return check_templates([line.replace("{c}", CLASS_SLOT) for line in lines])


@functools.cache
def imagenet_prompts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The 1,000 class names of ImageNet in label order and the 80 templates, both CLIP's.

    They are read from the data file of an installed open_clip, which alone is executed: neither
    open_clip nor torch is imported.

    Raises:
        ValueError: open_clip is not installed, or its file is not as expected.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "the class names of ImageNet come with open_clip, which is not installed; run "
            "`pip install open_clip_torch`, or pass --class_names FILE and --templates"
        )
    path = pathlib.Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    try:
        spec = importlib.util.spec_from_file_location("_open_clip_zero_shot_metadata", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = tuple(module.IMAGENET_CLASSNAMES)
        templates = tuple(make(CLASS_SLOT) for make in module.OPENAI_IMAGENET_TEMPLATES)
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected IMAGENET_CLASSNAMES and OPENAI_IMAGENET_TEMPLATES of open_clip 2 "
            f"or 3 ({error}); pass --class_names FILE and --templates instead"
        ) from error
    return names, check_templates(templates)


def _read_benchmark(file: str, name: str) -> list[str]:
    """One entry of a data file of clip_benchmark; the package itself is not imported."""
    package = importlib.util.find_spec("clip_benchmark")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            f"the words of '{name}' come with clip-benchmark, which is not installed; run "
            "`pip install clip-benchmark`, or give class_names=FILE and templates=..."
        )
    path = pathlib.Path(package.submodule_search_locations[0]) / "datasets" / file
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a data file of clip-benchmark 1.6 ({error})") from error
    if name not in entries:
        raise ValueError(f"{path} has no '{name}'; it has {', '.join(sorted(entries))}")
    return entries[name]


def _read_json_names(path: pathlib.Path) -> tuple[str, ...]:
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{path}: expected a JSON list of names")
    return tuple(names)


def read_lines(path: str | pathlib.Path) -> list[str]:
    """Lines of a UTF-8 text file without white space around them; a ValueError names the file.

    A byte order mark, which some editors leave, is no part of the first line.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a UTF-8 text file ({error})") from error
    return [line.strip() for line in text.rstrip().splitlines()]
