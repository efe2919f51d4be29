"""Whole runs with the real Trainer on a real store: what they compute, that they repeat, and what they refuse."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvstore.batches import KVBatch
from kvstore.errors import CorruptShardError, FingerprintMismatchError
from kvstore.reader import Store, open_store
from kvstore.samples import SampleTable as SampleColumns
from pipeline.align import Alignment
from pipeline.models.capture import capture_kv
from pipeline.models.load import build_student
from pipeline.models.probe import probe_kv_spec
from tests.checkpoints import byte_tokenizer, save_checkpoint
from tests.stores import Source, begin_store, write_shard, write_store
from tests.training.conftest import make_texts, teacher_source
from tests.training.test_targets import bake
from training.config import TrainConfig
from training.held_out import split_held_out
from training.mixture import Mixture, sample_table
from training.report import METRICS, read_metrics
from training.run_folder import TrainSummary
from training.sampler import BatchPlan, KVBatchSampler
from training.targets import KVTargets, measure_variances
from training.trainer import run_training

STEPS, KV_STEPS, STEPS_PER_EPOCH = 8, 4, 5
CLOCKS = {"seconds", "loader_wait_s", "peak_rss_bytes"}


def settings(store: Path | str, student: str, out: Path, **over: Any) -> TrainConfig:
    """Eight steps, the KV loss in four of them; five steps to an epoch, so the run crosses into a second one."""
    fields = {"steps": STEPS, "batch_size": 8, "learning_rate": 6e-3, "log_every": 1, "eval_every": 4, "save_every": 100}
    return TrainConfig(**{"store": store, "student": student, "out": out, "device": "cpu", "threads": 1, **fields, **over})


def metrics(out: Path) -> list[dict[str, Any]]:
    """What a run logged, without what depends on the clock."""
    return [{name: value for name, value in record.items() if name not in CLOCKS} for record in read_metrics(out / METRICS)]


def logged(out: Path, name: str) -> list[float]:
    return [record[name] for record in metrics(out) if name in record]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, store_path: Path, student_with_dropout: str) -> TrainSummary:
    """One run from start to end, its student with dropout."""
    return run_training(settings(store_path, student_with_dropout, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, store_path: Path, student: str) -> TrainSummary:
    """The same without dropout, which other ways of computing the same step must agree with."""
    return run_training(settings(store_path, student, tmp_path_factory.mktemp("plain") / "run"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, store_path: Path, student: str) -> TrainSummary:
    """The same with a learned adapter."""
    return run_training(settings(store_path, student, tmp_path_factory.mktemp("adapted") / "run", adapter="orthogonal"))


def train_samples(store: Store) -> tuple[np.ndarray, np.ndarray]:
    samples = store.samples
    return split_held_out(samples.ids, samples.source, samples.num_tokens, fraction=0.05, max_tokens=1_000_000)


def nats(model: Any, ids: np.ndarray) -> float:
    """Sum of -log p over the tokens of one sequence but the first, one by one."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=tokens[None]).logits[0].double(), dim=-1)
    return -sum(float(scores[position, token]) for position, token in enumerate(tokens[1:].tolist()))


# ---- what a run computes


def test_the_saved_student_has_the_held_out_loss_of_the_summary_under_plain_transformers(
    whole: TrainSummary, store_path: Path, source: Source
) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole.out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole.out / "model")
    _, held_out = train_samples(open_store(store_path))
    total = sum(nats(model, source.input_ids[index]) for index in held_out)
    predicted = sum(len(source.input_ids[index]) - 1 for index in held_out)
    text_bytes = sum(
        len(tokenizer.decode(source.input_ids[index]).encode()) - len(tokenizer.decode(source.input_ids[index][:1]).encode())
        for index in held_out
    )
    assert whole.eval_loss == pytest.approx(total / predicted, rel=1e-5)
    assert whole.eval_nats_per_byte == pytest.approx(total / text_bytes, rel=1e-5)
    assert "auto_map" not in json.loads((whole.out / "model" / "config.json").read_text())
    assert model.config.use_cache, "the Trainer switches the cache off; the saved student must generate with one"


