"""Models on the Hugging Face Hub, by names such as `hf-hub:owner/name`.

Data sets on the Hub have URLs, `hf://datasets/owner/name/FILE`, which fsspec opens. For both,
HF_ENDPOINT sets the address of another hub.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Sequence

PREFIX = "hf-hub:"
_LOGIN = "Log in by `hf auth login`, or set HF_TOKEN to a token that may write"
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"{PREFIX}({_PART}/{_PART})(?:@([\w./-]+))?")


def is_hub_name(name: str) -> bool:
    """Returns whether a model's name refers to the Hub, not to a path."""
    return name.startswith(PREFIX)


def parse_name(name: str) -> tuple[str, str | None]:
    """Parses `hf-hub:owner/name@revision` into repository and revision; else raises ValueError."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: expected {PREFIX}OWNER/NAME, or {PREFIX}OWNER/NAME@REVISION")
    return match[1], match[2]


def download(name: str, choose: Callable[[Sequence[str]], Sequence[str]]) -> pathlib.Path:
    """Downloads files of a model into the Hub's cache, unless they are there already.

    Without a network, the files of the last download are used.

    Args:
        name: `hf-hub:owner/name`, with `@revision` for any revision but the latest.
        choose: selects the wanted files from the names of all files.

    Returns:
        The folder of the files.

    Raises:
        ValueError: the model is missing or not readable by this user, or there is no network.
    """
    repository, revision = parse_name(name)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    endpoint, offline = os.environ.get("HF_ENDPOINT"), None
    try:
        try:
            files = HfApi(endpoint=endpoint).list_repo_files(repository, revision=revision)
            wanted = list(choose(files))
        except (HfHubHTTPError, ValueError):  # the hub has answered
            raise
        except Exception as error:  # the type depends on the HTTP client
            wanted, offline = ["*.json"], error
        folder = snapshot_download(
            repository,
            revision=revision,
            endpoint=endpoint,
            allow_patterns=wanted,
            local_files_only=offline is not None,
        )
        return pathlib.Path(folder)
    except Exception as error:
        if offline is not None:
            # `error` is about settings of huggingface_hub; `offline` is the actual cause.
            raise ValueError(
                f"{name} cannot be read: {_first_line(offline)}. The hub's cache does not have it: "
                "copy its files and name their folder instead"
            ) from offline
        raise ValueError(
            f"{name} cannot be read: {_first_line(error)}. A private model needs `hf auth login` "
            "or HF_TOKEN"
        ) from error


def check_upload(name: str) -> None:
    """Raises ValueError if `upload` would fail: an invalid name, no login, or no network."""
    _, revision = parse_name(name)
    if revision is not None:
        raise ValueError(f"{name}: what is written has no revision yet; leave out @{revision}")
    from huggingface_hub import HfApi

    try:
        HfApi(endpoint=os.environ.get("HF_ENDPOINT")).whoami()
    except Exception as error:
        raise ValueError(f"{name} cannot be written: {_first_line(error)}. {_LOGIN}") from error


def upload(folder: pathlib.Path, name: str, *, message: str, private: bool = False) -> str:
    """Uploads a flat folder as one commit of a model repository, which is created if missing.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: the upload failed.
    """
    repository, _ = parse_name(name)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repository, exist_ok=True, private=private)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be written: {_first_line(error)}. {_LOGIN}. {folder} has the files"
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split()).rstrip(".")
