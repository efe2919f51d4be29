"""What is wrong with a store, a reader or a process comes out of the loaders as an error, never as other numbers and never as a hang."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from kvstore import KVStoreError, open_store
from tests.kvstore.test_faults import FAULTS, Fault, pristine, source
from training.kv_loader import KVLoader
from training.loader import KVDataset
from training.mixture import sample_table
from training.sampler import BatchPlan, KVBatchSampler

__all__ = ["pristine", "source"]


def by_loader(path: Path) -> Iterator[Any]:
    return iter(KVLoader(open_store(path), batch_size=2))


def by_dataset(path: Path) -> Iterator[Any]:
    """Through torch's own loader, in this process, after the ids, from which a run's held-out samples follow."""
    assert open_store(path).samples.ids
    return iter(data_loader(path))


def data_loader(path: Path, **how: Any) -> Any:
    store = open_store(path)
    plan = BatchPlan(batch_size=2, seed=0, window_tokens=10**6, kv_steps=99)
    dataset = KVDataset(store, store.spec.layer_numbers)
    return DataLoader(dataset, batch_sampler=KVBatchSampler(sample_table(store), plan), collate_fn=as_read, **how)


def as_read(read: Any) -> Any:
    """Collates nothing; a function by name, so that it can be sent to a process."""
    return read


SEEN = [fault for fault in FAULTS if fault.raises is not None and fault.shard is not None]
"""Of a shard, and refused by readers; other damage is refused when a store is opened, or found by verification alone."""
BY_IDS = {"sample stored twice"}
"""What only the ids tell, which a loader of one's own does not read."""


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name.replace(" ", "-")) for fault in SEEN])
def test_damage_ends_an_epoch(fault: Fault, pristine: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(pristine[fault.store], tmp_path / "store"))
    fault.damage(path, pristine)
    for batches in (by_dataset,) if fault.name in BY_IDS else (by_dataset, by_loader):
        with pytest.raises(KVStoreError, match=fault.raises):
            list(batches(path))


def test_a_process_forked_after_the_store_was_opened_is_told_so(pristine: dict[str, Path]) -> None:
    loader = data_loader(pristine["mix"], num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match=r"forked since; .*multiprocessing_context='spawn'"):
        next(iter(loader))


@pytest.mark.slow
def test_a_reading_process_that_is_killed_ends_the_epoch(pristine: dict[str, Path]) -> None:
    loader = iter(data_loader(pristine["mix"], num_workers=1, multiprocessing_context="spawn", prefetch_factor=1))
    next(loader)
    (worker,) = loader._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        list(loader)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as Python has it; what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_nothing_running(pristine: dict[str, Path]) -> None:
    before = threading.active_count()
    loader = iter(KVLoader(open_store(pristine["mix"]), batch_size=2))
    next(loader)
    threading.Timer(0.1, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(30)
    del loader
    assert threading.active_count() <= before + 1
