"""`kvpipe plan`: what it says against what an extraction then does, and what it says where little is known."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from kvstore import StoreFormatError, open_store
from kvstore.codec import CODECS
from kvstore.layout import RowBytes, fill_shards, plan_layout
from kvstore.spec import parse_layers
from pipeline.cli import cli
from pipeline.config import ExtractConfig
from pipeline.extract import ExtractSummary, extract
from pipeline.models.presets import teacher_preset_names
from pipeline.models.resolve import ModelLoadError, resolve_model
from pipeline.planning.data_size import measure_data, text_bytes
from pipeline.planning.estimate import PLOT_BYTES, Estimate, Records, Room, Rung, alternatives, scaled_layout, tokens_that_fit
from pipeline.planning.planner import plan_extraction
from pipeline.planning.view import show_estimate
from tests.checkpoints import byte_tokenizer, save_checkpoint

STDLIB = Path(json.__file__).parent
TRIAL_S = 0.2


def texts(num_bytes: int, each: int = 700) -> list[str]:
    source = "".join(file.read_text() for file in sorted(STDLIB.parent.glob("*.py")))[:num_bytes]
    return [source[first : first + each] for first in range(0, len(source), each)]


def size_by(monkeypatch: pytest.MonkeyPatch, tokens: int, places: int) -> None:
    """Sizes come from the same samples however fast this machine is, and from few places, for each costs a shard in every codec."""
    for name, number in {
        "draw.PLACES": places,
        "trial._SIZE_TOKENS": tokens,
        "trial._LEAST_SIZE_TOKENS": float(tokens),
    }.items():
        monkeypatch.setattr(f"pipeline.planning.{name}", number)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    size_by(monkeypatch, 2_000, 2)


@pytest.fixture
def a_third_of_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for sizes to be right."""
    size_by(monkeypatch, 12_000, 8)


@pytest.fixture
def one_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """That asked for, not all to choose among."""
    monkeypatch.setattr("pipeline.planning.trial.CODECS", {})


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "more": "x" * 30}) + "\n" for text in rows))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts(40_000))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "qwen2", "qwen2", num_hidden_layers=3)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    over = {"num_key_value_heads": 1, "num_hidden_layers": 2, "num_attention_heads": 4}
    return save_checkpoint(tmp_path_factory.mktemp("student") / "qwen2", "qwen2", seed=1, **over)


def config_of(teacher: Path | str, corpus: Path, out: Path | str, **settings: Any) -> ExtractConfig:
    chosen = {"seq_len": 200, "batch_tokens": 1024, "accept_fidelity": True, "gate_tokens": 256, **settings}
    return ExtractConfig(teacher=str(teacher), data=(str(corpus),), out=str(out), **chosen)


def plan(config: ExtractConfig, **over: Any) -> Estimate:
    return plan_extraction(config, lambda _: None, trial_s=TRIAL_S, **over)


