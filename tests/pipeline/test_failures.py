"""What ends a command is one line, and what a store, a file or a name says cannot steer a terminal: real commands, odd input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.drop import write_dropped
from kvstore.storage import locate
from pipeline.failures import in_words
from pipeline.terminal import in_line, shown
from tests import processes
from tests.s3 import s3_path
from tests.stores import random_source, small_spec, write_store

NASTY = "[/red][link=file:///etc/passwd]x[/link] \x1b]0;owned\x07\r\x1b[2J\u202e:smile: \x9b31m\ud800"
STEERING = ("\x1b", "\x07", "\r", "\u202e", "\x9b")
INSPECT = ["inspect", "store"]
ON_A_STORE = [
    INSPECT,
    ["verify", "store"],
    ["status", "store"],
    ["repair", "store"],
    ["recode", "store", "--codec", "q8", "--out", "out"],
    ["merge", "store", "store", "--out", "out"],
    ["align", "store", "--student", "store", "--out", "out"],
    ["match-layers", "store", "--student", "store"],
    ["drop", "store", "--ids", "ids"],
    ["fit", "--store", "store", "--student", "store", "--out", "out"],
    ["train", "--store", "store", "--student", "store", "--out", "out"],
    ["doctor", "--teacher", "store", "--student", "store", "--store", "store"],
    ["extract", "--teacher", "store", "--data", "store", "--out", "out"],
    ["plan", "--teacher", "store", "--data", "store", "--out", "out"],
    ["eval", "store", "--data", "store"],
    ["report", "store"],
]


def nasty_store(path: Path) -> Path:
    """A store whose texts and names are written for terminals, not for people."""
    source = random_source(small_spec(), [9, 10])
    safe = NASTY.replace("\ud800", "")
    signal = {"weights": safe, "recoded_from": safe}
    write_store(path, source, "q8", documents=[safe, safe], texts=[safe, safe], signal=signal)
    write_dropped(locate(path), {"0" * 64: 0}, {"0" * 64: {"source": safe, "reason": safe}})
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(INSPECT, id="inspect store"),
        *(
            pytest.param(arguments, id=" ".join(arguments), marks=pytest.mark.slow)
            for arguments in (["verify", "store"], ["status", "store"], ["verify", "store", "--deep"])
        ),
    ],
)
@pytest.mark.parametrize("encoding", [pytest.param("utf-8", marks=pytest.mark.slow), "ascii"])
def test_what_a_store_says_of_itself_is_shown_harmlessly_in_every_encoding(
    arguments: list[str], encoding: str, tmp_path: Path
) -> None:
    nasty_store(tmp_path / "store")
    environment = {"PYTHONIOENCODING": encoding, "LC_ALL": "C" if encoding == "ascii" else "C.UTF-8", "COLUMNS": "400"}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**os.environ, **path, **environment}, check=False)
    said = (done.stdout + done.stderr.replace(b"\r", b"")).decode(encoding)
    assert "Traceback" not in said
    assert not [char for char in STEERING if char in said], said
    if arguments == INSPECT:
        assert done.returncode == 0
        assert r"[/red][link=file:///etc/passwd]x[/link] \x1b]0;owned\x07\r\x1b[2J\u202e:smile: \x9b31m" in said


def test_nothing_that_does_not_print_reaches_a_terminal() -> None:
    assert shown("plain text, größer, 日本") == "plain text, größer, 日本"
    assert shown("two\nlines") == "two\nlines"
    assert in_line("two\nlines") == "two\\nlines"
    for char in NASTY:
        assert shown(char).isprintable()


@pytest.mark.parametrize("arguments", ON_A_STORE, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize(
    "thing", ["file", "closed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("missing", "empty"))]
)
def test_a_place_that_is_no_store_or_model_ends_every_command_in_a_message(
    arguments: list[str], thing: str, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    if thing == "file":
        place.write_bytes(b"\xff\x00 no store")
    elif thing != "missing":
        place.mkdir()
    if thing == "closed":
        (place / "manifest.json").symlink_to("manifest.json")  # cannot be opened, not even by root
    (tmp_path / "ids").write_text("00000000\n")
    done = processes.kvpipe(*arguments, cwd=tmp_path)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (1, 2), done.stderr
    message = done.stderr.replace("\r", "\n") + done.stdout
    assert "error: " in message.lower() or "DAMAGED" in message, message
    assert "not foreseen" not in message, message


def test_a_bucket_that_is_not_there_or_not_ours_is_one_message(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPIPE_RETRY_S", "0.2")
    name, _ = s3_path(bucket)
    for location in (f"{bucket}/nothing", f"s3://{name}-no-such-bucket/store"):
        for command in ("inspect", "verify", "status"):
            done = processes.kvpipe(command, location, cwd=tmp_path)
            assert done.returncode == 1, done.stderr
            assert "Traceback" not in done.stderr, done.stderr
            assert "not foreseen" not in done.stderr, done.stderr


class StrangeError(Exception):
    """What nobody expects."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(ValueError("wrong"), "error: wrong", id="ours"),
        pytest.param(FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'", id="system"),
        pytest.param(ValueError(), "error: ValueError", id="without-a-word"),
        pytest.param(ExceptionGroup("several", [OSError("first"), OSError("second")]), "error: first", id="group"),
        pytest.param(RecursionError("maximum"), "error: something that was read is nested too deeply", id="recursion"),
        pytest.param(MemoryError(), "error: the memory does not suffice (MemoryError)", id="memory"),
        pytest.param(
            RuntimeError("CUDA out of memory. Tried"), "error: the memory does not suffice (RuntimeError: CUDA", id="gpu"
        ),
    ],
)
def test_what_is_foreseen_is_said_in_one_line(error: BaseException, expected: str) -> None:
    assert in_words(error).startswith(expected)
    assert "\n" not in in_words(error)


