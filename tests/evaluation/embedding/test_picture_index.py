"""Indexes of real images: exact answers, incremental updates, and the web page."""

import io
import itertools
import json
import os
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diht_jax.evaluation.embedding import index_update
from diht_jax.evaluation.embedding.encoding import Batching
from diht_jax.evaluation.embedding.entries import Processes
from diht_jax.evaluation.embedding.index_update import update_index
from diht_jax.evaluation.embedding.inputs import list_inputs
from diht_jax.evaluation.embedding.picture_index import PictureIndex
from diht_jax.evaluation.embedding.search import is_own_host, make_server
from diht_jax.readers import image_folder, parquet
from tests import make
from tests.evaluation.embedding.processes import Processes as Threads

pytest.importorskip("usearch")
QUERIES = ["a dog", "red car", "the sea"]


class Counting:
    """Wraps the model and counts the images that it decodes."""

    def __init__(self, model, fails_at=None):
        self._model, self._fails_at = model, fails_at
        self.decoded = 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def preprocess(self, image):
        self.decoded += 1
        return self._model.preprocess(image)

    def encode_image(self, images):
        if self._fails_at is not None and self.decoded >= self._fails_at:
            raise KeyboardInterrupt
        return self._model.encode_image(images)


def write_picture(path, seed):
    make.noise(seed, (50, 40), cell=10).save(path)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    (path / "sub").mkdir(parents=True)
    for i in range(20):
        write_picture(path / ("sub" if i % 2 else ".") / f"{i:02d}.png", i)
    (path / "bad.png").write_bytes(b"no picture")
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(index_update, "PART_ROWS", 6)


def update(model, source, index, **options):
    return update_index(model, list_inputs(str(source)), index, batching=Batching(8), **options)


def cosines(model, folder):
    """Returns the keys, and the cosines of all queries and images, from the model alone."""
    paths = sorted(path for path in folder.rglob("*.png") if path.name != "bad.png")
    image_emb = model.encode_image([Image.open(path).convert("RGB") for path in paths])
    keys = [str(path.relative_to(folder)) for path in paths]
    return keys, model.encode_text(QUERIES) @ image_emb.T


def check_answers(model, folder, index, count=5, tolerance=2e-3):
    keys, expected = cosines(model, folder)
    found = PictureIndex(index).search(model.encode_text(QUERIES), count)
    for hits, row in zip(found, expected, strict=True):
        assert [hit.similarity for hit in hits] == pytest.approx(
            -np.sort(-row)[:count].astype(float), abs=tolerance
        )
        for hit in hits:
            assert hit.similarity == pytest.approx(row[keys.index(hit.key)], abs=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [("float16", 5e-4), ("int8", 1e-2)])
def test_answers_are_the_nearest_pictures(tiny_model, folder, tmp_path, dtype, tolerance):
    done = update(tiny_model, folder, tmp_path / "index", dtype=dtype)
    assert (done.added, done.removed, done.kept) == (20, 0, 0)
    assert done.dropped == {"image_unreadable": 1}
    index = PictureIndex(tmp_path / "index")
    assert len(index) == 20
    check_answers(tiny_model, folder, tmp_path / "index", tolerance=tolerance)
    assert [len(hits) for hits in index.search(np.ones((1, tiny_model.embed_dim)), 50)] == [20]
    (part,) = (tmp_path / "index").glob("00000-*.arrow")
    with pyarrow.memory_map(str(part)) as file:
        column = pyarrow.ipc.open_file(file).read_all()["image_emb"]
    assert column.chunk(0).flatten().to_numpy().dtype == dtype


def test_an_update_embeds_what_is_new_and_removes_what_is_gone(tiny_model, folder, tmp_path):
    (folder / "sub" / "worse.png").write_bytes(b"no picture")
    assert update(tiny_model, folder, tmp_path / "index").dropped == {"image_unreadable": 2}
    write_picture(folder / "sub" / "worse.png", 99)
    (folder / "00.png").unlink()
    write_picture(folder / "02.png", 100)
    os.utime(folder / "02.png", ns=(0, 12345))
    for i in range(30, 38):
        write_picture(folder / f"{i}.png", i)
    counting = Counting(tiny_model)
    done = update(counting, folder, tmp_path / "index")
    assert (done.added, done.removed, done.kept) == (10, 2, 18) and counting.decoded == 10
    assert done.dropped == {"image_unreadable": 1}
    check_answers(tiny_model, folder, tmp_path / "index", count=28)
    again = Counting(tiny_model)
    done = update(again, folder, tmp_path / "index")
    assert (done.added, done.removed, done.kept) == (0, 0, 28) and again.decoded == 0
    (folder / "bad.png").unlink()
    assert update(tiny_model, folder, tmp_path / "index").dropped == {}


