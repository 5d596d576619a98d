"""Tokenizer files: reads those that come with a model, and writes CLIP's.

Reading a model's folder determines the tokenizer's file and how texts are cleaned, padded and
marked. `diht_jax.data.tokenizer` computes the ids.

CLIP's tokenizer is written as a `tokenizer.json` whose normaliser approximates our text cleaning.
It covers those of ftfy's repairs and HTML entities that are plain replacements. Repairs that depend
on context, above all of broken encodings ("â€™"), are not possible in `tokenizers`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Collection, Mapping
from typing import Any

import tokenizers
from ftfy import chardata
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from diht_jax.data import tokenizer
from diht_jax.data.tokenizer import CLEANINGS, FileTokenizer
from diht_jax.storage import files
from diht_jax.weights.settings import read_config

TOKENIZER_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"
SIGLIP_MODEL, _SIGLIP = "spiece.model", "SiglipTokenizer"
_MODEL_FILES = (TOKENIZER_JSON, SIGLIP_MODEL)
# File of a copied tokenizer with the settings read from the original folder's configs.
_SETTINGS = "tokenizer_settings.json"
TOKENIZER_FILES = (*_MODEL_FILES, _CONFIG, "special_tokens_map.json", _SETTINGS)
_DESCRIBED = "described"  # key in that file, with a hash of the tokenizer file

START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"

# Applied as often as CLIP unescapes (twice); "&amp;" comes last, as in a single pass.
_ENTITIES = {
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "&#34;": '"',
    "&#39;": "'",
    "&#039;": "'",
    "&#x27;": "'",
    "&apos;": "'",
    "&nbsp;": " ",
    "&#160;": " ",
    "&ndash;": "\u2013",
    "&mdash;": "\u2014",
    "&hellip;": "\u2026",
    "&lsquo;": "\u2018",
    "&rsquo;": "\u2019",
    "&ldquo;": "\u201c",
    "&rdquo;": "\u201d",
    "&amp;": "&",
}
# ASCII control characters except whitespace, deprecated ones, and byte order marks.
_CONTROL_CHARACTERS = r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


def read_tokenizer(folder: str | pathlib.Path, clean: str = "none") -> FileTokenizer | None:
    """Reads the tokenizer in a model's folder, or in a copy made by `copy_tokenizer`.

    Args:
        folder: local folder.
        clean: cleaning of texts before tokenization, as in open_clip; one of `CLEANINGS`.

    Returns:
        The tokenizer; None if there is no tokenizer file.

    Raises:
        ValueError: the tokenizer cannot be read, or truncates texts at their start.
    """
    folder = pathlib.Path(folder)
    if is_copy([path.name for path in folder.glob("*.json")]):
        return _read_copy(folder)
    found = [name for name in _MODEL_FILES if (folder / name).is_file()]
    if not found:
        return None
    path = folder / _CONFIG
    config = read_config(path)
    if config.get("truncation_side", "right") != "right":
        raise ValueError(
            f"{path}: truncation_side={config['truncation_side']!r:.80}; expected 'right', since "
            "texts are cut at their end here"
        )
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    is_siglip = SIGLIP_MODEL in found and (kind == _SIGLIP or found == [SIGLIP_MODEL])
    if is_siglip and kind not in ("", _SIGLIP):
        raise ValueError(
            f"{folder}: {SIGLIP_MODEL} of {kind}; {TOKENIZER_JSON} is expected with it, which "
            "save_pretrained of transformers' tokenizer writes"
        )
    is_gemma = kind in ("GemmaTokenizer", "Siglip2Tokenizer")
    tokens = {"eos_token": "<eos>", "bos_token": "<bos>"} if is_gemma else {"eos_token": "</s>"}
    tokens["pad_token"] = "</s>" if is_siglip or kind == _SIGLIP else "<pad>"
    for values in (read_config(folder / "special_tokens_map.json"), config):
        for key, value in values.items():
            text = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    adds_start, adds_end = (config.get(f"add_{end}_token") for end in ("bos", "eos"))
    made = FileTokenizer(
        path=str(folder / (SIGLIP_MODEL if is_siglip else found[0])),
        pad=tokens["pad_token"],
        pads_left=config.get("padding_side", "left" if is_gemma else "right") == "left",
        clean=clean,
        # SigLIP 2 was trained on lower case, which Gemma's own tokenizer does not apply.
        lower_case=bool(config.get("do_lower_case", True)) and (is_gemma or is_siglip),
        start=tokens["bos_token"] if adds_start else "",
        end=tokens["eos_token"] if adds_end or is_siglip else "",
        has_own_ends=adds_start is not None or adds_end is not None,
        unknown=tokens.get("unk_token", "<unk>"),
    )
    made.check()
    return made


def copy_tokenizer(made: FileTokenizer, folder: str) -> None:
    """Copies a tokenizer to a folder or URL, from which `read_tokenizer` restores it.

    Files that other libraries read are copied too.
    """
    files.make_folder(folder)
    for name in TOKENIZER_FILES:
        path = pathlib.Path(made.path).with_name(name)
        if path.is_file():
            with files.local_output(files.join(folder, name)) as temporary:
                shutil.copyfile(path, temporary)
    settings = dataclasses.asdict(made) | {
        "path": pathlib.Path(made.path).name,
        _DESCRIBED: made.describe(),
    }
    files.write_object(files.join(folder, _SETTINGS), settings, with_checksum=True)


def is_copy(names: Collection[str]) -> bool:
    """Returns whether a folder with these files was made by `copy_tokenizer`."""
    return _SETTINGS in names


def _read_copy(folder: pathlib.Path) -> FileTokenizer:
    found = files.read_object(str(folder / _SETTINGS)) or {}
    fields = {field.name for field in dataclasses.fields(FileTokenizer)}
    if not fields <= found.keys() or found["path"] not in _MODEL_FILES:
        raise ValueError(f"{folder / _SETTINGS}: damaged; copy the folder '{folder.name}' again")
    settings: dict[str, Any] = {name: found[name] for name in fields}
    settings["path"] = str(folder / found["path"])
    made = FileTokenizer(**settings)
    if pathlib.Path(made.path).is_file() and made.describe() != found.get(
        _DESCRIBED, made.describe()
    ):
        raise ValueError(
            f"{made.path}: damaged, or of another model: it is not the file that was copied; copy "
            f"the folder '{folder.name}' again"
        )
    made.check()
    return made


def read_cleaning(text: Mapping[str, Any], path: str) -> str | None:
    """Reads open_clip's text cleaning for the tokenizer in "text_cfg"; None for CLIP's.

    Raises:
        ValueError: the tokenizer has an unsupported setting.
    """
    has_other, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    where = f"{path}: text_cfg"
    clean = options.get("clean", "whitespace" if has_other else "lower")
    others = {name: value for name, value in options.items() if name != "clean"}
    for name, value in {**others, "tokenizer_mode": text.get("tokenizer_mode")}.items():
        if value:
            raise ValueError(f"{where}: {name:.80}={value!r:.80}; our tokenizers do not have this")
    if clean not in CLEANINGS[1:] or (not has_other and clean != "lower"):
        raise ValueError(
            f"{where}: clean={clean!r:.80}; our tokenizers do not clean texts like this"
        )
    return clean if has_other else None


def pieces(vocab_size: int) -> list[str]:
    """Returns the vocabulary by id, with the markers named as in transformers."""
    return [*tokenizer.vocabulary(vocab_size)[:-2], START_OF_TEXT, END_OF_TEXT]


def make_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """Returns a tokenizer for `PreTrainedTokenizerFast`, which adds both markers to each text."""
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces(vocab_size))},
            merges=tokenizer.merges(vocab_size),
            end_of_word_suffix="</w>",
            unk_token=END_OF_TEXT,
        )
    )
    made.normalizer = make_normalizer()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.post_processor = processors.RobertaProcessing(
        (END_OF_TEXT, vocab_size - 1),
        (START_OF_TEXT, vocab_size - 2),
        trim_offsets=False,
        add_prefix_space=False,
    )
    made.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    )
    for marker in (START_OF_TEXT, END_OF_TEXT):
        made.add_special_tokens([tokenizers.AddedToken(marker, normalized=False)])
    return made


def make_normalizer() -> normalizers.Normalizer:
    """Normalises quotes, ligatures, widths, entities, control characters; NFC and lower case."""
    entities = [normalizers.Replace(*pair) for pair in _ENTITIES.items()]
    replaced = [
        (tokenizers.Regex("[\u02bc\u2018-\u201b]"), "'"),
        (tokenizers.Regex("[\u201c-\u201f]"), '"'),
        *((chr(code), text) for code, text in chardata.LIGATURES.items()),
        *((chr(code), text) for code, text in chardata.WIDTH_MAP.items()),
        (tokenizers.Regex(_CONTROL_CHARACTERS), ""),
    ]
    return normalizers.Sequence(
        [
            *entities,
            *entities,
            *(normalizers.Replace(*pair) for pair in replaced),
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
