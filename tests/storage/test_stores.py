"""Which errors mean that storage failed, and which that the contents are bad."""

import errno
import http.client
import types
import urllib.error

import aiohttp
import botocore.exceptions
import fsspec.exceptions
import httpx
import httpx2
import pyarrow
import pytest
import requests
import yarl
from s3fs.errors import translate_boto_error

from diht_jax.storage import stores
from diht_jax.storage.stores import StorageError, is_storage_failure


def _answer(status: int) -> aiohttp.ClientResponseError:
    url = yarl.URL("https://storage.googleapis.com/bucket/a.tar")
    return aiohttp.ClientResponseError(types.SimpleNamespace(real_url=url), (), status=status)


def _boto(code: str, status: int) -> botocore.exceptions.ClientError:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, "GetObject")


def _requests(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("an answer", response=response)


class _GcsError(Exception):
    """The error class of gcsfs."""

    code = 503


_FAILURES = {
    "EIO": OSError(errno.EIO, "Input/output error"),
    "fsspec timeout": fsspec.exceptions.FSTimeoutError(),
    "timeout": TimeoutError(),
    "aiohttp lost": aiohttp.ServerDisconnectedError(),
    "aiohttp payload": aiohttp.ClientPayloadError("half an answer"),
    **{f"aiohttp {status}": _answer(status) for status in (429, 503)},
    "boto 503": _boto("SlowDown", 503),
    "boto connection": botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"),
    "boto checksum": botocore.exceptions.FlexibleChecksumError(error_msg="Expected checksum a"),
    "boto stream": botocore.exceptions.ResponseStreamingError(error="broken"),
    "boto half": botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    "s3fs 503": translate_boto_error(_boto("SlowDown", 503)),
    "s3fs RequestTimeout": translate_boto_error(_boto("RequestTimeout", 400)),
    "gcsfs 503": _GcsError(),
    "requests 503": _requests(503),
    "httpx timeout": httpx.ReadTimeout("slow"),
    "hub connection": httpx2.ConnectError("Name or service not known"),
    "half an answer": http.client.IncompleteRead(b"half"),
    "urllib 503": urllib.error.HTTPError("http://x", 503, "busy", {}, None),
    "permissions": PermissionError("AccessDenied"),
}
_OTHERS = {
    "missing": FileNotFoundError("NoSuchKey"),
    "aiohttp 404": _answer(404),
    "s3fs 404": translate_boto_error(_boto("NoSuchKey", 404)),
    "requests 404": _requests(404),
    "urllib 404": urllib.error.HTTPError("http://x", 404, "gone", {}, None),
    "damage": ValueError("damaged"),
    "arrow": pyarrow.ArrowInvalid("not a parquet file"),
    "arrow's OSError": OSError("Couldn't deserialize thrift"),
    "a defect": AttributeError("status"),
}


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """Records the seconds of waiting, without any time passing."""
    found: list[float] = []
    monkeypatch.setattr(stores, "sleep", found.append)
    return found


@pytest.mark.parametrize("error", [pytest.param(e, id=name) for name, e in _FAILURES.items()])
def test_a_failure_of_a_storage_is_tried_again_and_never_called_damage(error, slept):
    assert is_storage_failure(error)
    left = types.SimpleNamespace(failures=2)

    def read() -> str:
        left.failures -= 1
        if left.failures >= 0:
            raise error
        return "contents"

    if isinstance(error, PermissionError):  # waiting does not change it
        left.failures = 10**6
    else:
        assert stores.retry(read, "s3://bucket/a.tar") == "contents"
        assert slept == list(stores.DELAYS_SECS[:2])
        left.failures = 10**6
        slept.clear()
    with pytest.raises(StorageError, match=r"^s3://bucket/a\.tar: could not be read.*\([^)]") as e:
        stores.retry(read, "s3://bucket/a.tar")
    assert sum(slept) == (0 if isinstance(error, PermissionError) else sum(stores.DELAYS_SECS))
    assert "damage" not in str(e.value)
    assert e.value.__cause__ is error


@pytest.mark.parametrize("error", [pytest.param(e, id=name) for name, e in _OTHERS.items()])
def test_other_errors_are_raised_at_once_as_they_are(error, slept):
    assert not is_storage_failure(error)

    def read() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        stores.retry(read, "a.tar")
    assert caught.value is error
    assert not slept