def test_a_folder_is_known_by_its_place(tiny_model, folder, tmp_path, monkeypatch):
    assert update(tiny_model, folder, tmp_path / "index").added == 20
    monkeypatch.chdir(tmp_path)
    assert update(tiny_model, "pictures/", tmp_path / "index").kept == 20
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved/pictures")
    monkeypatch.chdir("moved")
    update(tiny_model, "pictures", tmp_path / "index")
    index = PictureIndex(tmp_path / "index")
    (hits,) = index.search(np.ones((1, tiny_model.embed_dim)), 20)
    assert len(hits) == 20 and all(index.picture(*hit.place) for hit in hits)


def test_names_that_are_not_utf8_are_names_like_others(tiny_model, folder, tmp_path):
    names = [os.fsencode(folder / "m") + name for name in (b"\xf6ller.png", b"\xfcller.png")]
    for i, name in enumerate(names):
        os.rename(os.fsencode(folder / f"0{2 * i}.png"), name)
    assert update(tiny_model, folder, tmp_path / "index").added == 20
    index = PictureIndex(tmp_path / "index")
    (hits,) = index.search(np.ones((1, tiny_model.embed_dim)), 20)
    first, second = sorted((hit for hit in hits if "ller" in hit.key), key=lambda hit: hit.key)
    assert None not in {index.picture(*first.place), index.picture(*second.place)}
    assert index.picture(*first.place) != index.picture(*second.place)
    assert update(tiny_model, folder, tmp_path / "index").kept == 20
    os.utime(names[0], ns=(0, 12345))
    assert update(tiny_model, folder, tmp_path / "index").added == 1


@pytest.mark.parametrize("listings", [(0, 0, 1), (1, 1, 0)], ids=["added", "removed"])
def test_a_folder_may_change_during_an_update(listings, tiny_model, folder, tmp_path, monkeypatch):
    shards, found = list_inputs(str(folder)), list(image_folder.list_pictures(str(folder)))
    passing, turns = [(str(folder / "z.png"), "z.png", None)], iter(listings)
    monkeypatch.setattr(image_folder, "list_pictures", lambda _: found + passing * next(turns))
    done = update_index(tiny_model, shards, tmp_path / "index", batching=Batching(8))
    assert (done.added, done.removed) == (20, 0)


