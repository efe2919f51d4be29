"""Extractions of data larger than a window: planned piece by piece, resumed from anywhere, the same store in the end."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from kvstore import FingerprintMismatchError, open_store
from kvstore.describe import describe
from kvstore.drop import drop_samples
from kvstore.rewrite import merge_stores, recode_store
from kvstore.storage import Storage, locate
from kvstore.verify import verify_store
from pipeline.budget import END_BYTES, store_bytes
from pipeline.config import ExtractConfig
from pipeline.data import samples
from pipeline.data.chat import ROLES
from pipeline.data.windows import Window
from pipeline.extract import ExtractSummary, extract
from pipeline.models.resolve import resolve_model
from pipeline.monitor.run_log import LogReader
from pipeline.monitor.status import StatusReader
from pipeline.parts import Part, RunParts
from pipeline.repair import repair_store
from tests.checkpoints import byte_tokenizer, save_checkpoint
from tests.data.test_chat import CHATML, SPECIAL
from tests.kvstore.test_rewrite import codes_by_id
from tests.pipeline.test_growth import counts, settings_of, start, state

WINDOW = 500
WORDS = [
    "run",
    "the",
    "teacher",
    "once",
    "keep",
    "its",
    "keys",
    "and",
    "values",
    "small",
    "and",
    "train",
    "any",
    "student",
    "from",
    "them",
]


def texts(count: int, first: int = 0) -> list[str]:
    """Texts of which every fifth is that of 21 before."""

    def text(number: int) -> str:
        return f"{number} " + " ".join(WORDS[number % 7 : number % 7 + 6 + number % 3])

    return [text(number - 21 if number % 5 == 4 and number > 21 else number) for number in range(first, first + count)]


def write(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streaming")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    return save_checkpoint(folder / "teacher", "qwen2", num_hidden_layers=1, hidden_size=32)


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write(folder / "data.jsonl", texts(60))


@pytest.fixture(scope="module")
def whole(teacher: Path, data: Path, folder: Path) -> Path:
    """All of the data in one window."""
    run(teacher, data, folder / "whole", window_tokens=10**9)
    return folder / "whole"


@pytest.fixture(scope="module")
def streamed(teacher: Path, data: Path, whole: Path, folder: Path) -> Path:
    run(teacher, data, folder / "streamed", calibration=str(whole))
    return folder / "streamed"


def run(teacher: Path, data: Path, out: Path, **more: Any) -> ExtractSummary:
    config = ExtractConfig(**settings_of(teacher, [data], out, **{"window_tokens": WINDOW, **more}))
    return extract(config, resolve_model(config.teacher), say=lambda _: None)


def test_samples_are_let_go_of_when_they_have_become_tasks(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter, held, largest = RunParts.enter, [], []

    def watched(parts: RunParts, window: Window, held_store: Storage) -> Part:
        part = enter(parts, window, held_store)
        largest.append(len(window.samples))
        held.append(sum(type(found) is samples.Sample for found in gc.get_objects()))
        return part

    gc.collect()
    monkeypatch.setattr(RunParts, "enter", watched)
    run(teacher, data, tmp_path / "store")
    assert len(held) > 3
    # Those of the window that is entered, and of the next, which is planned meanwhile.
    assert max(held) <= 2 * max(largest), (held, largest)


def copy(store: Path, to: Path) -> Path:
    return Path(shutil.copytree(store, to))


def test_a_store_made_window_by_window_holds_what_one_of_a_single_window_does(whole: Path, streamed: Path) -> None:
    store, expected = open_store(streamed), open_store(whole)
    assert codes_by_id(store) == codes_by_id(expected)
    assert counts(streamed) == counts(whole)
    assert max(counts(streamed).values()) == 2
    parts, (made,) = store.manifest.data["parts"], store.manifest.runs
    assert len(parts) == len(made["windows"]) > 3
    assert (made["first_part"], made["complete"]) == (0, True)
    assert store.manifest.layout.num_shards == sum(part["num_shards"] for part in parts)
    assert sum(window["documents"] for window in made["windows"]) == 60
    assert any("repeats" in part for part in parts), "no window repeats a sample of an earlier one"
    report = verify_store(str(streamed), deep=True)
    assert (report.problems, report.orphans) == ((), ())
    assert describe(store)["complete"] is True


def test_resuming_a_finished_store_makes_the_tokens_of_its_first_and_last_window_alone(
    teacher: Path, data: Path, streamed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tokenised = state(streamed), []
    cut = samples.Cutter.samples

    def counted(self: samples.Cutter, documents: Any) -> Iterator[list[samples.Sample]]:
        for found in cut(self, documents):
            tokenised.append(1)
            yield found

    monkeypatch.setattr(samples.Cutter, "samples", counted)
    assert run(teacher, data, streamed).new_shards == 0
    assert state(streamed) == before
    windows = open_store(streamed).manifest.runs[0]["windows"]
    assert len(tokenised) == windows[0]["documents"] + windows[-1]["documents"]


@pytest.mark.parametrize("kill_after", [9, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 22))])
def test_killed_in_any_window_it_goes_on_to_the_same_store(
    kill_after: int, teacher: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    settings = settings_of(teacher, [data], store, window_tokens=WINDOW, calibration=str(whole))
    with start(settings, kill_after=kill_after) as process:
        assert process.wait(timeout=120) == -signal.SIGKILL
    manifest = open_store(store).manifest
    assert manifest.is_growing
    assert describe(open_store(store))["complete"] is False
    with pytest.raises(ValueError, match=r"--append: .* finish it first"):
        run(teacher, write(tmp_path / "other.jsonl", ["other data"]), store, append=True)
    planned = open_store(whole).manifest.layout.num_shards
    assert run(teacher, data, store).num_shards >= planned
    assert codes_by_id(open_store(store)) == codes_by_id(open_store(whole))
    assert counts(store) == counts(whole)
    assert verify_store(str(store)).problems == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda rows: [*rows[:32], "another text here", *rows[33:]], r"window \d of the data is", id="changed-within"
        ),
        pytest.param(lambda rows: rows[:-1], r"num_samples: got \d+, expected \d+", id="shorter"),
        pytest.param(lambda rows: [*rows, "and a text more"], r"num_samples: got \d+, expected \d+", id="one-more"),
        pytest.param(lambda rows: rows * 2, r"num_(samples|tokens): got|complete: got false, expected true", id="twice"),
        pytest.param(lambda rows: ["another text here", *rows[1:]], r"the data of this run differs", id="first-window"),
    ],
)
def test_data_that_has_changed_since_is_refused(
    change: Callable[[list[str]], list[str]], message: str, teacher: Path, streamed: Path, tmp_path: Path
) -> None:
    before = state(streamed)
    changed = write(tmp_path / "data.jsonl", change(texts(60)))
    with pytest.raises(ValueError, match=message):
        run(teacher, changed, streamed)
    assert state(streamed) == before


@pytest.mark.parametrize("limits", [{"max_tokens": 1_200}, {"limit": 20}])
def test_limits_count_over_all_windows_and_others_are_refused(
    limits: dict[str, int], teacher: Path, data: Path, streamed: Path, tmp_path: Path
) -> None:
    run(teacher, data, tmp_path / "limited", **limits)
    run(teacher, data, tmp_path / "at-once", window_tokens=10**9, **limits)
    limited, at_once = open_store(tmp_path / "limited"), open_store(tmp_path / "at-once")
    assert len(limited.manifest.data["parts"]) > 1
    assert set(limited.samples.ids) == set(at_once.samples.ids)
    assert run(teacher, data, tmp_path / "limited", **limits).new_shards == 0
    with pytest.raises(FingerprintMismatchError, match=r"complete: got (true|false)|num_samples: got"):
        run(teacher, data, streamed, **limits)


def test_a_byte_limit_holds_where_windows_bring_nothing_but_repeats(teacher: Path, tmp_path: Path) -> None:
    store, fresh = tmp_path / "store", texts(20)
    data = write(tmp_path / "data.jsonl", [*fresh, *(fresh[number % 20] for number in range(900))])
    run(teacher, write(tmp_path / "fresh.jsonl", fresh), tmp_path / "fresh")
    limit = store_bytes(locate(tmp_path / "fresh")) + END_BYTES + 60_000
    run(teacher, data, store, max_bytes=limit)
    cut = open_store(store).manifest
    assert cut.is_growing
    assert 3 < len(cut.data["parts"]) < 30
    assert store_bytes(locate(store)) <= limit
    assert run(teacher, data, store, max_bytes=10 * limit).num_samples == len(set(fresh))
    assert not open_store(store).manifest.is_growing
    assert sum(counts(store).values()) == 920


def test_what_a_run_stores_is_known_once_its_last_window_is_planned(teacher: Path, data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(teacher, data, store)
    ((first, *readings, _),) = LogReader(locate(store)).read().values()
    assert first["total_tokens"] is None
    assert readings[-1]["left_tokens"] == 0
    assert readings[-1]["tokens"] == open_store(store).samples.num_tokens.sum()
    assert StatusReader(str(store)).read().state == "complete"


def test_jobs_of_an_array_share_every_window(teacher: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    made = [run(teacher, data, store, calibration=str(whole), task_range=f"{number}/3").new_shards for number in (2, 3, 1)]
    assert min(made) > 0.2 * sum(made)
    assert codes_by_id(open_store(store)) == codes_by_id(open_store(whole))
    assert counts(store) == counts(whole)
    assert describe(open_store(store))["gate"].keys() == {"before", "after"}


def test_more_data_appended_window_by_window_counts_what_is_known(
    teacher: Path, data: Path, whole: Path, streamed: Path, tmp_path: Path
) -> None:
    store = copy(streamed, tmp_path / "store")
    more = write(tmp_path / "more.jsonl", texts(30, first=45))
    run(teacher, more, store, append=True)
    assert len(open_store(store).manifest.runs) == 2
    run(teacher, more, tmp_path / "more", calibration=str(whole))
    merge_stores([str(whole), str(tmp_path / "more")], str(tmp_path / "both"))
    assert codes_by_id(open_store(store)) == codes_by_id(open_store(tmp_path / "both"))
    assert counts(store) == counts(tmp_path / "both")
    before = state(store)
    for again in (data, more):
        assert run(teacher, again, store).new_shards == 0
    assert state(store) == before


def test_a_sample_dropped_from_a_window_stays_away_and_a_lost_shard_comes_back(
    teacher: Path, data: Path, streamed: Path, tmp_path: Path
) -> None:
    store = copy(streamed, tmp_path / "store")
    names = open_store(store).samples
    row = int(np.flatnonzero(names.shard == open_store(store).manifest.layout.num_shards // 2)[0])
    drop_samples(str(store), [names.ids[row]])
    expected = codes_by_id(open_store(store))
    assert run(teacher, data, store).new_shards == 0
    assert codes_by_id(open_store(store)) == expected
    shard = int(names.shard[row]) + 1
    (store / f"commits/{shard:05d}.json").unlink()
    assert repair_store(str(store)).shards == (shard,)
    assert codes_by_id(open_store(store)) == expected
    assert verify_store(str(store), deep=True).problems == ()


def test_what_is_written_while_a_source_still_streams_can_be_read(teacher: Path, tmp_path: Path) -> None:
    """A pipe stands for data without end: the next text comes only when the first shards are in the store."""
    pipe, store = tmp_path / "endless.jsonl", tmp_path / "store"
    os.mkfifo(pipe)
    seen: list[int] = []

    def feed() -> None:
        with pipe.open("w") as file:
            for number, text in enumerate(texts(200)):
                file.write(json.dumps({"text": text}) + "\n")
                if number == 140:  # texts are tokenised by the 64
                    file.flush()
                    _wait_for(lambda: len(list(store.glob("commits/*.json"))) > 3)
                    seen.append(len(open_store(store)))

    thread = threading.Thread(target=feed)
    thread.start()
    summary = run(teacher, pipe, store)
    thread.join(timeout=60)
    assert 0 < seen[0] < summary.num_samples
    assert not open_store(store).manifest.is_growing


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def chat_teacher(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHATML
    path = save_checkpoint(folder / "chat-teacher", "qwen2", num_hidden_layers=1, hidden_size=32, vocab_size=300)
    tokenizer.save_pretrained(path)
    return path


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": "answer " * (number % 5 + 1)},
            ]
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def chats(folder: Path) -> Path:
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(30)))
    return folder / "chats.jsonl"


@pytest.fixture(scope="module")
def chat_store(chat_teacher: Path, chats: Path, folder: Path) -> Path:
    run(chat_teacher, chats, folder / "chat-store")
    return folder / "chat-store"


def test_a_store_of_conversations_says_who_said_each_token_to_any_zarr_tool(chat_store: Path) -> None:
    group = zarr.open_group(str(chat_store / "kv.zarr"), mode="r")
    ids, role, mask = (np.asarray(group[name][:]) for name in ("input_ids", "role", "loss_mask"))
    assert (role.dtype, mask.dtype) == (np.uint8, np.uint8)
    tokenizer = open_store(chat_store).tokenizer_path
    assert tokenizer is not None
    import transformers

    decode = transformers.AutoTokenizer.from_pretrained(tokenizer).decode
    assert decode(ids[role == ROLES.index("assistant")][:40]).startswith("answer")
    assert "question" not in decode(ids[mask == 1])
    assert (mask[ids == -1] == 0).all()
    np.testing.assert_array_equal(mask == 1, role == ROLES.index("assistant"))
    batch = open_store(chat_store).read([3, 1])
    np.testing.assert_array_equal(batch.beside["loss_mask"], batch.beside["role"] == ROLES.index("assistant"))
    assert 0 < batch.beside["loss_mask"].sum() < len(batch.input_ids)


@pytest.fixture(scope="module")
def part_store(chat_teacher: Path, chats: Path, folder: Path) -> Path:
    run(chat_teacher, chats, folder / "part-store", response_only=True)
    return folder / "part-store"


def test_a_response_only_store_has_keys_and_values_of_the_assistants_tokens_alone(
    chat_store: Path, part_store: Path, chat_teacher: Path, chats: Path
) -> None:
    whole, part = open_store(chat_store), open_store(part_store)
    assert whole.samples.ids == part.samples.ids
    everything, learnt = whole.read_codes(range(len(whole))), part.read_codes(range(len(part)))
    np.testing.assert_array_equal(everything.input_ids, learnt.input_ids)
    np.testing.assert_array_equal(everything.learnt, learnt.learnt)
    for where, codes in learnt.codes.items():
        np.testing.assert_array_equal(codes[:, learnt.learnt], everything.codes[where][:, learnt.learnt])
        assert np.unique(codes[:, ~learnt.learnt]).size == 1
    assert describe(part)["stored_bytes"] < describe(whole)["stored_bytes"]
    assert json.loads((part_store / "gate.json").read_text())["after"]["passed"]
    assert verify_store(str(part_store), deep=True).problems == ()
    before = state(part_store)
    run(chat_teacher, chats, part_store, response_only=True)
    assert state(part_store) == before
    with pytest.raises(FingerprintMismatchError, match=r"response_only"):
        run(chat_teacher, chats, part_store)


@pytest.mark.slow
def test_a_response_only_store_can_be_recoded_merged_and_repaired(part_store: Path, tmp_path: Path) -> None:
    recode_store(str(part_store), "q4z", str(tmp_path / "recoded"))
    recoded = open_store(tmp_path / "recoded")
    batch = recoded.read_codes(range(len(recoded)))
    for codes in batch.codes.values():
        assert np.unique(codes[:, ~batch.learnt]).size == 1
    first, second = (open_store(path).samples.fidelity()["0"] for path in (part_store, tmp_path / "recoded"))
    for kind in ("key", "value"):  # the errors of both codecs, added
        assert first[kind]["centred_error"] < second[kind]["centred_error"] < first[kind]["centred_error"] + 0.13
    one, other = copy(part_store, tmp_path / "one"), copy(part_store, tmp_path / "other")
    merge_stores([str(one), str(other)], str(tmp_path / "merged"))
    expected = codes_by_id(open_store(part_store))
    assert codes_by_id(open_store(tmp_path / "merged")) == expected
    (damaged,) = sorted((other / "kv.zarr/key/c").rglob("0"))[-1:]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    repair_store(str(other))
    assert codes_by_id(open_store(other)) == expected


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"text": "plain text"}], "plain text"),
        ([{"messages": [{"role": "user", "content": "anyone here?"}]}], "conversations in which no assistant speaks"),
    ],
)
def test_response_only_of_data_without_responses_is_refused(
    rows: list[dict[str, Any]], found: str, chat_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"--response-only: got {found} .*, expected conversations with the assistant's turns"):
        run(chat_teacher, tmp_path / "data.jsonl", tmp_path / "store", response_only=True)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_masks_survive_merging_dropping_and_repair(chat_teacher: Path, chats: Path, chat_store: Path, tmp_path: Path) -> None:
    def masks(path: Path) -> dict[str, bytes]:
        store = open_store(path)
        return {
            identity: store.read([index], layers=()).beside["role"].tobytes()
            for index, identity in enumerate(store.samples.ids)
        }

    expected = masks(chat_store)
    one, other = copy(chat_store, tmp_path / "one"), copy(chat_store, tmp_path / "other")
    merge_stores([str(one), str(other)], str(tmp_path / "merged"))
    assert masks(tmp_path / "merged") == expected
    gone = open_store(one).samples.ids[5]
    drop_samples(str(one), [gone])
    assert masks(one) == {identity: mask for identity, mask in expected.items() if identity != gone}
    for array in ("key", "role"):
        (damaged,) = sorted((other / f"kv.zarr/{array}/c").rglob("2" if array == "role" else "0"))[-1:]
        damaged.write_bytes(damaged.read_bytes()[:-3])
        assert not verify_store(str(other)).ok
        repair_store(str(other))
        assert masks(other) == expected
        assert verify_store(str(other), deep=True).problems == ()


def test_conversations_and_plain_text_do_not_share_a_store_by_accident(
    chat_teacher: Path, chats: Path, chat_store: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(FingerprintMismatchError, match=r"template: got null, expected"):
        run(chat_teacher, data, chat_store, append=True)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(data.read_text() + chats.read_text())
    with pytest.raises(ValueError, match=r"got conversations or overlapping samples, which need the arrays role, loss_mask"):
        run(chat_teacher, mixed, tmp_path / "mixed")


def test_samples_may_overlap_and_say_which_tokens_are_context(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(WORDS) * 4)
    run(teacher, tmp_path / "long.txt", tmp_path / "store", overlap=16)
    store = open_store(tmp_path / "store")
    assert store.manifest.token_arrays == ("input_ids", "loss_mask")
    batch = store.read(range(len(store)))
    assert int(batch.beside["loss_mask"].sum()) == len((tmp_path / "long.txt").read_bytes())
    assert len(batch.input_ids) == int(batch.beside["loss_mask"].sum()) + 16 * (len(store) - 1)


def test_a_random_share_of_the_data_is_about_as_large_as_asked_for(teacher: Path, data: Path, tmp_path: Path) -> None:
    summary = run(teacher, data, tmp_path / "store", sample_tokens=1_000, seed=1)
    assert 600 < summary.num_tokens < 1_400
