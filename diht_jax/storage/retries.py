"""Reading files from a disk or a network that fails for a moment.

A read that the operating system or an object store refuses is tried again after a while. If it
goes on failing, the result is a `StorageError`, which names the file: the data may be good, so the
file must be taken neither for missing nor for damaged. A file that does not exist is a
FileNotFoundError at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

_Result = TypeVar("_Result")

# Waited before each further attempt; long enough for a file server that is started again.
DELAYS_SECS = (0.1, 0.5, 2.0, 5.0)
# A name under which no file can exist.
_MISSING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENXIO}
)
# Nothing more can be written: the disk or the quota is full, or the file may not become larger.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Refused for good: waiting changes nothing.
_FINAL = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, *_FULL})
# Answers of a server that has too much to do, or is failing; a 4xx else is about the request.
_PASSING_STATUS = frozenset({408, 425, 429, *range(500, 600)})
# Errors of connections that have no number, by package and name, since no package is imported here.
_PASSING_TYPES = frozenset(
    {
        *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError"),
        *("botocore.HTTPClientError", "botocore.ConnectionError", "botocore.ResponseParserError"),
        *("botocore.IncompleteReadError", "asyncio.IncompleteReadError", "urllib.URLError"),
        # An answer that was damaged on its way, as the client's checksum tells.
        *("botocore.FlexibleChecksumError", "botocore.ChecksumError", "gcsfs.ChecksumError"),
        *("google.DataCorruption", "azure.IncompleteReadError"),
        *("azure.ServiceRequestError", "azure.ServiceResponseError"),
        *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
        *("urllib3.TimeoutError", "urllib3.ProtocolError", "urllib3.MaxRetryError"),
        *("httpx.TransportError", "httpx2.TransportError"),  # the second is huggingface_hub's
        *("http.IncompleteRead", "http.BadStatusLine"),
        *("google.RetryError", "google.TransportError"),
    }
)

sleep = time.sleep  # tests put their own clock here


class StorageError(OSError, ValueError):
    """A file that exists could not be read, after several attempts; names it."""


class FullError(StorageError):
    """No room for an output: a full disk, a quota, or a limit on the size of files; names it."""


def is_missing(error: OSError) -> bool:
    """Returns whether an error means that there is no such file."""
    return error.errno in _MISSING or isinstance(
        error, FileNotFoundError | NotADirectoryError | IsADirectoryError
    )


def is_storage_failure(error: BaseException) -> bool:
    """Returns whether storage has failed, so that the contents may be good.

    Errors of stores often have no number: timeouts, lost connections and answers of a server such
    as 503 are recognised by their type or status. Any other error without a number comes from a
    library that does not like the contents.
    """
    if isinstance(error, OSError) and is_missing(error):
        return False
    if isinstance(error, StorageError | TimeoutError | ConnectionError | PermissionError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True
    if _http_status(error) in _PASSING_STATUS:
        return True
    types = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return not types.isdisjoint(_PASSING_TYPES) and _http_status(error) is None


def is_outage(error: BaseException) -> bool:
    """Whether a storage has failed in a way that passes by itself: nothing was refused for good."""
    return is_storage_failure(error) and not _is_final(error.__cause__ or error)


def _http_status(error: BaseException) -> int | None:
    """The status of a server's answer, as aiohttp, botocore, gcsfs, azure and requests have it."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        found = [
            getattr(owner, name, None)
            for owner in (error, response)
            for name in ("status", "status_code", "code")
        ]
    return next((status for status in found if isinstance(status, int)), None)


def retry(
    read: Callable[[], _Result], path: str | os.PathLike[str], participle: str = "read"
) -> _Result:
    """Calls a function until the operating system, or a store, lets it succeed.

    Args:
        read: reads something, or writes a whole file; is called again after a failure.
        path: of the file, for the message.
        participle: what is done to the file, for the message.

    Raises:
        StorageError: the last attempt failed, too.
        OSError: there is no such file (`is_missing`); at once.
    """
    for delay_secs in (*DELAYS_SECS, None):
        try:
            return read()
        except Exception as error:
            if isinstance(error, StorageError) or not is_storage_failure(error):
                raise
            if delay_secs is None or _is_final(error):
                attempts = "" if _is_final(error) else f" in {len(DELAYS_SECS) + 1} attempts"
                hint = "its contents may be good: " if participle == "read" else ""
                # A timeout has no text of its own.
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise StorageError(
                    f"{os.fspath(path)}: could not be {participle}{attempts} ({reason}); {hint}"
                    "look at the disk, the network and the permissions, and run the command again"
                ) from error
        sleep(delay_secs)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def naming_output(path: str | os.PathLike[str]) -> Generator[None]:
    """Names the output in errors of writing it, which the operating system leaves without a name.

    They become a FullError where there is no room for it, else a StorageError.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in _FULL
        if error.errno is None or (error.filename is not None and not is_full):
            raise
        advice = "look at the disk and the network"
        if is_full:
            advice = "free some space, raise the limit, or choose another place"
        raise (FullError if is_full else StorageError)(
            f"{os.fspath(path)}: could not be written ({os.strerror(error.errno)}); {advice}, and "
            "run the command again"
        ) from error


def _is_final(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or getattr(error, "errno", None) in _FINAL
