"""Reading documents from every kind of source, real files of each."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data import documents as documents_room
from pipeline.data.documents import Document, Message, read_documents, shuffled, subsampled

ROOT = Path(__file__).parents[2]
TEXTS = ["first text", "zweiter Text mit Ümlaut", "第三 🙂"]
ROWS = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_plain(path: Path) -> str:
    (path / "rows.jsonl").write_bytes(LINES)
    return str(path / "rows.jsonl")


def write_gzip(path: Path) -> str:
    (path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES))
    return str(path / "rows.jsonl.gz")


def write_zstd(path: Path) -> str:
    (path / "rows.jsonl.zst").write_bytes(zstandard.compress(LINES))
    return str(path / "rows.jsonl.zst")


def write_zstd_frames(path: Path) -> str:
    lines = LINES.splitlines(keepends=True)
    (path / "rows.jsonl.zst").write_bytes(b"".join(zstandard.compress(part) for part in (lines[0], b"", *lines[1:])))
    return str(path / "rows.jsonl.zst")


def write_byte_order_mark(path: Path) -> str:
    (path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    return str(path / "rows.jsonl")


def write_parquet(path: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), path / "rows.parquet")
    return str(path / "rows.parquet")


def write_dataset(path: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path / "set"))
    return str(path / "set")


def write_splits(path: Path) -> str:
    splits = {"train": datasets.Dataset.from_list(ROWS), "other": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(path / "splits"))
    return str(path / "splits")


def write_files(path: Path) -> str:
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(path / "*.txt")


SOURCES = [
    *(write_plain, write_byte_order_mark, write_gzip, write_zstd, write_zstd_frames),
    *(write_parquet, write_dataset, write_splits, write_files),
]


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)
def test_every_kind_of_source_gives_the_same_texts(tmp_path: Path, write: Callable[[Path], str]) -> None:
    documents = list(read_documents([write(tmp_path)]))
    assert [document.text for document in documents] == TEXTS
    assert len({document.source for document in documents}) == 3


def test_several_sources_follow_each_other(tmp_path: Path) -> None:
    both = [write_plain(tmp_path), write_files(tmp_path)]
    assert [document.text for document in read_documents(both)] == TEXTS * 2


def test_globs_reach_subfolders(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "deep.txt").write_text("deep")
    assert [document.text for document in read_documents([str(tmp_path / "**" / "*.txt")])] == ["deep"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: str(path / "none.txt"), "does not exist", id="missing"),
        pytest.param(lambda path: str(path / "*.md"), r"no file matches '.*\*\.md'", id="empty-glob"),
        pytest.param(lambda path: str(path), "was not saved by datasets", id="folder"),
        pytest.param(lambda path: _write(path / "x.txt", b"\xff\xfe\x00"), r"x\.txt is not UTF-8 text \(byte 0\)", id="binary"),
        pytest.param(
            lambda path: _write(path / "x.jsonl", b'{"text": "a"}\n{"te'),
            r"x\.jsonl, line 2 cannot be read as JSON",
            id="cut-jsonl",
        ),
        pytest.param(
            lambda path: _write(path / "x.jsonl", b"[1]\n"), r"x\.jsonl, line 1 is not an object but a list", id="no-object"
        ),
        pytest.param(
            lambda path: _write(path / "x.jsonl.gz", gzip.compress(LINES * 50)[:-30]), "not complete JSON lines", id="cut-gz"
        ),
        pytest.param(lambda path: _write(path / "x.jsonl.gz", b""), "the file is empty", id="empty-gz"),
        pytest.param(lambda path: _write(path / "x.jsonl.zst", b""), "the file is empty", id="empty-zstd"),
        pytest.param(lambda path: _write(path / "x.jsonl.zst", b"nonsense"), "not complete JSON lines", id="not-zstd"),
        pytest.param(lambda path: _write(path / "x.parquet", b"PAR1"), "not readable parquet", id="cut-parquet"),
        pytest.param(
            lambda path: _write(path / "x.jsonl", b'{"body": "a"}\n'),
            r"neither a text nor a list of messages in 'text'; its fields are body",
            id="field",
        ),
    ],
)
def test_bad_data_is_named_with_what_to_do(tmp_path: Path, damage: Callable[[Path], str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_documents([damage(tmp_path)]))


def test_a_zstd_file_cut_anywhere_inside_a_frame_is_refused_even_after_a_whole_line(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    frame = b""
    for line in LINES.splitlines(keepends=True):
        frame += compressor.compress(line) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    frame += compressor.flush()
    path = tmp_path / "x.jsonl.zst"
    decoded = set()
    for last in range(1, len(frame)):
        for before in (b"", frame):
            decoded.add(zstandard.ZstdDecompressor().decompressobj().decompress(frame[:last]))
            _write(path, before + frame[:last])
            with pytest.raises(ValueError, match=r"x\.jsonl\.zst is not complete JSON lines: it ends inside a zstd frame"):
                list(read_documents([str(path)]))
    assert LINES in decoded, "one of the cuts decodes to all lines"


def test_a_large_zstd_file_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    texts = [random.Random(number).randbytes(5000).hex() for number in range(500)]
    path = _write(tmp_path / "x.jsonl.zst", zstandard.compress("".join(f'{{"text": "{text}"}}\n' for text in texts).encode()))
    tracemalloc.start()
    try:
        assert all(document.text == text for document, text in zip(read_documents([path]), texts, strict=True))
        assert tracemalloc.get_traced_memory()[1] < 500_000, "of five million bytes"
    finally:
        tracemalloc.stop()


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_a_missing_split_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'test', but .* has train, other"):
        list(read_documents([write_splits(tmp_path)], split="test"))


def test_another_text_field_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", b'{"body": "hello"}\n')
    assert [document.text for document in read_documents([path], text_field="body")] == ["hello"]


def test_a_hub_data_set_that_cannot_be_reached_is_one_message() -> None:
    with pytest.raises(
        ValueError, match=r"no file or folder 'nobody/nothing:config' here, and .* cannot be read .* local files"
    ):
        list(read_documents(["nobody/nothing:config"]))


@pytest.mark.parametrize("endpoint", ["http://nowhere.invalid", "silent"])
def test_a_hub_that_does_not_answer_is_given_up_soon(endpoint: str) -> None:
    """Unknown, or silent: a server that accepts the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = endpoint if endpoint != "silent" else f"http://127.0.0.1:{server.getsockname()[1]}"
        code = (
            "import time; from pipeline.data.documents import read_documents; started = time.monotonic()\n"
            "try: list(read_documents(['nobody/nothing']))\n"
            "except ValueError as error: print(time.monotonic() - started, error)"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "NO_PROXY": "*"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    seconds, _, message = done.stdout.partition(" ")
    assert message.startswith("--data: there is no file or folder 'nobody/nothing' here, and the hub data set")
    assert float(seconds) < 5


@pytest.mark.parametrize("buffer", [1, 4, 100])
def test_shuffling_keeps_every_document_and_depends_on_the_seed_alone(buffer: int) -> None:
    documents = [Document(source=str(number), text="") for number in range(50)]
    first, again, other = ([int(document.source) for document in shuffled(documents, seed, buffer)] for seed in (1, 1, 2))
    assert first == again
    assert sorted(first) == sorted(other) == list(range(50))
    if buffer > 1:
        assert first != list(range(50))
        assert first != other


def test_the_shuffle_is_pinned() -> None:
    documents = [Document(source=str(number), text="") for number in range(8)]
    assert [int(document.source) for document in shuffled(documents, 7)] == [3, 1, 2, 0, 5, 4, 6, 7]


def test_a_zst_file_cut_off_inside_a_frame_is_refused_even_if_nothing_of_it_decodes(tmp_path: Path) -> None:
    import zstandard

    lines = "".join(json.dumps({"text": f"line {number} " + "x" * 50}) + "\n" for number in range(3_000)).encode()
    whole = zstandard.compress(lines[:60_000]) + zstandard.compress(lines[60_000:])
    (tmp_path / "whole.jsonl.zst").write_bytes(whole)
    assert len(list(read_documents([str(tmp_path / "whole.jsonl.zst")]))) == 3_000
    for size in (20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.jsonl.zst").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.jsonl\.zst is not complete JSON lines"):
            list(read_documents([str(tmp_path / "*.zst")]))


def test_a_byte_order_mark_before_json_lines_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "hello"}\n')
    assert [document.text for document in read_documents([str(tmp_path / "bom.jsonl")])] == ["hello"]