def run(config: ExtractConfig) -> ExtractSummary:
    return extract(config, resolve_model(config.teacher), say=lambda _: None)


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.usefixtures("a_third_of_the_corpus", "one_codec")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="mix"),
        pytest.param({"codec": "raw", "keep_text": False}, id="raw-without-text", marks=pytest.mark.slow),
        pytest.param({"codec": "q4z,0=q8"}, id="by-layer", marks=pytest.mark.slow),
        pytest.param({"student": "tiny"}, id="baked", marks=pytest.mark.slow),
        pytest.param({"max_tokens": 20_000, "seed": 3}, id="part-of-the-data", marks=pytest.mark.slow),
    ],
)
def test_sizes_are_within_three_percent_of_what_is_then_written(
    settings: dict[str, Any], teacher: Path, student: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    settings = {name: str(student) if value == "tiny" else value for name, value in settings.items()}
    config = config_of(teacher, corpus, out, **settings)
    estimate = plan(config)
    assert list(tmp_path.iterdir()) == [], "nothing may be written to --out"
    summary = run(config)
    assert (estimate.num_tokens, estimate.is_exact) == (summary.num_tokens, True)
    assert estimate.chosen.total_bytes is not None
    written, plots = bytes_of(out), (0, -PLOT_BYTES, PLOT_BYTES)  # whether a run is long enough for a plot is seen later
    assert min(abs(estimate.chosen.total_bytes + plot - written) for plot in plots) <= 0.03 * written
    assert estimate.chosen.bytes_per_token == pytest.approx(summary.stored_bytes / summary.num_tokens, rel=0.03)
    assert estimate.chosen.shards == summary.num_shards
    assert estimate.files == pytest.approx(len([path for path in out.rglob("*") if path.is_file()]), abs=1)  # a plot or none
    store = open_store(out)
    assert (estimate.chunk_tokens, estimate.shard_tokens) == (
        store.manifest.layout.chunk_tokens,
        store.manifest.layout.shard_tokens,
    )
    assert estimate.geometry["values_per_token"] == store.spec.values_per_token
    assert estimate.geometry["baked"] == ("student" in settings)
    assert estimate.fits
    assert estimate.hours is not None
    assert estimate.hours.total > estimate.hours.steady > 0


@pytest.mark.usefixtures("one_codec")
@pytest.mark.slow
def test_sizes_come_from_all_over_the_data_and_say_how_sure_they_are(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the data takes much less than the other: what is tried of one place would be far off."""
    corpus = write_rows(tmp_path / "halves.jsonl", texts(5_600) + [f"{number:06d}-" * 100 for number in range(8)])
    config = config_of(teacher, corpus, tmp_path / "store")
    size_by(monkeypatch, 3_000, 16)
    estimate = plan(config)
    assert 1_500 < estimate.sized_tokens <= 3_000
    summary = run(config)
    actual = summary.stored_bytes / summary.num_tokens
    assert estimate.bytes_relative_error is not None
    assert 0.01 < estimate.bytes_relative_error < 0.5
    assert abs(estimate.chosen.bytes_per_token - actual) <= estimate.bytes_relative_error * actual
    size_by(monkeypatch, 10**6, 16)
    whole = plan(config_of(teacher, corpus, tmp_path / "other"))
    assert (whole.sized_tokens, whole.bytes_relative_error) == (summary.num_tokens, 0.0)
    assert whole.chosen.bytes_per_token == pytest.approx(actual, rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("a_third_of_the_corpus")
def test_every_codec_is_measured_as_if_it_had_been_chosen(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    estimate = plan(config_of(teacher, corpus, tmp_path / "store"))
    assert [rung.codec for rung in estimate.rungs] == ["mix", *(name for name in CODECS if name != "mix")]
    sizes = {rung.codec: rung for rung in estimate.rungs}
    for codec in ("raw", "q8", "q4z-min"):
        summary = run(config_of(teacher, corpus, tmp_path / codec, codec=codec))
        assert sizes[codec].bytes_per_token == pytest.approx(summary.stored_bytes / summary.num_tokens, rel=0.03)
        assert sizes[codec].total_bytes == pytest.approx(bytes_of(tmp_path / codec), rel=0.03)


@pytest.mark.slow
def test_workers_of_ray_are_tried_as_they_would_run(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    estimate = plan(config_of(teacher, corpus, tmp_path / "store", workers=2, max_tokens=10_000))
    assert estimate.measured
    assert estimate.hours is not None
    assert estimate.hours.measured_tokens > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_there_already_needs_no_more_time_or_disk(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    config = config_of(teacher, corpus, tmp_path / "store", limit=60)
    run(config)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    estimate = plan(config)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    assert estimate.room.stored_bytes == bytes_of(tmp_path / "store")
    assert estimate.hours is not None
    assert estimate.hours.steady == 0


def test_a_part_of_the_work_takes_its_part_of_the_time(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    estimate = plan(config_of(teacher, corpus, tmp_path / "store", task_range="1/4"))
    assert estimate.num_tokens is not None
    assert estimate.hours is not None
    assert estimate.tokens_per_s is not None
    assert estimate.hours.steady == pytest.approx(estimate.num_tokens / estimate.tokens_per_s / 4, rel=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("a_third_of_the_corpus")
def test_a_limit_that_is_too_small_is_told_with_what_would_fit(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    config = config_of(teacher, corpus, tmp_path / "store", codec="q8")
    estimate = plan(config)
    assert estimate.chosen.total_bytes is not None
    tight = plan(config.model_copy(update={"max_bytes": int(0.8 * estimate.chosen.total_bytes) + estimate.room.slack_bytes}))
    assert tight.fits is False
    kinds = {other.arguments.split()[0]: other for other in tight.alternatives}
    assert kinds.keys() == {"--codec", "--layers", "--max-tokens"}
    for other in tight.alternatives:
        name, value = other.arguments.split()
        changed = {"max_tokens": int(value)} if name == "--max-tokens" else {name[2:]: value}
        assert other.total_bytes <= 0.8 * estimate.chosen.total_bytes
        out = tmp_path / name
        run(config.model_copy(update={**changed, "out": str(out)}))
        assert bytes_of(out) == pytest.approx(other.total_bytes, rel=0.03)


@pytest.mark.slow
@pytest.mark.usefixtures("a_third_of_the_corpus")
def test_with_the_limit_it_names_the_run_finishes_and_with_less_it_may_not(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    config = config_of(teacher, corpus, tmp_path / "store")
    estimate = plan(config)
    assert estimate.chosen.total_bytes is not None
    needed = int(1.03 * estimate.chosen.total_bytes) + estimate.room.slack_bytes
    summary = run(config.model_copy(update={"max_bytes": needed}))
    assert summary.num_tokens == estimate.num_tokens
    assert bytes_of(tmp_path / "store") <= needed
    shutil.rmtree(tmp_path / "store")
    cut = run(config.model_copy(update={"max_bytes": int(0.9 * estimate.chosen.total_bytes)}))
    assert estimate.num_tokens is not None
    assert cut.num_tokens < estimate.num_tokens


def test_a_folder_of_other_files_is_refused(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreFormatError, match=r"is not empty and is not a store"):
        plan(config_of(teacher, corpus, tmp_path))


def test_a_teacher_that_is_nowhere_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nobody/nothing is not in the local hub cache .*'hf download nobody/nothing'"):
        plan(config_of("nobody/nothing", corpus, tmp_path / "store"))


def no_request(*_: object, **__: object) -> None:
    pytest.fail("the hub was asked")


@pytest.mark.parametrize("name", teacher_preset_names())
def test_a_preset_without_weights_gives_sizes_and_downloads_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_request)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = ExtractConfig(teacher=name, data=("org/data",), out=str(tmp_path / "store"), max_tokens=10**9)
    estimate = plan(config)
    assert (estimate.measured, estimate.hours) == (False, None)
    assert estimate.note is not None
    assert "nothing was tried" in estimate.note
    assert estimate.num_tokens == 10**9
    bits = {rung.codec: rung.bits_per_value for rung in estimate.rungs}
    assert bits == pytest.approx({name: codec.nominal_bits for name, codec in CODECS.items()})
    assert list(tmp_path.iterdir()) == []


def test_the_preset_of_the_readme_is_about_thirteen_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = ExtractConfig(teacher="qwen2-7b", data=("d/d",), out=str(tmp_path / "store"), max_tokens=10**6)
    raw = plan(config)
    assert raw.chosen.total_bytes == pytest.approx(13e9, rel=0.05)
    assert raw.geometry["kinds"] == [
        {"layers": "0-27", "num_kv_heads": 4, "key_dim": 128, "value_dim": 128, "rope": "half, 128 of 128 channels"}
    ]
    baked = plan(config.model_copy(update={"student": "qwen2-0.5b"}))
    assert baked.geometry["baked"]
    assert baked.chosen.bytes_per_token < 2000
    assert baked.geometry["layers"] == "6,9,12,15,18,21,24,27"
    few = plan(config.model_copy(update={"max_bytes": 10**9}))
    for other in few.alternatives:
        if other.arguments.startswith("--layers"):
            assert 0 < other.total_bytes <= 10**9
            assert len(parse_layers(other.arguments.split()[1], range(28))) in (1, 2)


def test_with_no_end_of_the_data_only_what_a_token_takes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = ExtractConfig(teacher="qwen2-7b", data=("org/data",), out=str(tmp_path / "store"), max_bytes=10**10)
    estimate = plan(config)
    assert (estimate.num_tokens, estimate.chosen.total_bytes, estimate.files, estimate.fits) == (None, None, None, None)
    assert estimate.chosen.bytes_per_token > 10_000
    assert estimate.tokens_that_fit == pytest.approx(10**10 / estimate.chosen.bytes_per_token, rel=0.2)


# How much data there is.

Write = Callable[[Path, list[str]], Path]


def as_gz(path: Path, rows: list[str]) -> Path:
    whole = write_rows(path / "rows", rows).read_bytes()
    (path / "rows.jsonl.gz").write_bytes(gzip.compress(whole))
    return path / "rows.jsonl.gz"


def as_parquet(path: Path, rows: list[str]) -> Path:
    pq.write_table(pa.table({"text": rows, "more": ["x"] * len(rows)}), path / "rows.parquet", row_group_size=50)
    return path / "rows.parquet"


def as_files(path: Path, rows: list[str]) -> Path:
    for number, text in enumerate(rows):
        (path / f"{number:04d}.txt").write_text(text)
    return path / "*.txt"


KINDS_OF_FILES = [
    pytest.param(lambda path, rows: write_rows(path / "rows.jsonl", rows), id="jsonl"),
    pytest.param(as_gz, id="gz"),
    pytest.param(as_parquet, id="parquet"),
    pytest.param(as_files, id="text"),
]


@pytest.mark.parametrize("write", KINDS_OF_FILES)
def test_data_too_large_to_read_is_told_by_its_bytes(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.data_size._HEAD_BYTES", 120_000)
    rows = [text for text in dict.fromkeys(texts(900_000)) if text.strip()]
    data = write(tmp_path, rows)
    expected = sum(len(text.encode()) for text in rows)  # one token for each byte
    size = measure_data(config_of("t", data, "o", window_tokens=75_000), byte_tokenizer(), 200)
    assert size.known_tokens <= 90_000
    assert not size.is_exact
    assert size.num_tokens == pytest.approx(expected, rel=0.05)
    assert size.relative_error is not None
    assert size.relative_error < 0.05
    assert text_bytes([str(data)], "text", "train") == pytest.approx(expected, rel=0.05)
    whole = measure_data(config_of("t", data, "o"), byte_tokenizer(), 200)
    assert (whole.is_exact, whole.how, whole.relative_error) == (True, "all of the data", None)
    assert whole.num_tokens == pytest.approx(expected, rel=0.005)  # pieces of one token are left out
    assert [sample.id for sample in whole.window.samples] == sorted(sample.id for sample in whole.window.samples)


@pytest.mark.parametrize(
    ("limits", "how", "is_exact"),
    [
        pytest.param({"max_tokens": 5000}, "--max-tokens", True, id="tokens"),
        pytest.param({"limit": 10}, "--limit", True, id="samples"),
        pytest.param({"max_tokens": 20_000}, "--max-tokens", False, id="tokens-beyond-what-is-read"),
        pytest.param({"limit": 100}, "--limit", False, id="samples-beyond-what-is-read"),
        pytest.param({"max_tokens": 10**9}, "40 MB", False, id="more-than-there-is"),
        pytest.param({"sample_tokens": 5000}, "--sample-tokens", False, id="a-random-share"),
        pytest.param({"sample_tokens": 20_000}, "--sample-tokens", False, id="a-share-beyond-what-is-read"),
    ],
)
def test_limits_say_how_much_is_stored(limits: dict[str, int], how: str, is_exact: bool, corpus: Path) -> None:
    config = config_of("t", corpus, "o", **limits)
    size = measure_data(config.model_copy(update={"window_tokens": 8000}), byte_tokenizer(), 200)
    whole = measure_data(config, byte_tokenizer(), 200)
    assert size.is_exact == is_exact
    assert size.num_tokens == pytest.approx(whole.num_tokens, rel=0.05)
    if how.startswith("--"):
        assert size.how == how


def test_a_random_share_of_the_data_is_laid_out_for_its_own_size(corpus: Path) -> None:
    size = measure_data(config_of("t", corpus, "o", sample_tokens=5000), byte_tokenizer(), 200)
    assert size.num_tokens == 5000
    assert 5000 <= size.known_tokens < 5200
    whole = measure_data(config_of("t", corpus, "o", sample_tokens=10**6), byte_tokenizer(), 200)
    assert (whole.is_exact, whole.how) == (True, "all of the data")


def test_a_pipe_is_left_to_the_extraction(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^--data: .*/pipe is a pipe, and what 'kvpipe plan' reads of it"):
        measure_data(config_of("t", tmp_path / "pipe", "o"), byte_tokenizer(), 200)


def test_reading_ends_after_some_time(corpus: Path) -> None:
    size = measure_data(config_of("t", corpus, "o"), byte_tokenizer(), 200, most_s=0.0)
    assert 0 < size.known_tokens < 35_000
    assert not size.is_exact


@pytest.mark.slow
@pytest.mark.usefixtures("a_third_of_the_corpus")
def test_data_of_unknown_size_has_the_size_asked_for_or_none(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [text for text in dict.fromkeys(texts(30_000)) if text.strip()]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "data")
    config = config_of(teacher, tmp_path / "data", tmp_path / "store", window_tokens=8000)
    endless = plan(config)
    assert (endless.num_tokens, endless.hours, endless.chosen.total_bytes, endless.files) == (None, None, None, None)
    assert endless.how == "the data does not say how large it is"
    assert endless.bytes_relative_error is not None
    assert endless.bytes_relative_error > 0, "all of the window was tried, and there may be more"
    assert endless.tokens_per_s is not None
    assert endless.tokens_per_s > 0
    show_estimate(endless)
    shown = capsys.readouterr().out
    assert "size not known: the data does not say how large it is" in shown
    assert "for every million of tokens" in " ".join(shown.split())
    limited = plan(config.model_copy(update={"max_tokens": 20_000}))
    assert (limited.num_tokens, limited.is_exact) == (20_000, False)
    assert limited.how == "--max-tokens, if the data has as much"
    assert limited.chosen.bytes_per_token == pytest.approx(endless.chosen.bytes_per_token, rel=0.05)
    assert limited.hours is not None
    assert limited.chosen.total_bytes is not None
    assert limited.chosen.total_bytes > 20_000 * limited.chosen.bytes_per_token


# Pure arithmetic.


def test_a_layout_from_a_part_is_that_of_the_whole() -> None:
    lengths, row = [300, 64, 5, 129, 2, 70] * 50, RowBytes(token=64, layer=32)
    assert scaled_layout(lengths, 1.0, row) == plan_layout(lengths, row)
    whole = plan_layout(lengths * 40, row)
    part = scaled_layout(lengths, 40.0, row)
    assert (part.chunk_tokens, part.shard_tokens) == (whole.chunk_tokens, whole.shard_tokens)
    assert part.num_shards == pytest.approx(whole.num_shards, abs=2)
    assert whole.num_shards == sum(1 for _ in fill_shards(lengths * 40, whole))


def rung(codec: str, bits: float, total: int) -> Rung:
    return Rung(codec=codec, bits_per_value=bits, bytes_per_token=1.0, shards=1, total_bytes=total)


def test_alternatives_are_the_finest_that_fit() -> None:
    records = Records(per_token=0.0, per_shard=0, spare_per_token=0.0, own=0, own_files=0)
    rungs = [
        rung("q8", 6.5, 1000_000),
        rung("raw", 12.0, 2000_000),
        rung("fp8", 6.4, 900_000),
        rung("mix", 3.6, 600_000),
        rung("q4z", 2.8, 500_000),
    ]
    found = alternatives(rungs, dict.fromkeys(range(4), 0.25), records, 10_000, 620_000, 4096)
    assert [other.arguments for other in found] == ["--codec mix", "--layers 1,3", "--max-tokens 6190"]
    assert [other.total_bytes for other in found] == pytest.approx([600_000, 500_000, 619_000], rel=0.01)
    uneven = alternatives(rungs, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, records, 10_000, 620_000, 4096)[1]
    assert uneven.arguments == "--layers 1,3"
    assert uneven.total_bytes == pytest.approx(600_000, rel=0.01)
    assert alternatives(rungs, {0: 1.0}, records, 10_000, 0, 4096) == ()
    assert alternatives(rungs, {0: 1.0}, records, 10_000, 550_000, 4096)[0].arguments == "--codec q4z"


def test_tokens_that_fit_are_told_for_data_of_any_size() -> None:
    # With a gate's record 10,000 bytes whatever the data.
    records = Records(per_token=2.0, per_shard=1000, spare_per_token=0.0, own=8800, own_files=0)
    known = rung("q8", 6.5, 110_000)
    assert tokens_that_fit(known, records, 60_000, 1000, 100) == 500
    endless = dataclasses.replace(known, total_bytes=None, shards=None, bytes_per_token=18.0)
    assert tokens_that_fit(endless, records, 40_000, None, 100) == 1000  # 30 bytes for each: 18, 2 and a 100th of 1,000
    assert tokens_that_fit(endless, records, 5000, None, 100) == 0


def test_room_is_the_least_of_disk_and_limit() -> None:
    def fits(total: int | None, **over: int | None) -> bool | None:
        room = Room(**{"free_bytes": None, "stored_bytes": 0, "max_bytes": None, "slack_bytes": 10, **over})
        return room.fits(dataclasses.replace(rung("mix", 3.6, 0), total_bytes=total))

    assert fits(10**15) is True
    assert fits(100, free_bytes=100) is True
    assert fits(101, free_bytes=100) is False
    assert fits(101, free_bytes=100, stored_bytes=1) is True
    assert fits(101, free_bytes=10**9, max_bytes=110) is False
    assert fits(100, free_bytes=10**9, max_bytes=110) is True
    assert fits(None, free_bytes=0) is None


# The command.


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)], env={"COLUMNS": "120"})


def test_the_command_prints_one_screen_and_fails_where_it_does_not_fit(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ("--teacher", teacher, "--data", corpus, "--out", tmp_path / "store", "--seq-len", "200", "--trial-s", "0.2")
    shown = invoke(*arguments)
    assert shown.exit_code == 0, shown.output
    assert len(shown.stdout.splitlines()) <= 30
    for text in ("3 of 3 layers", "2 kv heads", "rope: half", "mix <", "q4z-min", "tokens/s", "start-up", "free", "shards"):
        assert text in shown.stdout
    found = invoke(*arguments, "--max-bytes", "400000", "--json", "--student-tokens-per-s", "5000")
    assert found.exit_code == 1
    record = json.loads(found.stdout)
    assert record["fits"] is False
    assert record["alternatives"]
    assert record["read_bytes_per_s"] == pytest.approx(5000 * record["rungs"][0]["bytes_per_token"])
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shown = invoke("--teacher", "qwen2-7b", "--max-bytes", "9000000000")
    assert shown.exit_code == 1
    assert "DOES NOT FIT" in shown.stdout
    for text in ("--codec q4z", "--layers ", "--max-tokens 6", "Qwen/Qwen2-7B is not in the local hub cache", "hf download"):
        assert text in " ".join(shown.stdout.split())


def test_extract_and_plan_take_the_same_arguments() -> None:
    options = {name: {option.name for option in cli.commands[name].params} for name in ("extract", "plan")}
    assert options["plan"] - options["extract"] == {"trial_s", "student_tokens_per_s"}
    assert options["extract"] - options["plan"] == {"list_presets"}