def test_only_tokens_of_the_loss_mask_are_learnt_from(
    student: str, source: Source, tokenizer_folder: Path, tmp_path: Path
) -> None:
    masks = {index: (np.arange(len(ids)) % 7 > 2).astype(np.uint8) for index, ids in enumerate(source.input_ids)}
    path = write_store(
        tmp_path / "kv", source, "raw", signal={"response_only": True}, tokenizer=tokenizer_folder, loss_masks=masks
    )
    summary = run_training(settings(path, student, tmp_path / "run", steps=2))
    model = AutoModelForCausalLM.from_pretrained(summary.out / "model").eval()
    _, held_out = train_samples(open_store(path))
    total, predicted, size = 0.0, 0, 0
    for index in held_out:
        ids = torch.from_numpy(source.input_ids[index].astype(np.int64))
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), dim=-1)
        learnt = [token for token in range(1, len(ids)) if masks[index][token]]
        total -= sum(float(scores[token - 1, ids[token]]) for token in learnt)
        predicted += len(learnt)
        size += len(byte_tokenizer().decode(ids[learnt]).encode())
    assert summary.eval_loss == pytest.approx(total / predicted, rel=1e-5)
    assert summary.eval_nats_per_byte == pytest.approx(total / size, rel=0.05), "a character may be cut by the mask"
    nothing = {index: np.zeros_like(mask) for index, mask in masks.items()}
    path = write_store(tmp_path / "nothing", source, "raw", tokenizer=tokenizer_folder, loss_masks=nothing)
    with pytest.raises(
        ValueError, match=r"samples to train on without a token to learn from: of one token, or with loss_mask 0"
    ):
        run_training(settings(path, student, tmp_path / "nothing-run", ce_only=True))


def test_the_first_step_has_the_written_out_losses(plain: TrainSummary, store_path: Path, student: str, source: Source) -> None:
    store = open_store(store_path)
    train, _ = train_samples(store)
    table = sample_table(store, sink_tokens=4).select(train)
    plan = BatchPlan(batch_size=8, seed=0, window_tokens=2**40, kv_steps=KV_STEPS)
    first = next(iter(KVBatchSampler(table, plan)))
    model, _ = build_student(student, vocab_size=len(byte_tokenizer()), seed=0)
    spec = probe_kv_spec(model)
    alignment = Alignment.plan(store.spec, spec)
    variances = measure_variances(store, KVTargets(alignment), sink_tokens=4)
    squares = np.zeros((2, 2))
    compared = 0
    for index in first:
        ids = torch.from_numpy(source.input_ids[index].astype(np.int64))
        ours = capture_kv(model, spec, ids[None])
        compared += len(ids) - 4
        for student_layer, teacher_layer in alignment.layer_map:
            target = alignment.project(teacher_layer, *map(torch.from_numpy, source.kv[index][teacher_layer]))
            for kind in (0, 1):
                difference = (ours[student_layer][kind][0].transpose(0, 1) - target[kind])[4:]
                squares[student_layer, kind] += float(difference.square().mean(dim=(1, 2)).sum())
    errors = squares / compared / variances
    record = metrics(plain.out)[0]
    names = [["kv_key_0", "kv_value_0"], ["kv_key_1", "kv_value_1"]]
    np.testing.assert_allclose([[record[name] for name in row] for row in names], errors, rtol=1e-4)
    assert record["kv_loss"] == pytest.approx(errors.mean(), rel=1e-4)
    expected = sum(nats(model.eval(), source.input_ids[index]) for index in first)
    assert record["ce"] == pytest.approx(expected / first.num_predicted, rel=1e-5)
    assert record["loss"] == pytest.approx(record["ce"] + record["kv_loss"], rel=1e-5)