def test_an_interrupted_update_goes_on(tiny_model, folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        update(Counting(tiny_model, fails_at=15), folder, tmp_path / "index")
    counting = Counting(tiny_model)
    done = update(counting, folder, tmp_path / "index")
    assert done.added == counting.decoded and 0 < done.added <= 20 - 6
    check_answers(tiny_model, folder, tmp_path / "index")


def update_together(model, source, index, count):
    """Updates with several processes; returns each one's result or error, and its decoded count."""
    threads, one_at_a_time = Threads(count), threading.Lock()

    class Own(Counting):
        def encode_image(self, images):
            with one_at_a_time:
                return super().encode_image(images)

    models = [Own(model) for _ in range(count)]

    def work():
        processes = Processes(threads.own.index, count, threads.exchange)
        return update(models[processes.index], source, index, processes=processes)

    return threads.run(work), [each.decoded for each in models]


def test_processes_share_an_update(tiny_model, folder, tmp_path):
    results, decoded = update_together(tiny_model, folder, tmp_path / "index", 3)
    assert [(done.added, done.kept) for done in results] == [(20, 0)] * 3
    # 21 files in parts of at most 6; no process decodes the broken one.
    assert sum(decoded) == 20 and sorted(decoded) in ([6, 6, 8], [6, 7, 7], [5, 6, 9])
    check_answers(tiny_model, folder, tmp_path / "index", count=20)
    (folder / "00.png").unlink()
    for i in range(30, 35):
        write_picture(folder / f"{i}.png", i)
    results, decoded = update_together(tiny_model, folder, tmp_path / "index", 2)
    (first, second) = results
    assert (first.added, first.removed, first.kept) == (5, 1, 19) and sorted(decoded) == [2, 3]
    assert (second.added, second.kept) == (5, 19)
    check_answers(tiny_model, folder, tmp_path / "index", count=24)
    done = update(tiny_model, folder, tmp_path / "index")
    assert (done.added, done.removed, done.kept) == (0, 0, 24)


def tar_of(path, seeds):
    members = {}
    for seed in seeds:
        image = make.encoded(make.noise(seed, (300, 30)), "JPEG")
        members |= make.pair_members(f"{seed:03d}", f"caption {seed}", image, "jpg")
    make.write_tar(path, members)


def test_shards_are_followed_by_their_identity(tiny_model, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(3):
        tar_of(tars / f"{number}.tar", range(10 * number, 10 * number + 8))
    source = f"{tars}/*.tar"
    assert update(tiny_model, source, tmp_path / "index").added == 24
    (tars / "1.tar").unlink()
    tar_of(tars / "2.tar", range(50, 53))
    tar_of(tars / "3.tar", range(60, 64))
    counting = Counting(tiny_model)
    done = update(counting, source, tmp_path / "index")
    assert (done.added, done.removed, done.kept) == (7, 16, 8) and counting.decoded == 7
    index = PictureIndex(tmp_path / "index")
    hits = index.search(tiny_model.encode_text(["a"]), 15)[0]
    seeds = [*range(8), *range(50, 53), *range(60, 64)]
    assert sorted(hit.caption for hit in hits) == sorted(f"caption {seed}" for seed in seeds)
    with Image.open(io.BytesIO(index.picture(*hits[0].place))) as thumbnail:
        assert thumbnail.size == (160, 16)


def test_a_class_that_is_added_leaves_the_others_as_they_are(tiny_model, tmp_path):
    for i, name in enumerate(["b", "c", "a"]):
        (tmp_path / "classes" / name).mkdir(parents=True)
        write_picture(tmp_path / "classes" / name / "0.png", i)
        done = update(tiny_model, tmp_path / "classes", tmp_path / "index")
        assert (done.added, done.removed, done.kept) == (1, 0, i)


def test_pictures_that_a_table_names_are_followed(tiny_model, tmp_path):
    for i in range(3):
        write_picture(tmp_path / f"{i}.png", i)
    table = tmp_path / "a.csv"
    table.write_text("image,caption\n0.png,a\n1.png,b\n2.png,c\n")
    assert update(tiny_model, table, tmp_path / "index").added == 3
    assert update(tiny_model, table, tmp_path / "index").kept == 3
    os.utime(tmp_path / "1.png", ns=(0, 12345))
    assert update(tiny_model, table, tmp_path / "index").added == 3


def test_pictures_within_a_parquet_file_are_read_once(tiny_model, tmp_path, monkeypatch):
    write_picture(tmp_path / "0.png", 0)
    rows = {"image": [(tmp_path / "0.png").read_bytes()], "caption": ["a"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    reads, read = [], parquet.read_rows
    monkeypatch.setattr(parquet, "read_rows", lambda *a: reads.append(a) or read(*a))
    assert update(tiny_model, tmp_path / "a.parquet", tmp_path / "index").added == 1
    assert update(tiny_model, tmp_path / "a.parquet", tmp_path / "index").kept == 1
    assert len(reads) == 1


def test_other_work_and_damage_are_errors(tiny_model, folder, tmp_path):
    with pytest.raises(ValueError, match="--index=.*: no index; --input=SOURCE makes one"):
        PictureIndex(tmp_path / "index")
    update(tiny_model, folder, tmp_path / "index")
    with pytest.raises(ValueError, match="changed: dtype"):
        update(tiny_model, folder, tmp_path / "index", dtype="int8")
    (part,) = (tmp_path / "index").glob("00001-*.arrow")
    part.write_bytes(b"")
    with pytest.raises(ValueError, match=r"00001-\w+.arrow: .*delete the .json file"):
        PictureIndex(tmp_path / "index")
    (tmp_path / "index/00001.json").unlink()
    with pytest.raises(ValueError, match=r"00001\.json .*--input"):
        PictureIndex(tmp_path / "index")
    assert update(tiny_model, folder, tmp_path / "index").added == 5  # the sixth is damaged
    check_answers(tiny_model, folder, tmp_path / "index")
    assert len(list((tmp_path / "index").glob("*.arrow"))) == 4


def test_no_damage_of_an_index_is_silent_or_ends_the_process(tiny_model, tmp_path):
    queries = tiny_model.encode_text(QUERIES)

    def answers(index):
        index = PictureIndex(index)
        found = index.search(queries, 20)
        return found, [index.picture(*match.place) for match in found[0]]

    contents = []
    for number in range(2):
        tar_of(tmp_path / f"{number}.tar", range(20 * number, 20 * number + 14))
        update(tiny_model, tmp_path / f"{number}.tar", tmp_path / f"index{number}")
        folder = tmp_path / f"index{number}"
        contents.append({path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))})
    # The Arrow files of the two indexes have different names, so they are matched by order.
    files, others = contents
    others = dict(zip(files, others.values(), strict=True))
    kinds = sorted(name.split(".")[-1] for name in files)
    assert kinds == ["arrow"] * 3 + ["json"] * 4 + ["thumbnails"] * 3
    index, rng, num_named = tmp_path / "index0", np.random.default_rng(0), 0
    expected = answers(index)
    for name, whole in files.items():
        damages = [others[name], files[sorted(files)[rng.integers(10)]]]
        for start in map(int, rng.integers(len(whole), size=3)):
            page = slice(start - start % 4096, start - start % 4096 + 4096)
            zeroed = whole[: page.start] + bytes(len(whole[page])) + whole[page.stop :]
            flipped = bytes([whole[start] ^ 1 << int(rng.integers(8))])
            damages += [whole[:start], zeroed, whole[:start] + flipped + whole[start + 1 :]]
        for damaged in damages:
            (index / name).write_bytes(damaged)
            try:
                assert answers(index) == expected, f"{name} was damaged in silence"
            except ValueError as error:
                assert name.split(".")[0] in str(error), (name, str(error))
                num_named += 1
        (index / name).write_bytes(whole)
    assert num_named > 60


@pytest.fixture
def server(tiny_model, folder, tmp_path):
    """Serves a page whose clock advances by one second at each reading."""
    update(tiny_model, folder, tmp_path / "index")
    seconds = itertools.count()
    with make_server(
        PictureIndex(tmp_path / "index"),
        tiny_model.encode_text,
        port=0,
        clock=lambda: next(seconds),
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, path, **headers):
    url = f"http://127.0.0.1:{server.server_port}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_page_finds_pictures_and_refuses_everything_else(tiny_model, server, tmp_path):
    nonces = set()
    for _ in range(2):  # each page has a different one
        status, headers, page = get(server, "/")
        assert status == 200 and b"<form>" in page
        (script, style) = re.findall(r"'nonce-([^']+)'", headers["Content-Security-Policy"])
        assert script == style and len(script) >= 16
        assert re.findall(r'nonce="([^"]*)"', page.decode()) == [script] * 2
        nonces.add(script)
    assert len(nonces) == 2
    status, _, answer = get(
        server, "/search?" + urllib.parse.urlencode({"q": QUERIES[1], "count": 7})
    )
    found = json.loads(answer)
    index = PictureIndex(tmp_path / "index")
    expected = index.search(tiny_model.encode_text([QUERIES[1]]), 7)[0]
    assert [match["key"] for match in found["matches"]] == [hit.key for hit in expected]
    assert found["pictures"] == 20 and found["seconds"] == 1
    first = found["matches"][0]
    status, headers, data = get(
        server, f"/picture?part={first['place'][0]}&row={first['place'][1]}"
    )
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (50, 40)
    for path in ("/search?q=+", "/search", "/search?q=a&count=1000", "/search?q=" + "a" * 1001):
        status, _, answer = get(server, path)
        assert status == 400 and "expected q, 1 to 1000" in json.loads(answer)["error"]
    for path in ("/picture", "/picture?part=0&row=-1", "/picture?part=9&row=0", "/etc/passwd"):
        assert get(server, path)[0] == 404


def test_foreign_hosts_are_refused(server):
    foreign = ("evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "[")
    own = ("localhost", "LOCALHOST:9000", "127.0.0.1", "[::1]:8000", socket.gethostname())
    for path in ("/", "/search?q=a", "/picture?part=0&row=0"):
        for host in (*foreign, *own):
            expected = 200 if host in own else 403
            assert get(server, path, Host=host)[0] == expected, (path, host)


@pytest.mark.parametrize("served", ["0.0.0.0", "192.168.1.5", "pictures.example"])
def test_a_page_for_other_machines_answers_to_addresses_and_its_own_name(served):
    assert is_own_host("192.168.1.5:8000", served)
    assert is_own_host(f"{served}:8000", served)
    assert not is_own_host("evil.example:8000", served)
