"""What opening a store costs as it grows: one small read per part and one listing of commits, never a shard or a row of samples.

Warm cache. The baseline is a store of one shard.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvstore import open_store
from tests.stores import write_sample_tables

pytestmark = pytest.mark.slow
MAX_EXTRA_S = 0.3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many samples a store has."""

    num_shards: int
    samples_per_shard: int = 1000


SMALL = Layout(num_shards=1)
"""The floor: locating, reading and proving a manifest, one listing, one summary."""
LARGE = Layout(num_shards=1000)
"""A million samples: 1,000 names to list and 1,000 rows of summary more."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("open")
    for layout in (SMALL, LARGE):
        write_sample_tables(root / str(layout.num_shards), layout.num_shards, layout.samples_per_shard)
    return {layout.num_shards: root / str(layout.num_shards) for layout in (SMALL, LARGE)}


@pytest.mark.parametrize("layout", [pytest.param(SMALL, id="thousand"), pytest.param(LARGE, id="million")])
def test_opening_a_store(benchmark: BenchmarkFixture, stores: dict[int, Path], layout: Layout) -> None:
    store = benchmark(open_store, stores[layout.num_shards])
    assert len(store) == layout.num_shards * layout.samples_per_shard


def test_a_million_samples_open_nearly_as_fast_as_a_thousand(benchmark: BenchmarkFixture, stores: dict[int, Path]) -> None:
    def seconds(layout: Layout) -> float:
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            open_store(stores[layout.num_shards])
            times.append(time.perf_counter() - begin)
        return max(times)

    small, large = seconds(SMALL), benchmark.pedantic(seconds, args=(LARGE,), rounds=1)
    print(f"\nopening, slowest of 20: 1,000 samples {1e3 * small:.1f} ms, 1,000,000 samples {1e3 * large:.1f} ms")
    assert large - small < MAX_EXTRA_S
    begin = time.perf_counter()
    assert len(open_store(stores[LARGE.num_shards]).samples.num_tokens) == 1_000_000
    print(f"first look at a column of 1,000,000: {time.perf_counter() - begin:.2f} s")
