"""One protocol, two places: what a folder does a bucket does too. The bucket is on a real server."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore import KVStoreError
from kvstore.bucket import Bucket
from kvstore.lease import LEASES, claims, lease
from kvstore.storage import STAGING, Folder, Storage, locate
from tests.s3 import Fault, Proxy, keys_of, put_raw


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return locate(tmp_path / "store")
    return locate(f"s3://{request.getfixturevalue('bucket')}/some/store")


def test_a_storage_is_found_again_by_its_location_and_pickles(storage: Storage) -> None:
    assert isinstance(storage, Storage)
    assert locate(storage.location) == storage
    assert locate(storage) is storage
    assert pickle.loads(pickle.dumps(storage)) == storage


def test_a_file_is_read_whole_or_its_end(storage: Storage) -> None:
    assert storage.write("a/b.bin", bytes(range(100)), replace=False)
    assert storage.read("a/b.bin") == bytes(range(100))
    assert storage.read("a/b.bin", 3) == bytes([97, 98, 99])
    assert storage.read("a/b.bin", 100) == storage.read("a/b.bin", 1000) == bytes(range(100))
    assert storage.size("a/b.bin") == 100


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    assert storage.write("empty", b"", replace=True)
    assert storage.read("empty") == storage.read("empty", 5) == b""
    assert storage.size("empty") == 0


def test_what_is_missing_raises_or_is_none(storage: Storage) -> None:
    for last_bytes in (None, 4):
        with pytest.raises(FileNotFoundError, match="nothing/here"):
            storage.read("nothing/here", last_bytes)
    assert storage.size("nothing/here") is None
    assert list(storage.entries("nothing")) == []
    assert list(storage.entries("")) == []
    storage.write("a/b", b"1", replace=True)
    assert storage.size("a") is None


def test_entries_are_all_files_below_a_folder_and_no_others(storage: Storage) -> None:
    for key in ("top", "a/one", "a/deep/er/two", "ab/three"):
        storage.write(key, key.encode(), replace=True)

    def found(prefix: str) -> dict[str, int]:
        return {entry.key: entry.size_bytes for entry in storage.entries(prefix) if not entry.key.startswith(STAGING)}

    assert found("") == {"top": 3, "a/one": 5, "a/deep/er/two": 13, "ab/three": 8}
    assert found("a") == {"a/one": 5, "a/deep/er/two": 13}
    assert found("a/deep") == {"a/deep/er/two": 13}
    assert found("top") == found("a/on") == {}


def test_entries_say_when_a_file_was_last_written(storage: Storage) -> None:
    storage.write("file", b"1", replace=True)
    (first,) = (entry.modified_s for entry in storage.entries("") if entry.key == "file")
    assert abs(first - time.time()) < 60
    time.sleep(1.1)  # servers round to seconds
    storage.write("file", b"1", replace=True)
    (second,) = (entry.modified_s for entry in storage.entries("") if entry.key == "file")
    assert second > first


def test_a_file_is_created_once_and_replaced_only_when_asked(storage: Storage) -> None:
    assert storage.write("file", b"first", replace=False) is True
    assert storage.write("file", b"second", replace=False) is False
    assert storage.read("file") == b"first"
    assert storage.write("file", b"third", replace=True) is True
    assert storage.read("file") == b"third"


def test_content_may_be_a_local_file(storage: Storage) -> None:
    with storage.scratch("test") as scratch:
        for number, replace in enumerate((False, True)):
            staged = scratch / f"staged-{number}"
            staged.write_bytes(b"from a file %d" % number)
            assert storage.write("a/file", staged, replace=replace)
            assert storage.read("a/file") == b"from a file %d" % number
        loser = scratch / "loser"
        loser.write_bytes(b"too late")
        assert not storage.write("a/file", loser, replace=False)
        assert loser.read_bytes() == b"too late", "its content stays with a writer that came late"


def test_deleting_twice_is_harmless(storage: Storage) -> None:
    storage.write("a/file", b"1", replace=True)
    storage.delete("a/file")
    storage.delete("a/file")
    assert storage.size("a/file") is None


def test_scratch_is_fresh_and_goes_away_also_after_an_error(storage: Storage) -> None:
    with storage.scratch("one") as one, storage.scratch("one") as other:
        assert one != other
        assert list(one.iterdir()) == []
        (one / "deep").mkdir()
        (one / "deep" / "file").write_bytes(b"1")
    assert not one.exists()

    def fail() -> None:
        with storage.scratch("two") as folder:
            folders.append(folder)
            raise RuntimeError("on purpose")

    folders: list[Path] = []
    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert not folders[0].exists()
    assert list(storage.entries("")) == []


def test_of_sixteen_threads_exactly_one_creates_a_file(storage: Storage) -> None:
    for attempt in range(3):
        barrier, key = threading.Barrier(16), f"contested/{attempt}"

        def create(number: int, barrier: threading.Barrier = barrier, key: str = key) -> bool:
            barrier.wait(30)
            return storage.write(key, b"writer %d" % number, replace=False)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        assert sum(won) == 1
        assert storage.read(key) == b"writer %d" % won.index(True)


def _create_many(location: str, number: int, answers: str) -> None:
    """Runs in a process of its own."""
    storage = locate(location)
    won = [storage.write(f"contested/{key}", b"process %d" % number, replace=False) for key in range(10)]
    Path(answers).write_text("".join(str(int(one)) for one in won))


def test_of_several_processes_exactly_one_creates_a_file(storage: Storage, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    files = [tmp_path / f"answers-{number}" for number in range(2)]
    processes = [
        context.Process(target=_create_many, args=(storage.location, number, str(file))) for number, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
        process.close()
    won = [file.read_text() for file in files]
    for key in range(10):
        (winner,) = [number for number, answers in enumerate(won) if answers[key] == "1"]
        assert storage.read(f"contested/{key}") == b"process %d" % winner


def test_a_reader_never_sees_half_a_file(storage: Storage) -> None:
    contents = {bytes([letter]) * 300_000 for letter in b"ab"}
    storage.write("file", next(iter(contents)), replace=True)
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            for content in contents:
                storage.write("file", content, replace=True)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline, seen = time.monotonic() + 1.0, set()
        while time.monotonic() < deadline or len(seen) < 2:
            seen.add(storage.read("file"))
            assert storage.size("file") == 300_000
            assert time.monotonic() < deadline + 30
    finally:
        ended.set()
        writer.join()
    assert seen == contents


def test_tensorstore_reads_the_same_place(storage: Storage) -> None:
    import tensorstore as ts

    storage.write("folder/key", b"content", replace=True)
    opened = ts.KvStore.open(storage.tensorstore_spec("folder")).result()
    assert opened.read("key").result().value == b"content"


def test_one_of_two_overlapping_leases_waits_or_is_refused(storage: Storage) -> None:
    said: list[str] = []
    with lease(storage, 0, 4, "first"):
        assert [claim.purpose for claim in claims(storage).values()] == ["first"]
        with lease(storage, 4, 8, "beside"):
            assert len(claims(storage)) == 2
        with (
            pytest.raises(KVStoreError, match=r"second: first \(host .* is writing the same shards"),
            lease(storage, 3, 5, "second"),
        ):
            pass
    with lease(storage, 3, 5, "second", wait=said.append):
        assert said == []
    assert list(storage.entries(LEASES)) == []


def test_a_lease_lives_while_it_is_touched_and_expires_without(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    # Servers say when to the second: a touch interval and expiry of seconds are the shortest that can be told apart.
    with lease(storage, 0, 1, "alive", touch_s=0.3, expiry_s=2.5):
        (key,) = claims(storage)
        touched = {entry.modified_s for entry in storage.entries(LEASES)}
        time.sleep(1.3)
        (entry,) = storage.entries(LEASES)
        assert {entry.modified_s} != touched
        assert claims(storage, now_s=entry.modified_s + 2.0, expiry_s=2.5).keys() == {key}
        assert claims(storage, now_s=entry.modified_s + 3.0, expiry_s=2.5) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("/a/../b", "/b", id="dots"),
        pytest.param("/a//b/./c/", "/a/b/c", id="slashes"),
        pytest.param("file:///a/b%20c/../d", "/a/d", id="file"),
        pytest.param("file://localhost/a", "/a", id="file-localhost"),
        pytest.param("/data/s3:/x", "/data/s3:/x", id="colon-inside"),
    ],
)
def test_a_path_becomes_an_absolute_folder(text: str, expected: str) -> None:
    assert locate(text) == Folder(Path(expected))


def test_a_relative_path_and_a_home_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert locate("here/../there") == Folder(tmp_path / "there")
    assert locate("C:/x") == Folder(tmp_path / "C:/x")
    assert locate("~/store") == locate(Path("~/store")) == Folder(Path("/home/someone/store"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("s3://bucket/prefix", Bucket("s3", "bucket", "prefix"), id="s3"),
        pytest.param("s3://my.bucket-1/a/b c/d=1/", Bucket("s3", "my.bucket-1", "a/b c/d=1"), id="s3-deep"),
        pytest.param("gs://bucket/a/b", Bucket("gs", "bucket", "a/b"), id="gs"),
    ],
)
def test_a_url_becomes_a_bucket(text: str, expected: Bucket) -> None:
    assert locate(text) == expected
    assert locate(text).location == text.rstrip("/")


def test_a_google_bucket_is_read_by_googles_driver() -> None:
    spec = locate("gs://bucket/a").tensorstore_spec("kv.zarr/key")
    assert (spec["driver"], spec["bucket"], spec["path"]) == ("gcs", "bucket", "a/kv.zarr/key/")
    assert "endpoint" not in spec


@pytest.mark.parametrize(
    "text",
    [
        "http://bucket/a",
        "S4://bucket/a",
        "s3://bucket",
        "s3://bucket/",
        "s3:///prefix",
        "s3:/bucket/prefix",
        "s3://bucket/a//b",
        "s3://bucket/a/../b",
        "s3://bucket/run#1",
        "s3://bucket/run?x=1",
        "s3://bucket/50%25",
        "s3://bucket/run~1",
        "s3://bucket/naïve",
        "file://host/a",
    ],
)
def test_a_bad_url_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(
        KVStoreError, match=r"store: got .*, expected a folder, s3://bucket/prefix or gs://bucket/prefix"
    ) as error:
        locate(text)
    assert repr(text) in str(error.value)


def test_a_url_that_went_through_a_path_is_refused_and_not_made_a_folder() -> None:
    with pytest.raises(KVStoreError, match=r"got 's3:/bucket/prefix'"):
        locate(Path("s3://bucket/prefix"))


def test_objects_lie_where_the_vendors_tools_look(bucket: str) -> None:
    storage = locate(f"s3://{bucket}/a b/c=1/store")
    storage.write("commits/00000.json", b"{}", replace=False)
    assert keys_of(bucket) == ["a b/c=1/store/commits/00000.json"]
    put_raw(f"{storage.location}/commits/00001.json", b"12345")
    assert {entry.key: entry.size_bytes for entry in storage.entries("commits")}["commits/00001.json"] == 5


REQUESTS = [
    pytest.param("GET", lambda storage: storage.read("old") == b"old", id="read"),
    pytest.param("GET", lambda storage: storage.read("old", 2) == b"ld", id="read-end"),
    pytest.param("HEAD", lambda storage: storage.size("old") == 3, id="size"),
    pytest.param("GET", lambda storage: [entry.key for entry in storage.entries("")] == ["old"], id="entries"),
    pytest.param("PUT", lambda storage: storage.write("new", b"new", replace=False) is True, id="create"),
    pytest.param("PUT", lambda storage: storage.write("old", b"new", replace=False) is False, id="create-refused"),
    pytest.param("PUT", lambda storage: storage.write("old", b"new", replace=True) is True, id="replace"),
    pytest.param("*", lambda storage: storage.delete("old") is None and storage.size("old") is None, id="delete"),
]


@pytest.mark.parametrize("fault", ["refuse", "drop", "lose", "cut"])
@pytest.mark.parametrize(("method", "request_right"), REQUESTS)
def test_a_request_that_fails_twice_is_repeated_with_pauses(
    method: str,
    request_right: Callable[[Storage], bool],
    fault: Fault,
    proxy: Proxy,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore.bucket._FIRST_PAUSE_S", 0.03)
    storage = locate(f"s3://{bucket}/store")
    put_raw(f"{storage.location}/old", b"old")
    proxy.fail(method, bucket, fault, 2)
    started = time.monotonic()
    assert request_right(storage)
    if not (fault == "cut" and method in ("HEAD", "PUT")):  # these answers have no body to cut
        assert [seen for _, _, seen in proxy.seen[:3]] == [fault, fault, None]
        assert time.monotonic() - started > 0.03


def test_a_server_that_says_nothing_is_asked_again(proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.bucket._STALL_S", 1)
    storage = locate(f"s3://{bucket}/store")
    proxy.fail("PUT", "file", "hang", 1)
    assert storage.write("file", b"1", replace=False)
    assert proxy.count("PUT", "file") == 2


@pytest.mark.parametrize("fault", ["refuse", "drop"])
def test_a_server_that_keeps_failing_ends_in_a_clear_error(
    fault: Fault, proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPIPE_RETRY_S", "0.3")
    storage = locate(f"s3://{bucket}/store")
    proxy.fail("*", "", fault, 10_000)
    for ask in (
        lambda: storage.read("file"),
        lambda: storage.size("file"),
        lambda: list(storage.entries("")),
        lambda: storage.write("file", b"1", replace=False),
        lambda: storage.delete("file"),
    ):
        started = time.monotonic()
        with pytest.raises(
            OSError, match=rf"^s3://{bucket}/store.*check the bucket, the credentials and AWS_ENDPOINT_URL"
        ) as error:
            ask()
        assert "\n" not in str(error.value)
        assert time.monotonic() - started < 5
    assert keys_of(bucket) == []


def test_a_missing_bucket_is_named(bucket: str) -> None:
    storage = locate("s3://no-such-bucket-here/store")
    with pytest.raises(OSError, match=r"there is no bucket 'no-such-bucket-here' at http://127"):
        storage.write("file", b"1", replace=False)
    with pytest.raises(OSError, match=r"there is no bucket 'no-such-bucket-here'"):
        storage.read("file")
    with pytest.raises(OSError, match=r"there is no bucket 'no-such-bucket-here'"):
        list(storage.entries(""))


@pytest.mark.parametrize("text", ["soon", "-1", "1e9"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPIPE_RETRY_S", text)
    with pytest.raises(KVStoreError, match=r"KVPIPE_RETRY_S: got '.*', expected seconds from 0 to 3600"):
        locate("s3://bucket/store").size("file")


def test_a_public_bucket_needs_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert locate(f"s3://{bucket}/store").tensorstore_spec("a")["aws_credentials"] == {"type": "anonymous"}
    assert "AWS_ACCESS_KEY_ID" not in os.environ
