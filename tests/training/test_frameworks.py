"""The loader in the loops of others, Lightning's and accelerate's own: every batch compared with a plain loop's, element for element."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from accelerate import Accelerator
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from kvstore.reader import Store, open_store
from tests.stores import random_source, small_spec, write_store
from tests.training.test_kv_loader import LENGTHS, same
from training.kv_loader import KVLoader, PackedBatch
from training.loader import KVCollator, KVDataset, TrainBatch
from training.mixture import sample_table
from training.sampler import BatchPlan, KVBatchSampler

pytestmark = [  # of Lightning: what it asks of torch, and its advice
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

BATCH_SIZE, EPOCHS = 4, 2
STEPS_PER_EPOCH = len(LENGTHS) // BATCH_SIZE


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(
        write_store(tmp_path_factory.mktemp("frameworks") / "kv", random_source(small_spec(), LENGTHS, seed=4), "mix")
    )


def packed(store: Store) -> KVLoader:
    return KVLoader(store, batch_size=BATCH_SIZE, seed=3)


def padded(store: Store) -> DataLoader[Any]:
    """The same samples as a map-style data set with a batch sampler."""
    plan = BatchPlan(batch_size=BATCH_SIZE, seed=3, window_tokens=10**9, kv_steps=10**6)
    return DataLoader(
        KVDataset(store, store.spec.layer_numbers),
        batch_sampler=KVBatchSampler(sample_table(store), plan),
        collate_fn=KVCollator(sink_tokens=0),
    )


class Recorder(lightning.LightningModule):
    """One weight, trained to no purpose, and the batches it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(loader: Any, folder: Path, *, max_steps: int = -1, checkpoint: Path | None = None) -> list[Any]:
    """What Lightning handed over; it leaves a checkpoint of each step."""
    module = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        max_steps=max_steps,
        logger=False,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, train_dataloaders=loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    return module.seen


def plain(store: Store) -> list[PackedBatch]:
    loader = packed(store)
    return [batch for _ in range(EPOCHS) for batch in loader]


def test_lightning_hands_over_the_batches_of_a_plain_loop(store: Store, tmp_path: Path) -> None:
    seen = fit(packed(store), tmp_path)
    assert len(seen) == EPOCHS * STEPS_PER_EPOCH
    assert all(itertools.starmap(same, zip(seen, plain(store), strict=True)))


@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS_PER_EPOCH))
def test_lightning_goes_on_from_its_checkpoint_with_the_next_batch(step: int, store: Store, tmp_path: Path) -> None:
    before = fit(packed(store), tmp_path, max_steps=step)
    after = fit(packed(store), tmp_path, checkpoint=tmp_path / f"step={step}.ckpt")
    assert len(before) == step
    assert all(itertools.starmap(same, zip([*before, *after], plain(store), strict=True)))


def as_packed(batch: TrainBatch, expected: PackedBatch) -> bool:
    """Whether a padded batch of a batch sampler is this packed one."""
    ours = expected.padded()
    ((key, value),) = batch["teacher"]
    theirs = list(zip(key, value, strict=True))
    return (
        torch.equal(batch["input_ids"], ours["input_ids"])
        and torch.equal(batch["attention_mask"], ours["attention_mask"])
        and len(theirs) == len(expected.kv)
        and all(
            torch.equal(one, other)
            for sides, stored in zip(theirs, expected.kv.values(), strict=True)
            for one, other in zip(sides, stored, strict=True)
        )
    )


def test_a_batch_sampler_gives_the_same_under_lightning(store: Store, tmp_path: Path) -> None:
    seen = fit(padded(store), tmp_path)
    assert all(itertools.starmap(as_packed, zip(seen, plain(store), strict=True)))


def test_a_batch_sampler_gives_the_same_under_accelerate(store: Store) -> None:
    loader = Accelerator(cpu=True).prepare(padded(store))
    seen = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        seen += list(loader)
    assert all(itertools.starmap(as_packed, zip(seen, plain(store), strict=True)))
