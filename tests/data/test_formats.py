"""What a file is read as, by its name and by its first bytes; what is no text is refused by name."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import rows as rows_room
from pipeline.data.documents import Document, read_documents
from pipeline.data.notes import Notes

TEXTS = ["one", 'two, "quoted"\nand a second line', "drei Ümläute 🙂"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def separated(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["n", "text"], *enumerate(TEXTS)])
    return file.getvalue().encode()


def texts(path: Path | str, **more: Any) -> list[str]:
    return [document.text for document in read_documents([str(path)], **more)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[(name, LINES) for name in ("a.jsonl", "a.JSONL", "a.ndjson", "a.NDJSON", "a.jsonlines", "a.json", "a.JSON")],
        *[(name, gzip.compress(LINES, mtime=0)) for name in ("a.jsonl.gz", "a.JSONL.GZ", "a.ndjson.gz")],
        *[(name, zstandard.compress(LINES)) for name in ("a.jsonlines.zst", "a.json.ZST")],
        *[(name, separated(",")) for name in ("a.csv", "a.CSV")],
        ("a.csv.gz", gzip.compress(separated(","), mtime=0)),
        ("a.csv", codecs.BOM_UTF8 + separated(",")),
        ("a.tsv", separated("\t")),
        ("a.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
        (
            "a.json",
            codecs.BOM_UTF8 + json.dumps([{"text": text, "more": [[1], {"a": "]"}]} for text in TEXTS], indent=2).encode(),
        ),
        ("a.json.gz", gzip.compress(json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False).encode(), mtime=0)),
    ],
)
def test_rows_are_read_by_the_suffix_in_any_case(name: str, content: bytes, tmp_path: Path) -> None:
    assert texts(write(tmp_path / name, content)) == TEXTS


def test_a_table_is_read_by_its_column_whatever_its_case_and_its_other_columns(tmp_path: Path) -> None:
    wild = pa.array([2**50, 1, 0], type=pa.timestamp("s"))  # a time beyond Python's
    pq.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS, "when": wild}), tmp_path / "a.PARQUET")
    assert texts(tmp_path / "a.PARQUET") == TEXTS
    with pytest.raises(ValueError, match=r"a\.PARQUET, row 0 has neither a text .* in 'body'; its fields are id, text, when"):
        texts(tmp_path / "a.PARQUET", text_field="body")
    write(tmp_path / "a.csv", separated(","))
    with pytest.raises(ValueError, match=r"a\.csv, line 2 has neither a text .* in 'body'; its fields are n, text"):
        texts(tmp_path / "a.csv", text_field="body")


ARRAYS = st.lists(
    st.dictionaries(
        st.text(max_size=4), st.one_of(st.text(max_size=30), st.lists(st.text('"\\[]{},', max_size=4))), max_size=3
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(values=ARRAYS, indent=st.sampled_from([None, 1]), block=st.integers(1, 40))
def test_an_array_is_taken_apart_wherever_it_is_cut(
    values: list[dict[str, Any]], indent: int | None, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole, path = rows_room._CHARACTERS_AT_ONCE, tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(values, indent=indent))
    try:
        rows_room._CHARACTERS_AT_ONCE = block
        assert [row.value for row in rows_room.file_rows(path, ())] == values
    finally:
        rows_room._CHARACTERS_AT_ONCE = whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"te', r"a\.json is not complete JSON: the array does not end"),
        (b'[{"text": "a"}] {"text": "b"}', "something follows the array"),
        (
            b'[{"text": "a"}, {"text": nonsense}, {"text": "b"}]',
            r"a\.json, row 1 cannot be read as JSON: Expecting value, column 10",
        ),
        (b'[{"text": "a"}, 7]', r"a\.json, row 1 is not an object but a number"),
        (b'[{"text": "a"}, {"text": "\xff"}]', r"a\.json, row 1 is not UTF-8 \(byte 10 of the row is 0xff\)"),
    ],
)
def test_what_is_wrong_with_an_array_is_named_with_its_row(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        texts(write(tmp_path / "a.json", content))


def archive(path: Path) -> bytes:
    with tarfile.open(path / "x", "w:gz") as file:
        file.add(__file__, "a.txt")
    return (path / "x").read_bytes()


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path / "x", "w") as file:
        file.write(__file__, "a.txt")
    return (path / "x").read_bytes()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *[(f"a.{suffix}", "an archive") for suffix in ("zip", "ZIP", "tar", "tar.gz", "tgz", "7z", "jsonl.bz2", "xz", "whl")],
        *[(f"a.{suffix}", "a spreadsheet") for suffix in ("xls", "xlsx", "XLSX", "ods")],
        *[(f"a.{suffix}", "markup") for suffix in ("html", "HTM", "xml", "html.gz")],
        *[(f"a.{suffix}", "a binary table") for suffix in ("arrow", "feather", "orc", "avro", "h5", "tfrecord")],
        *[(f"a.{suffix}", "numbers") for suffix in ("npy", "npz", "pt", "safetensors", "pkl", "gguf")],
        *[(f"a.{suffix}", "a document") for suffix in ("pdf", "docx", "epub", "rtf", "pptx")],
        *[(f"a.{suffix}", "a database") for suffix in ("sqlite", "db")],
        *[(f"a.{suffix}", "a picture") for suffix in ("png", "JPEG", "mp3", "mp4", "woff2")],
        *[(f"a.{suffix}", "a program") for suffix in ("exe", "so", "pyc")],
        ("a.ipynb", "JSON that holds a notebook"),
    ],
)
def test_what_is_no_text_is_refused_by_name(name: str, what: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, b"looks like text\n")
    with pytest.raises(ValueError, match=rf"--data: .*{name} is {what}.*\(by its suffix \.\w+\)\. Leave it out"):
        texts(path)
    with pytest.raises(ValueError, match=rf"is {what}"):
        texts(tmp_path / "*")


def test_markup_is_stored_as_it_is_when_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.html", b"<p>hello</p>")
    write(tmp_path / "b.jsonl", LINES)
    write(tmp_path / "c.xml.gz", gzip.compress(b"<c/>", mtime=0))
    assert texts(tmp_path / "*", as_text=True) == ["<p>hello</p>", LINES.decode(), "<c/>"]
    write(tmp_path / "d.pdf", b"%PDF-1.4 \xff")
    with pytest.raises(ValueError, match=r"d\.pdf is not UTF-8 text \(byte 9\)"):
        texts(tmp_path / "*", as_text=True)


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.MD", "a.py", "a.rst", "Makefile", "ls.1", "a.c", "a.yaml", "a.tex", "a.sql", "README", ".profile", "a.txt.gz"],
)
def test_text_and_source_code_is_read_without_a_word(name: str, tmp_path: Path) -> None:
    notes, content = Notes(), b"some text\n"
    path = write(tmp_path / name, gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    assert texts(path, notes=notes) == ["some text\n"]
    assert list(notes.news()) == []


def test_an_unknown_suffix_is_read_as_text_and_said_once(tmp_path: Path) -> None:
    for name in ("a.foo", "b.foo", "c.bar"):
        write(tmp_path / name, b"some text")
    notes = Notes()
    assert texts(tmp_path / "*", notes=notes) == ["some text"] * 3
    assert [line.partition(", such")[0] for line in notes.news()] == [
        "--data: files with the suffix .bar",
        "--data: files with the suffix .foo",
    ]
    assert list(notes.news()) == []


@pytest.mark.parametrize("name", ["a.foo", "rows", "a.jsonl.bak", "part-00000"])
def test_rows_in_a_file_whose_name_does_not_say_so_are_refused(name: str, tmp_path: Path) -> None:
    for content in (LINES, b'[\n {"text": "a"}]'):
        path = write(tmp_path / name, content)
        with pytest.raises(ValueError, match=rf"{name} holds JSON, which its name does not say; call it \.jsonl"):
            texts(path)
        assert texts(path, as_text=True) == [content.decode()]


@pytest.mark.parametrize("name", ["a.txt", "a.foo", "noname", "a.log"])
def test_bytes_that_are_no_text_are_refused_whatever_the_name(name: str, tmp_path: Path) -> None:
    for content, message in (
        (b"abc\0def", r"is no text: it holds the byte 0 \(byte 3\)"),
        (zipped(tmp_path), "is not UTF-8 text|is no text"),
        (archive(tmp_path), "is not UTF-8 text|is no text"),
        (np.arange(9.0).tobytes(), "is not UTF-8 text|is no text"),
    ):
        with pytest.raises(ValueError, match=message):
            texts(write(tmp_path / name, content))


def test_a_byte_order_mark_is_removed_or_its_encoding_named(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", codecs.BOM_UTF8 + "Ümlaut".encode())) == ["Ümlaut"]
    assert texts(write(tmp_path / "a.jsonl", LINES + codecs.BOM_UTF8 + LINES)) == TEXTS * 2, "two files, one after the other"
    for encoding in ("utf-16", "utf-32"):
        name = encoding.upper()
        with pytest.raises(ValueError, match=rf"a\.txt is not UTF-8 text \(byte 0\): it is {name}"):
            texts(write(tmp_path / "a.txt", "Ümlaut".encode(encoding)))
        for rows in ("a.jsonl", "a.csv", "a.json"):
            with pytest.raises(
                ValueError, match=rf"{rows} is not complete .*: it is {name}, expected UTF-8 \(convert it: iconv"
            ):
                texts(write(tmp_path / rows, LINES.decode().encode(encoding)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,n\na,1\nb\n", r"a\.csv, line 3 has 1 values, expected 2 as in the first line"),
        (b'text,n\n"a\nb",1\nc,2,3\n', r"a\.csv, line 4 has 3 values, expected 2"),
        (b"text,text\na,b\n", r"a\.csv is not complete comma separated values: the column 'text' stands twice"),
        (b"text\na\n\xff\n", r"a\.csv, line 3 is not UTF-8 \(byte 0 of the row is 0xff\)"),
        (b'text\na\n"b\n', r"a\.csv, line 3 is not made of separated values: unexpected end of data"),
        (b'text\n"a"b\nc\n', r"a\.csv, line 2 is not made of separated values"),
    ],
)
def test_what_is_wrong_with_separated_values_is_named_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        texts(write(tmp_path / "a.csv", content))


def test_long_fields_and_conversations_in_separated_values_are_read(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "messages"], ["x" * 200_000, ""], ["", turns], ["", ""]])
    first, second, third = read_documents([str(tmp_path / "a.csv")])
    assert len(first.text) == 200_000
    assert [message.role for message in second.messages or ()] == ["user", "assistant"]
    assert third == Document(source=f"{tmp_path}/a.csv:2", line=4)


def test_a_text_that_is_not_utf8_in_a_table_costs_its_row_alone(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"\xff", b"three"], type=pa.binary())
    column = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1 cannot be read: .*codec can't decode byte 0xff"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", notes=Notes(leaves_out=True)) == ["one", "", "three"]


def test_a_hub_id_with_a_version_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file or folder 'nobody/corpus-2\.5' here, and the hub data set"):
        texts("nobody/corpus-2.5")
    for name in ("nobody/corpus.csv", "nobody/corpus.JSONL", "nobody/corpus.xlsx", "nobody/corpus.ndjson.gz"):
        with pytest.raises(ValueError, match=rf"--data: {name} does not exist"):
            texts(name)


def test_a_file_name_that_is_not_utf8_is_written_out(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.txt"
    path.write_bytes(b"text")
    (document,) = read_documents([str(tmp_path / "*.txt")])
    assert document.source.encode().endswith(rb"caf\udce9.txt")


@pytest.mark.parametrize("name", ["a.jl", "a.txt", "a.TXT"])
@pytest.mark.parametrize("content", [LINES, b'{"messages": [{"role": "user"}]}\n', codecs.BOM_UTF8 + b'[{"text": "a"}]'])
def test_rows_in_a_file_named_as_text_are_refused_too(name: str, content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"{name} holds JSON, which its name does not say; call it \.jsonl"):
        texts(path)
    assert texts(path, as_text=True) == [content.removeprefix(codecs.BOM_UTF8).decode()]


@pytest.mark.parametrize("name", ["a.jl", "a.txt"])
def test_text_is_read_as_text_though_rows_may_have_its_suffix(name: str, tmp_path: Path) -> None:
    notes, content = Notes(), 'f(x) = x^2  # {"a": 1}\n'
    assert texts(write(tmp_path / name, content.encode()), notes=notes) == [content]
    assert list(notes.news()) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.md"])
def test_compressed_bytes_under_another_name_are_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    for content, said in (
        (gzip.compress(LINES), f"it is gzip, which its name does not say: call it {name}.gz"),
        (zstandard.compress(LINES), f"it is zstd, which its name does not say: call it {name}.zst"),
        (zipped(tmp_path), "it is a zip archive, which its name does not say: unpack it"),
    ):
        with pytest.raises(ValueError, match=said):
            texts(write(tmp_path / name, content))
