"""What alignment costs beside a training step of the demo's student on the CPU: in one run, taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.align import Alignment, KVProjector, resample_kv_with_interpolation
from pipeline.models.capture import KVTap
from pipeline.models.load import build_student
from pipeline.models.probe import probe_kv_spec
from tests.checkpoints import byte_tokenizer, tiny_config
from tests.experiments import RECIPE, STUDENT
from training.losses import cross_entropy, kv_errors, take_rows
from training.targets import KVTargets

pytestmark = pytest.mark.slow
BATCH, ROUNDS = RECIPE["train"].get("batch_size", 16), 30
WIDTH = RECIPE["extract"]["seq_len"]


def seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


class Step:
    """Batches of the demo's size, its student, and the numbers its teacher would have left for them."""

    def __init__(self) -> None:
        teacher = RECIPE["teacher"]["config"]
        generator = torch.Generator().manual_seed(0)
        self.model, _ = build_student(STUDENT, vocab_size=len(byte_tokenizer()), seed=0)
        self.spec = probe_kv_spec(self.model)
        config = tiny_config(teacher["model_type"], **{key: value for key, value in teacher.items() if key != "model_type"})
        teacher_spec = probe_kv_spec(type(self.model)(config).eval())
        self.alignment = Alignment.plan(teacher_spec, self.spec)
        self.targets = KVTargets(self.alignment)
        self.input_ids = torch.randint(0, 256, (BATCH, WIDTH), generator=generator)
        layer = teacher_spec.layers[0]
        shape = (BATCH * WIDTH, layer.num_kv_heads, layer.key_dim)
        self.stored = {
            number: (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
            for number in self.alignment.teacher_layers
        }
        self.rows = torch.arange(BATCH * WIDTH)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def train(self) -> None:
        """Forward, both losses, backward, update; targets are at hand already."""
        with KVTap(self.model, self.spec, layers=self.targets.student_layers) as tap:
            logits = self.model(input_ids=self.input_ids, use_cache=False).logits
        loss = cross_entropy(logits, self.input_ids, BATCH * (WIDTH - 1))
        student = {layer: (take_rows(key, self.rows), take_rows(value, self.rows)) for layer, (key, value) in tap.kv.items()}
        ours = self.targets.student_side(student)
        errors = kv_errors(ours, self.projected, torch.ones(len(ours), 2), BATCH * WIDTH)
        torch.autograd.backward(loss + errors.mean())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def project(self) -> None:
        self.projected = self.targets.teacher_side(self.stored)

    def resample(self) -> None:
        for pair in self.projected:
            for side in pair:
                resample_kv_with_interpolation(side.reshape(BATCH, WIDTH, *side.shape[1:]).transpose(1, 2), WIDTH - 16)


@pytest.fixture(scope="module")
def step() -> Step:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the demo trains
    made = Step()
    made.project()
    torch.set_num_threads(before)
    return made


@pytest.mark.parametrize(("what", "limit"), [("project", 0.02), ("resample", 0.01)])
def test_aligning_a_batch_is_a_small_part_of_a_training_step(what: str, limit: float, step: Step, benchmark: Any) -> None:
    def ratio() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            step.train()
            getattr(step, what)()
            pairs = [(seconds(getattr(step, what)), seconds(step.train)) for _ in range(ROUNDS)]
        finally:
            torch.set_num_threads(before)
        return statistics.median(aligning / training for aligning, training in pairs)

    found = benchmark.pedantic(ratio, rounds=1)
    print(f"\nto {what} the keys and values of a batch takes {found:.2%} of a training step")
    assert found <= limit


def test_equal_geometry_allocates_nothing(benchmark: Any) -> None:
    projector = KVProjector(4, 4, 16, 16)
    k, v = torch.randn(BATCH, 4, WIDTH, 16), torch.randn(BATCH, 4, WIDTH, 16)

    def allocated() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = projector(k, v)
            again = resample_kv_with_interpolation(k, WIDTH)
        assert out[0] is k
        assert out[1] is v
        assert again is k
        return sum(event.cpu_memory_usage for event in profile.events())

    assert benchmark.pedantic(allocated, rounds=1) == 0
