"""Sources of packages: their address, a mirror, or another npm registry."""

import hashlib
import urllib.error
import urllib.request

import numpy as np
import pytest

from data_prep.example_data.packages import NPM_REGISTRY, NPM_VARIABLE, Package, fetch_package
from data_prep.example_data.registry import EXAMPLES
from tests.serving import FileServer

CONTENT = np.random.default_rng(0).bytes(300_000)
NAME = "emoji-1.tgz"
PACKAGE = Package(
    f"{NPM_REGISTRY}/emoji/-/{NAME}", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)
)


@pytest.fixture
def server():
    with FileServer({NAME: CONTENT}) as started:
        yield started


def test_npms_own_variable_names_another_registry(server, tmp_path, monkeypatch):
    monkeypatch.setenv(NPM_VARIABLE, f"{server.url}/npm/")
    assert fetch_package(PACKAGE, tmp_path).read_bytes() == CONTENT
    assert server.asked_paths == [f"/npm/emoji/-/{NAME}"]


def test_without_a_network_the_message_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(ValueError, match=rf"{PACKAGE.url} .*{tmp_path} \(--packages\)"):
        fetch_package(PACKAGE, tmp_path, "http://127.0.0.1:9")
    (tmp_path / NAME).write_bytes(CONTENT)
    assert fetch_package(PACKAGE, tmp_path, "http://127.0.0.1:9").read_bytes() == CONTENT


def test_a_refusing_server_is_named_with_the_way_around_it(server, tmp_path):
    server.files.clear()
    with pytest.raises(ValueError, match=rf"404 .*{tmp_path} \(--packages\)"):
        fetch_package(PACKAGE, tmp_path, server.url)


def test_a_mirror_is_an_address(tmp_path):
    with pytest.raises(ValueError, match=r"--mirror=/srv/packages: .*--packages"):
        fetch_package(PACKAGE, tmp_path, "/srv/packages")


@pytest.mark.parametrize(
    "package",
    [package for example in EXAMPLES.values() for package in example.packages],
    ids=lambda package: package.name,
)
def test_the_real_address_has_a_file_of_this_size(package):
    request = urllib.request.Request(package.url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            assert int(response.headers["Content-Length"]) == package.num_bytes
    except urllib.error.HTTPError:
        raise
    except OSError as error:
        pytest.skip(f"no network: {error}")
