"""What killed processes leave in the temporary folder: nothing that stays. Real processes, real SIGKILL."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from kvstore.temporary import temporary_folder
from tests import processes
from tests.checkpoints import byte_tokenizer
from tests.stores import random_source, small_spec, write_store

KILLED = """
import os, signal, tempfile
import kvstore.compose
tempfile.tempdir = os.environ["TMPDIR"]  # where the process was forked from, it was asked for already
kvstore.compose.create_store = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from pipeline.cli import main
main()
"""
HOLDING = """
import os, pathlib, sys, tempfile, time
from kvstore.temporary import temporary_folder
tempfile.tempdir = os.environ["TMPDIR"]
with temporary_folder("held") as folder:
    pathlib.Path(folder, "content").write_text("content")
    pathlib.Path(sys.argv[1]).write_text(str(folder))
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this process and of those it starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["merge", "a", "b", "--out", "out"], id="merge"),
        pytest.param(["recode", "a", "--codec", "q8", "--out", "out"], id="recode"),
    ],
)
def test_a_command_killed_while_it_makes_a_store_leaves_no_tokenizer_behind(
    arguments: list[str], place: Path, tmp_path: Path
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, seed in (("a", 1), ("b", 2)):
        write_store(tmp_path / name, random_source(small_spec(), [20, 30], seed), "raw", tokenizer=tmp_path / "tokenizer")
    done = processes.Process(KILLED, *arguments, cwd=tmp_path, environment={"TMPDIR": str(place)}).finish()
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(place.glob("kvpipe-*")) == []


def test_a_folder_is_there_while_its_process_lives_and_goes_with_the_next_when_it_was_killed(
    place: Path, tmp_path: Path
) -> None:
    named = tmp_path / "named"
    with processes.Process(HOLDING, named, environment={"TMPDIR": str(place)}) as process:
        until = time.monotonic() + 60
        while not (named.exists() and named.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        held = Path(named.read_text())
        with temporary_folder("mine") as mine:
            assert (held / "content").read_text() == "content"
            assert list(mine.iterdir()) == []
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert held.exists()
    with temporary_folder("mine"):
        assert not held.parent.exists()
    assert list(place.glob("kvpipe-*")) == []


def test_what_others_left_under_a_name_of_ours_is_not_touched(place: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "lock").write_text("")
    (place / "kvpipe-link").symlink_to(precious)
    (place / "kvpipe-own").mkdir()
    (place / "kvpipe-own" / "file").write_text("no lock, so it is none of these folders")
    with temporary_folder("mine"):
        pass
    assert (precious / "lock").exists()
    assert (place / "kvpipe-own" / "file").exists()