def test_a_long_text_file_is_several_documents_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_room, "TEXT_BYTES_AT_ONCE", 64)
    text = "".join(f"Zeile {number} mit Ümlaut {'x' * (number % 9)}\n" for number in range(40)) + "no end of line " + "y" * 200
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    found = list(read_documents([str(tmp_path / "long.txt")]))
    assert "".join(document.text for document in found) == text
    assert len(found) > 10
    assert all(document.text.endswith("\n") for document in found[:-1])
    assert {document.source for document in found} == {str(tmp_path / "long.txt")}
    (tmp_path / "long.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(ValueError, match=rf"long\.txt is not UTF-8 text \(byte {len(text.encode())}\)"):
        list(read_documents([str(tmp_path / "long.txt")]))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, id="messages"),
        pytest.param({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, id="sharegpt"),
        pytest.param({"text": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, id="text-field"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_may_hold_a_conversation(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    (document,) = read_documents([str(path)])
    assert document.messages == (Message(role="user", content="hi"), Message(role="assistant", content="ho"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "has neither a text nor a list of messages in 'text'; its fields are messages"),
        (
            [{"role": "user"}],
            r"turn 1 of 1 \(user\) says nothing: it has neither 'content' nor 'tool_calls'; its fields are role",
        ),
        ([{"role": "user", "content": None}], r"turn 1 of 1 \(user\) says nothing"),
        (
            [{"role": "user", "content": 5}],
            r"turn 1 of 1 \(user\) has a number in 'content', expected a text or a list of text parts",
        ),
        ([{"role": 5, "content": "a"}], r"turn 1 of 1 \(5\) has no 'role' or 'from' that is a string"),
        (["hi"], "turn 1 of 1 is a string, expected an object with 'role' and 'content', or 'from' and 'value'"),
        ("hi", "has in 'messages' a text that is not JSON"),
        (7, "has neither a text nor a list of messages in 'messages', but a number"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(
        ValueError, match=rf"--data: .*rows\.jsonl, line 2 .*{message}.*; 'kvpipe extract' leaves such rows out with"
    ):
        list(read_documents([str(tmp_path / "rows.jsonl")]))


def test_a_sample_of_the_documents_is_spread_over_all_of_them_and_is_about_as_large_as_asked_for() -> None:
    documents = [Document(source=str(number), text="x" * (50 + number % 100)) for number in range(5_000)]
    size = sum(len(document.text) for document in documents)
    reads = []

    def read() -> list[Document]:
        reads.append(1)
        return documents

    chosen = [int(document.source) for document in subsampled(read, lambda _: size / 4, seed=3)]
    assert len(reads) == 2
    assert chosen == sorted(set(chosen))
    assert 0.22 < sum(len(documents[number].text) for number in chosen) / size < 0.28
    assert all(0.2 < sum(first <= number < first + 1000 for number in chosen) / 1000 < 0.3 for first in range(0, 5000, 1000))
    assert chosen == [int(document.source) for document in subsampled(read, lambda _: size / 4, seed=3)]
    assert chosen != [int(document.source) for document in subsampled(read, lambda _: size / 4, seed=4)]
    assert len(list(subsampled(read, lambda _: 2 * size, seed=3))) == len(documents)