def test_what_nobody_foresaw_is_one_line_that_names_a_file_with_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StrangeError, match="of two") as raised:
        raise StrangeError("line\nof two")
    said = in_words(raised.value)
    monkeypatch.setenv("KVPIPE_DEBUG", "1")
    whole = in_words(raised.value)
    monkeypatch.delenv("KVPIPE_DEBUG")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert "KVPIPE_DEBUG=1" in in_words(raised.value)
    (file,) = tmp_path.iterdir()
    assert said == f"error: StrangeError: line of two (from tests; {file} says where)"
    assert "Traceback" in file.read_text()
    assert whole.startswith("Traceback")


FAILING = """
import os, tempfile
import kvstore
tempfile.tempdir = os.getcwd()
def fail(*_):
    {statement}
kvstore.open_store = fail
from pipeline.cli import main
main()
"""


@pytest.mark.parametrize(
    ("statement", "status", "said"),
    [
        pytest.param("raise KeyError('x')", 1, "error: KeyError: 'x' (this is not foreseen", id="bug"),
        pytest.param("raise KeyboardInterrupt", 130, "interrupted; ", id="interrupt"),
        pytest.param("fail()", 1, "nested too deeply", id="recursion"),
        pytest.param("raise BaseException('panic')", 1, "error: BaseException: panic", id="panic"),
        pytest.param(
            "from safetensors import SafetensorError as e; raise e('header')", 1, "SafetensorError: header", id="library"
        ),
    ],
)
def test_no_exception_reaches_the_terminal_as_a_traceback(statement: str, status: int, said: str, tmp_path: Path) -> None:
    code = FAILING.format(statement=statement)
    done = processes.Process(code, "inspect", "store", cwd=tmp_path, environment={"KVPIPE_DEBUG": None}).finish()
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        pytest.param(">/dev/full", "No space left on device", id="full", marks=pytest.mark.slow),
        pytest.param(">&-", "", id="closed"),
        pytest.param("2>&-", "", id="no-messages", marks=pytest.mark.slow),
    ],
)
def test_output_that_cannot_be_printed_is_no_traceback(redirection: str, said: str, tmp_path: Path) -> None:
    write_store(tmp_path / "store", random_source(small_spec(), [9]), "raw")
    command = f"{sys.executable} -m pipeline.cli inspect store {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == (1 if said else 0), done.stderr


def test_json_stays_json_whatever_a_store_holds(tmp_path: Path) -> None:
    nasty_store(tmp_path / "store")
    done = processes.kvpipe("inspect", "store", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["quarantined"]["0" * 64]["source"] == NASTY.replace("\ud800", "")
    assert not [char for char in STEERING if char in done.stdout]