def test_a_run_leaves_its_metrics_summary_and_plot(plain: TrainSummary, store_path: Path) -> None:
    assert TrainSummary.model_validate_json((plain.out / "summary.json").read_bytes()) == plain
    assert (plain.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(plain.out / METRICS)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "eval_loss" in record] == [4, 8]
    assert all(record.keys() >= CLOCKS for record in records)
    assert [("kv_loss" in record) for record in records if "loss" in record] == [True] * KV_STEPS + [False] * KV_STEPS
    assert all(record["loss"] == pytest.approx(record["ce"]) for record in records[KV_STEPS + 2 :] if "loss" in record)
    assert plain.store_fingerprint == open_store(store_path).manifest.fingerprint
    assert plain.tokens == records[-1]["tokens"] > 1000
    assert (plain.num_train_samples, plain.num_held_out_samples, plain.num_dropped_samples) == (42, 2, 2)
    assert logged(plain.out, "ce")[-1] < logged(plain.out, "ce")[0] - 0.5, "it learns"


def test_nothing_is_printed_to_stdout(
    store_path: Path, student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(settings(store_path, student, tmp_path / "run", steps=1))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "1/1" in printed.err


# ---- that it repeats


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_a_run_repeats_bit_by_bit(whole: TrainSummary, store_path: Path, student_with_dropout: str, tmp_path: Path) -> None:
    again = run_training(settings(store_path, student_with_dropout, tmp_path / "run"))
    assert metrics(again.out) == metrics(whole.out)
    assert weights(again.out) == weights(whole.out)


@pytest.mark.parametrize(
    ("save_every", "broken_read", "checkpoint"),
    [
        pytest.param(3, 2, 0, id="before the first checkpoint"),
        pytest.param(3, 8, 6, id="inside the second epoch"),
        pytest.param(5, 8, 5, id="at the boundary of an epoch"),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened_and_reads_nothing_again(
    whole: TrainSummary,
    store_path: Path,
    student_with_dropout: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_every: int,
    broken_read: int,
    checkpoint: int,
) -> None:
    config = settings(store_path, student_with_dropout, tmp_path / "run", save_every=save_every)
    training = ReadsOfTraining(monkeypatch, fail_at=broken_read)
    with pytest.raises(CorruptShardError, match="injected"):
        run_training(config)
    assert not (config.out / "summary.json").exists()
    training.fail_at = None
    training.count = 0
    resumed = run_training(config.model_copy(update={"resume": True}))
    assert metrics(config.out) == metrics(whole.out)
    assert weights(config.out) == weights(whole.out)
    assert resumed.tokens == whole.tokens
    assert training.count == STEPS - checkpoint


def test_a_run_with_a_learned_adapter_goes_on_bit_by_bit_and_leaves_only_the_student(
    plain: TrainSummary, store_path: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **over: Any) -> TrainSummary:
        return run_training(settings(store_path, student, tmp_path / name, adapter="orthogonal", **over))

    straight = run("straight")
    training = ReadsOfTraining(monkeypatch, fail_at=5)
    with pytest.raises(CorruptShardError, match="injected"):
        run("broken", save_every=3)
    training.fail_at = None
    resumed = run("broken", save_every=3, resume=True)
    assert metrics(resumed.out) == metrics(straight.out)
    assert weights(resumed.out) == weights(straight.out)
    assert set(load_file(straight.out / "model" / "model.safetensors")) == set(
        load_file(plain.out / "model" / "model.safetensors")
    )
    checkpoint = load_file(resumed.out / "checkpoint-6" / "model.safetensors")
    turns = {name: tensor for name, tensor in checkpoint.items() if name.startswith("kv_adapters")}
    assert any(tensor.any() for name, tensor in turns.items() if name.endswith("original")), "the adapters learnt"
    assert logged(straight.out, "ce")[0] == logged(plain.out, "ce")[0]
    assert logged(straight.out, "ce")[2:] != logged(plain.out, "ce")[2:]


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine", "relation"])
def test_other_distances_start_from_the_same_student_and_teach_it_otherwise(
    plain: TrainSummary, store_path: Path, student: str, tmp_path: Path, loss: str
) -> None:
    other = run_training(settings(store_path, student, tmp_path / "run", kv_loss=loss, steps=4, kv_until=1.0))
    again = run_training(
        settings(store_path, student, tmp_path / "again", kv_loss=loss, steps=4, kv_until=1.0, micro_batch_size=2)
    )
    assert logged(other.out, "ce")[0] == logged(plain.out, "ce")[0]
    assert logged(other.out, "kv_loss")[0] != pytest.approx(logged(plain.out, "kv_loss")[0], rel=1e-3)
    assert logged(again.out, "kv_loss") == pytest.approx(logged(other.out, "kv_loss"), rel=1e-4)


def test_a_falling_weight_begins_as_a_constant_one_and_draws_less(
    plain: TrainSummary, store_path: Path, student: str, tmp_path: Path
) -> None:
    over: dict[str, Any] = {"steps": 4, "kv_until": 1.0, "kv_weight": 1.0, "log_every": 1, "warmup": 0.0}
    runs = {
        name: run_training(settings(store_path, student, tmp_path / name, **{**over, **more})).out
        for name, more in {"constant": {}, "falling": {"kv_schedule": "linear"}, "half": {"kv_weight": 0.75}}.items()
    }
    grads = {
        name: [record["grad_norm"] for record in read_metrics(out / METRICS) if "grad_norm" in record]
        for name, out in runs.items()
    }
    assert grads["falling"][0] == grads["constant"][0], "the first step has the whole weight"
    assert grads["falling"][1] != grads["constant"][1]
    assert grads["half"][0] != grads["constant"][0], "the weight is seen in the gradient"
    assert logged(runs["falling"], "kv_loss")[-1] > logged(runs["constant"], "kv_loss")[-1], "less weight, less drawn near"


class ReadsOfTraining:
    """Counts the reads of whole training batches (eight samples), and breaks one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.count, self.fail_at = 0, fail_at
        self.layers: list[tuple[int, ...] | None] = []
        genuine = Store.read

        def read(store: Store, sample_indices: Sequence[int], layers: Sequence[int] | None = None) -> KVBatch:
            if len(sample_indices) == 8:
                self.count += 1
                self.layers.append(None if layers is None else tuple(layers))
                if self.count == self.fail_at:
                    raise CorruptShardError("shard 1: injected")
            return genuine(store, sample_indices, layers)

        monkeypatch.setattr(Store, "read", read)


def test_a_finished_run_is_not_run_again(plain: TrainSummary, monkeypatch: pytest.MonkeyPatch) -> None:
    training = ReadsOfTraining(monkeypatch)
    assert run_training(plain.config.model_copy(update={"resume": True})) == plain
    assert training.count == 0
    with pytest.raises(ValueError, match=r"config\.seed: got 1, expected 0"):
        run_training(plain.config.model_copy(update={"resume": True, "seed": 1}))


# ---- ways of computing that must not change the numbers


@pytest.mark.parametrize(
    "over",
    [
        pytest.param({"micro_batch_size": 2}, id="accumulation"),
        pytest.param({"micro_batch_size": 2, "save_every": 3, "activation_checkpointing": True}, id="recomputed activations"),
    ],
)
def test_how_a_step_is_cut_does_not_change_the_losses(
    plain: TrainSummary, store_path: Path, student: str, tmp_path: Path, over: dict[str, Any]
) -> None:
    other = run_training(settings(store_path, student, tmp_path / "run", **over))
    for name in ("loss", "ce", "kv_loss", "kv_value_1", "grad_norm", "eval_loss", "tokens"):
        assert logged(other.out, name) == pytest.approx(logged(plain.out, name), rel=2e-4), name


def test_a_baked_store_trains_as_the_raw_one_does(
    plain: TrainSummary, student: str, source: Source, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, _ = build_student(student, vocab_size=len(byte_tokenizer()), seed=0)
    documents = [f"document-{index // 2}" for index in range(len(source.input_ids))]
    baked = bake(
        tmp_path / "kv",
        source,
        Alignment.plan(source.spec, probe_kv_spec(model)),
        documents=documents,
        tokenizer=tokenizer_folder,
    )
    other = run_training(settings(baked.location, student, tmp_path / "run"))
    for name in ("loss", "kv_loss", "eval_loss"):
        assert logged(other.out, name) == pytest.approx(logged(plain.out, name), rel=1e-4), name


# ---- samples the data had several times

COUNTS = [1, 3, 1, 2, 1, 1, 4, 1, 3, 1]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, student: str) -> TrainSummary:
    """A run on ten samples, all in each step, and a short document held out, of samples stored once with a count."""
    folder = tmp_path_factory.mktemp("counted")
    store = counted_store(folder / "kv", tokenizer_folder, list(range(len(COUNTS) + 2)), [*COUNTS, 3, 1])
    return run_training(settings(store, student, folder / "run", steps=4, batch_size=10, eval_every=2, eval_fraction=1e-9))


def counted_store(root: Path, tokenizer: Path, indices: Sequence[int], counts: Sequence[int]) -> Path:
    """These samples in this order, the last two kinds of one document: the smallest, so the one held out."""
    whole = teacher_source([*make_texts(len(COUNTS), seed=5), "keys", "a token"])
    chosen = Source(
        spec=whole.spec, input_ids=[whole.input_ids[index] for index in indices], kv=[whole.kv[index] for index in indices]
    )
    documents = [f"document-{min(index, len(COUNTS))}" for index in indices]
    return write_store(root, chosen, codec="raw", documents=documents, tokenizer=tokenizer, counts=counts)


def test_a_count_trains_as_so_many_copies_in_the_same_batch_do(
    counted: TrainSummary, student: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A store with copies is refused when it is opened; here it is the reference.
    monkeypatch.setattr(SampleColumns, "ids", property(lambda samples: samples._columns(["id"])["id"].to_pylist()))
    copies = [index for index, count in enumerate([*COUNTS, 3, 1]) for _ in range(count)]
    store = counted_store(tmp_path / "kv", tokenizer_folder, copies, [1] * len(copies))
    changed = {"store": str(store), "out": tmp_path / "run", "batch_size": sum(COUNTS)}
    other = run_training(counted.config.model_copy(update=changed))
    assert (other.num_train_samples, counted.num_train_samples) == (sum(COUNTS), len(COUNTS))
    for name in ("loss", "ce", "kv_loss", "kv_key_0", "kv_value_1", "grad_norm", "eval_loss", "eval_nats_per_byte"):
        assert logged(counted.out, name) == pytest.approx(logged(other.out, name), rel=2e-4), name
        assert logged(counted.out, name)[0] == pytest.approx(logged(other.out, name)[0], rel=2e-5), name
    lengths = open_store(counted.config.store).samples.num_tokens[: len(COUNTS)].astype(int)
    assert counted.tokens == 4 * (lengths - 1).sum(), "tokens are those computed"
    assert other.tokens == 4 * (COUNTS * (lengths - 1)).sum()


def test_how_a_step_is_cut_does_not_change_weighted_losses(counted: TrainSummary, tmp_path: Path) -> None:
    other = run_training(counted.config.model_copy(update={"out": tmp_path / "run", "micro_batch_size": 2}))
    for name in ("loss", "ce", "kv_loss", "grad_norm", "eval_loss", "eval_nats_per_byte", "tokens"):
        assert logged(other.out, name) == pytest.approx(logged(counted.out, name), rel=2e-4), name


# ---- controls


def test_cross_entropy_alone_reads_no_kv_and_is_otherwise_the_same_run(
    plain: TrainSummary, store_path: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = ReadsOfTraining(monkeypatch)
    control = run_training(settings(store_path, student, tmp_path / "run", ce_only=True))
    assert set(reads.layers) == {()}
    assert logged(control.out, "kv_loss") == []
    assert logged(control.out, "ce")[0] == logged(plain.out, "ce")[0], "the same weights on the same first batch"
    assert logged(control.out, "tokens") == logged(plain.out, "tokens")
    assert logged(control.out, "ce")[1] != logged(plain.out, "ce")[1]


def test_kv_is_read_only_while_it_counts(
    store_path: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = ReadsOfTraining(monkeypatch)
    run_training(settings(store_path, student, tmp_path / "run", layers="-1"))
    assert reads.layers == [(3,)] * KV_STEPS + [()] * (STEPS - KV_STEPS)


def test_shuffled_targets_change_the_kv_loss_and_nothing_else_of_the_first_step(
    plain: TrainSummary, store_path: Path, student: str, tmp_path: Path
) -> None:
    control = run_training(settings(store_path, student, tmp_path / "run", shuffle_targets=True))
    assert logged(control.out, "ce")[0] == logged(plain.out, "ce")[0]
    ours, theirs = logged(control.out, "kv_loss"), logged(plain.out, "kv_loss")
    assert all(one != other for one, other in zip(ours, theirs, strict=True))


# ---- what is refused


def test_a_folder_with_a_run_is_refused(plain: TrainSummary) -> None:
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --resume"):
        run_training(plain.config)


def test_resuming_with_another_store_or_map_names_the_fields(
    plain: TrainSummary, student: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain.out, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    config = plain.config.model_copy(update={"out": tmp_path / "run", "resume": True})
    other = write_store(tmp_path / "kv", teacher_source(make_texts(44, seed=1)), codec="raw", tokenizer=tokenizer_folder)
    with pytest.raises(ValueError, match=r"store: got .*, expected .*" + plain.store_fingerprint[:8]):
        run_training(config.model_copy(update={"store": str(other)}))
    with pytest.raises(ValueError, match=r"(?s)config\.layer_map: got .uniform.*alignment\.layer_map"):
        run_training(config.model_copy(update={"layer_map": "uniform"}))
    assert read_metrics(tmp_path / "run" / METRICS) == read_metrics(plain.out / METRICS), "nothing was touched"


def test_neither_the_store_nor_a_folder_with_a_model_is_taken_for_a_run(store_path: Path, student: str, tmp_path: Path) -> None:
    kept = tmp_path / "precious" / "model" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"weeks of work")
    with pytest.raises(ValueError, match=r"precious holds model/ but no run\.json"):
        run_training(settings(store_path, student, tmp_path / "precious"))
    assert kept.read_bytes() == b"weeks of work"
    with pytest.raises(ValueError, match=r"holds .*manifest\.json.* but no run\.json"):
        run_training(settings(store_path, student, store_path))


def growing_store(root: Path, source: Source, tokenizer: Path) -> Callable[[int], None]:
    """A store none of whose shards is committed; the function returned commits one."""
    manifest, calibration, tasks = begin_store(root, source, codec="raw", tokenizer=tokenizer)
    assert len(tasks) > 4
    return lambda shard: write_shard(root, source, manifest, calibration, shard, tasks[shard])


def test_an_empty_store_is_refused_as_such(source: Source, student: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    growing_store(tmp_path / "kv", source, tokenizer_folder)
    with pytest.raises(ValueError, match=r"has no samples yet, 0 of \d+ shards are committed; run its 'kvpipe extract'"):
        run_training(settings(tmp_path / "kv", student, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_store_that_grew_cannot_continue_a_run_and_the_shards_are_named(
    source: Source, student: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = growing_store(tmp_path / "kv", source, tokenizer_folder)
    for shard in range(4):
        commit(shard)
    config = settings(tmp_path / "kv", student, tmp_path / "run", steps=2, batch_size=2, save_every=1)
    summary = run_training(config)
    planned = open_store(tmp_path / "kv").manifest.layout.num_shards
    assert f"store: 4 of {planned} shards of {tmp_path / 'kv'} are committed" in capsys.readouterr().err
    resumed = config.model_copy(update={"resume": True})
    assert run_training(resumed) == summary
    commit(4)
    expected = r'(?s)samples\.num_samples: got \d+, expected \d+.*samples\.shards: got "0-4", expected "0-3"'
    with pytest.raises(ValueError, match=expected):
        run_training(resumed)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match=expected):
        run_training(resumed)


def test_a_store_without_a_tokenizer_is_refused(source: Source, student: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer/ folder"):
        run_training(settings(write_store(tmp_path / "kv", source, codec="raw"), student, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_pretrained_student_keeps_its_weights_and_needs_the_stores_tokenizer(store_path: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "pretrained", "qwen2", seed=3)
    summary = run_training(settings(store_path, str(folder), tmp_path / "run", steps=1, learning_rate=1e-9))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, summary.out / "model"))
    torch.testing.assert_close(before.state_dict(), after.state_dict(), rtol=0, atol=1e-7)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"another tokenizer \(259 tokens\) than the store \(258 tokens"):
        run_training(settings(store_path, str(folder), tmp_path / "other"))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        pytest.param({"batch_size": 64}, "there are 42 training samples", id="batch larger than the data"),
        pytest.param({"layers": "5"}, "the model has layers 0-1", id="no such layer"),
        pytest.param({"layer_map": "nearest"}, "expected one of", id="no such map"),
        pytest.param({"learning_rate": 1e30}, r"loss: got (nan|inf).*lower learning_rate", id="divergence"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    store_path: Path, student: str, tmp_path: Path, over: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(settings(store_path, student, tmp_path / "run", **over))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(store_path: Path, student: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: got cuda, but torch sees no GPU"):
        run_training(settings(store_path, student, tmp_path / "run", device="cuda"))


def test_samples_longer_than_the_students_positions_are_refused(store_path: Path, student: str, tmp_path: Path) -> None:
    short = tmp_path / "short.toml"
    short.write_text(Path(student).read_text().replace("max_position_embeddings = 128", "max_position_embeddings = 32"))
    with pytest.raises(ValueError, match="max_position_embeddings 32, but the store has samples of"):
        run_training(settings(store_path, str(short), tmp_path / "run"))


def test_lora_trains_little_of_a_pretrained_student_and_is_merged_into_it(store_path: Path, tmp_path: Path) -> None:
    pretrained = save_checkpoint(tmp_path / "pretrained", "qwen2", num_hidden_layers=2)
    run = run_training(settings(store_path, str(pretrained), tmp_path / "run", lora_rank=4, save_every=5))
    before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, run.out / "model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}, "all linear layers, and nothing else"
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name].float(), rtol=1e-3) <= 4
    store = open_store(store_path)
    model = AutoModelForCausalLM.from_pretrained(run.out / "model").eval()
    _, held_out = train_samples(store)
    read = [store.read([index], layers=()).input_ids for index in held_out]
    expected = sum(nats(model, ids) for ids in read) / sum(len(ids) - 1 for ids in read)
    assert run.eval_loss == pytest.approx(expected, rel=1e-5)


def test_lora_on_fresh_weights_is_refused(store_path: Path, student: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_rank: got 4, but the student .* has fresh weights, expected a pretrained one"):
        run_training(settings(store_path, student, tmp_path / "run", lora_rank=4))


# ---- other processes


@pytest.mark.slow
def test_reading_in_worker_processes_changes_nothing(
    plain: TrainSummary, store_path: Path, student: str, tmp_path: Path
) -> None:
    other = run_training(settings(store_path, student, tmp_path / "run", workers=2))
    assert metrics(other.out) == metrics(plain.out)


# ---- mixtures and tails


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Other texts of the same teacher, in another codec."""
    source = teacher_source(make_texts(10, seed=9))
    return write_store(tmp_path_factory.mktemp("other") / "kv", source, codec="q8", tokenizer=tokenizer_folder)


def test_a_mixture_reads_as_its_stores_do_in_any_order(store_path: Path, other_store: Path) -> None:
    mixture, first, second = Mixture([str(store_path), str(other_store)]), open_store(store_path), open_store(other_store)
    wanted = [50, 3, 44, 3, 53, 0]
    read = mixture.read(wanted, layers=[1, 3])
    for place, index in enumerate(wanted):
        own = (first, index) if index < 44 else (second, index - 44)
        expected = own[0].read([own[1]], layers=[1, 3])
        span = slice(read.cu_seqlens[place], read.cu_seqlens[place + 1])
        np.testing.assert_array_equal(read.input_ids[span], expected.input_ids)
        np.testing.assert_array_equal(read.key[:, span], expected.key)
        np.testing.assert_array_equal(read.value[:, span], expected.value)
    again = pickle.loads(pickle.dumps(mixture)).read(wanted, layers=[1, 3])
    np.testing.assert_array_equal(again.key, read.key)


def test_a_run_on_a_mixture_draws_shares_and_resumes(
    store_path: Path, other_store: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []
    genuine = Mixture.read

    def read(mixture: Mixture, sample_indices: Sequence[int], layers: Sequence[int] | None = None) -> KVBatch:
        if layers != () and len(sample_indices) == 8:
            drawn.append([int(index) for index in sample_indices])
        return genuine(mixture, sample_indices, layers)

    monkeypatch.setattr(Mixture, "read", read)
    over: dict[str, Any] = {"mix": {str(other_store): 0.25}, "tail": "pad", "balance_tokens": True, "kv_until": 1.0}
    straight = run_training(settings(store_path, student, tmp_path / "straight", **over))
    batches = [batch for batch in drawn if len(batch) == 8][-STEPS:]
    assert sum(index >= 44 for batch in batches[:5] for index in batch) in (9, 10, 11), "a quarter of forty"
    broken = settings(store_path, student, tmp_path / "broken", save_every=3, **over)
    with monkeypatch.context() as patch:
        calls = iter(range(10**6))

        def failing(mixture: Mixture, sample_indices: Sequence[int], layers: Sequence[int] | None = None) -> KVBatch:
            if layers != () and len(sample_indices) == 8 and next(calls) == 4:
                raise CorruptShardError("shard 1: injected")
            return genuine(mixture, sample_indices, layers)

        patch.setattr(Mixture, "read", failing)
        with pytest.raises(CorruptShardError, match="injected"):
            run_training(broken)
    resumed = run_training(broken.model_copy(update={"resume": True}))
    assert metrics(resumed.out) == metrics(straight.out)
    assert weights(resumed.out) == weights(straight.out)


def test_a_sample_that_two_stores_have_is_not_held_out_of_one_and_trained_on_in_the_other(
    source: Source, store_path: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = write_store(
        tmp_path / "other", source, codec="q8", documents=[f"elsewhere-{n}" for n in range(44)], tokenizer=tokenizer_folder
    )
    samples = Mixture([str(store_path), str(other)]).samples
    train, held_out = split_held_out(samples.ids, samples.source, samples.num_tokens, fraction=0.2, max_tokens=10**6)
    assert len(held_out) > 4
    assert not {samples.ids[index] for index in held_out} & {samples.ids[index] for index in train}


def test_stores_of_other_teachers_are_not_mixed(store_path: Path, student: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    stranger = teacher_source(make_texts(10), seed=5)
    other = write_store(tmp_path / "other", stranger, codec="raw", tokenizer=tokenizer_folder, signal={"weights": "others"})
    with pytest.raises(FingerprintMismatchError, match=r"mix: .*other differs from .* in weights"):
        run_training(settings(store_path, student, tmp_path / "run", mix={str(other): 0.5}))
    with pytest.raises(ValueError, match=r"mix: got shares .* that add up to 1.1, expected less than 1"):
        settings(store_path, student, tmp_path / "run", mix={"a": 0.5, "b": 0.6})


def test_a_padded_tail_has_the_loss_of_what_is_real(store_path: Path, student: str, tmp_path: Path) -> None:
    """Of 42 samples the sixth step has two: padded to eight, or short, its loss is the same."""
    over: dict[str, Any] = {"steps": 6, "kv_until": 1.0}
    padded, short = (
        run_training(settings(store_path, student, tmp_path / tail, tail=tail, **over)) for tail in ("pad", "short")
    )
    assert (padded.num_padded_samples, short.num_padded_samples) == (6, 0)
    assert padded.num_dropped_samples == 0
    for name in ("ce", "kv_loss"):
        assert logged(padded.out, name) == pytest.approx(logged(short.out, name), rel=1e-5)
    assert padded.tokens == short.tokens
