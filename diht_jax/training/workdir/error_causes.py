"""Why a checkpoint cannot be read or written, in one line, and what mends it."""

from __future__ import annotations

import errno
import re

_LONGEST_CAUSE = 600
_FULL = "Make room"
_REFUSED = "Look at the permissions"
_FAILING = "The storage itself fails: look at the kernel's log (dmesg), or take another disk"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "Make room, or ask for a larger quota",
    errno.EACCES: _REFUSED,
    errno.EPERM: _REFUSED,
    errno.EROFS: "The file system is read-only: mount it for writing, or take another --workdir",
    errno.EIO: _FAILING,
    errno.ESTALE: "The file server was changed or restarted: mount it again",
    errno.ENOENT: "Files of the run were removed while it works: leave its --workdir alone",
    errno.EMFILE: "Allow more open files (ulimit -n)",
}
# How libraries tell the cause that have no errno.
_TEXTS = {
    r"RESOURCE_EXHAUSTED|No space left": _FULL,
    r"PERMISSION_DENIED|Permission denied": _REFUSED,
    r"Input/output error": _FAILING,
}


def explain_error(error: BaseException) -> str:
    """The innermost cause in one line: Orbax wraps it in a page of settings."""
    error = _chain(error)[-1]
    # TensorStore adds all its settings to its messages.
    text = " ".join(str(error).split()).split(" [tensorstore_spec=")[0] or type(error).__name__
    return text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]}..."


def suggest_remedy(error: BaseException) -> str:
    """Remedy of a failed write, as far as its cause is known: a sentence without its stop."""
    chain = _chain(error)
    for link in reversed(chain):
        in_text = re.search(r"OS error (\d+)", str(link))  # as TensorStore tells it
        number = int(in_text[1]) if in_text else getattr(link, "errno", None)
        if number in _REMEDIES:
            return _REMEDIES[number]
        for pattern, remedy in _TEXTS.items():
            if re.search(pattern, str(link)):
                return remedy
    if any(isinstance(link, TimeoutError) for link in chain):
        return (
            "Either the storage is too slow, or the clock of this machine was set meanwhile, by "
            "which Orbax measures"
        )
    return "The cause is not known; the storage of --workdir is the first thing to look at"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, the innermost last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain
