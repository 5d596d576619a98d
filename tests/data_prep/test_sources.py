"""Names of parts, outputs that are not writable, and names of options in errors."""

import pytest

from data_prep.filter import run_filter
from data_prep.sources import (
    Input,
    check_folder,
    check_not_input,
    default_source,
    hash_inputs,
    list_inputs,
)
from diht_jax.readers.registry import SourceShard
from diht_jax.storage.files import find_inputs
from tests.data_prep.filtering.jobs import job_config


def test_columns_are_named_as_they_are_typed(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("picture,caption\na.png,a cat\n")
    with pytest.raises(ValueError, match=r"'picture'.* set --config\.source\.image_column, "):
        list_inputs(str(table), default_source())
    source = default_source()
    source.image_root = str(tmp_path / "absent")
    with pytest.raises(ValueError, match="'; set --config.source.image_root$"):
        list_inputs(str(table), source)


def test_an_output_in_a_store_is_tried_at_once(s3_bucket, tmp_path):
    assert check_folder(f"{s3_bucket}/kept/") == f"{s3_bucket}/kept"
    assert check_folder(f"file://{tmp_path}/kept") == f"{tmp_path}/kept"
    assert not find_inputs(s3_bucket)
    for url, message in (
        ("s3://no-such-bucket/kept", "nothing can be written there .*bucket"),
        ("nosuch://bucket/kept", "nosuch:// cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            check_folder(url)
    with pytest.raises(ValueError, match=r"is the folder of the input 's3://bucket/in/a\.tar'"):
        check_not_input("s3://bucket/in", [SourceShard("webdataset", "s3://bucket/in/a.tar")])


def test_an_output_that_takes_no_file_is_refused_before_the_input_is_listed(tmp_path):
    (tmp_path / "file").write_text("")
    for output, message in (
        ("s3:/bucket/kept", "a URL with two slashes, such as s3://bucket/kept; a local folder of "),
        (f"{tmp_path}/file/kept", f"nothing can be written to '{tmp_path}/file'; expected a fold"),
    ):
        for recipe in ("convert", "metadata"):
            with pytest.raises(ValueError, match=message):
                run_filter(job_config("absent.tar", output, recipe))
    assert check_folder(f"file://{tmp_path}/new/kept/") == f"{tmp_path}/new/kept"
    assert check_folder("./s3:/bucket") == "./s3:/bucket"


@pytest.mark.parametrize(
    ("output", "kind", "below"),
    [
        ("pictures", "caption_files", ""),
        ("pictures/kept", "caption_files", ""),
        ("pictures/kept", "folder", "dog"),
    ],
)
def test_an_output_among_the_pictures_is_refused(tmp_path, output, kind, below):
    (tmp_path / "pictures" / "dog").mkdir(parents=True)
    shard = SourceShard(kind, str(tmp_path / "pictures" / below))
    check_not_input(f"{tmp_path}/pictures_kept", [shard])
    with pytest.raises(ValueError, match=f"config.output='{tmp_path}/{output}' is"):
        check_not_input(f"{tmp_path}/{output}", [shard])


def _inputs(folder: str, *names: str) -> list[Input]:
    return [Input(SourceShard("webdataset", f"{folder}/{name}"), folder) for name in names]


def test_parts_of_a_file_and_equal_paths_differ():
    whole = SourceShard("table", "/a/t.csv", 0, 10)
    halves = [SourceShard("table", "/a/t.csv", 0, 5), SourceShard("table", "/a/t.csv", 5, 10)]
    (alone,) = hash_inputs([Input(whole, "/a")])
    assert len({alone, *hash_inputs([Input(half, "/a") for half in halves])}) == 3
    longer = SourceShard("table", "/a/t.csv", 0, 12)  # the same file, replaced
    assert hash_inputs([Input(longer, "/a")]) == [alone]
    both = _inputs("/x/a/in", "1", "2") + _inputs("/x/b/in", "2") + _inputs("/x/b/in", "2")
    names = hash_inputs(both)
    assert len(set(names)) == 4
    assert names[0] == hash_inputs(_inputs("/any", "1"))[0]
    moved = _inputs("/y/a/in", "1", "2") + _inputs("/y/b/in", "2") + _inputs("/y/b/in", "2")
    assert hash_inputs(moved) == names  # the last parts of the roots distinguish them
