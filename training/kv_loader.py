"""Batches of a store for a training loop of one's own: packed, decoded where the model is, read ahead, and resumed exactly.

    loader = KVLoader(open_store("my-store"), batch_size=16, layers=[3, 7], device="cuda")
    for batch in loader:
        logits = model(**batch.padded()).logits
        ...
    state = loader.state_dict()  # after any batch; load_state_dict goes on with the next

Codes cross to the device and are decoded there. Knows stores and the sampler; no model and no loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from pydantic import Field
from torch import Tensor

from kvstore import codec
from kvstore.batches import CodeBatch
from kvstore.codec import KINDS, Kind
from kvstore.groups import Group
from kvstore.reader import Store
from kvstore.records import fingerprint
from training.handover import quick_handover
from training.mixture import sample_table
from training.order import Shards, Shuffle
from training.records import Count, Record, parse
from training.sampler import BatchPlan, KVBatchSampler, SampleBatch, Tail

STATE_VERSION = 1
PREFETCH_BYTES = 2**30
"""Of batches that are read, or being read, before they are asked for; one batch is always. Codes for a GPU, decoded for the CPU."""
MAX_EPOCH = 10**6
"""More passes than any run makes: with `batch_tokens` the steps of all passes before are counted, so a number without a limit would hang."""
_THREADS = 4


class LoaderState(Record):
    """A place between two batches, as `KVLoader.state_dict` gives it."""

    version: Count
    fingerprint: str
    """Of the store."""
    plan_hash: str
    """Of all that decides which samples make a batch."""
    epoch: Annotated[int, Field(ge=0, le=MAX_EPOCH)]
    samples_consumed: Count


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Samples laid end to end, without padding, on one device."""

    samples: tuple[int, ...]
    """Their numbers in the store."""
    weights: tuple[int, ...]
    """How often the data had each; 0 for those that only fill up the last batch of an epoch."""
    step: int
    """Number of the global batch, from 0, counted on over epochs."""
    input_ids: Int64[Tensor, "token"]
    cu_seqlens: Int32[Tensor, "boundary"]
    """Sample i has tokens cu_seqlens[i]:cu_seqlens[i + 1], as attention kernels for packed sequences want it."""
    max_seqlen: int
    learnt: Bool[Tensor, "token"]
    """Tokens to be learnt from."""
    has_kv: Bool[Tensor, "token"]
    """Tokens with keys and values."""
    kv: Mapping[int, tuple[Float[Tensor, "token kv_head key_dim"], Float[Tensor, "token kv_head value_dim"]]]
    """Keys and values by teacher layer."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device; Lightning and accelerate ask for it. `KVLoader(device=...)` moves a fraction of the bytes."""
        move = functools.partial(torch.Tensor.to, device=device, non_blocking=non_blocking)
        tokens: dict[str, Any] = {name: move(getattr(self, name)) for name in ("input_ids", "cu_seqlens", "learnt", "has_kv")}
        return dataclasses.replace(
            self, **tokens, kv={layer: (move(key), move(value)) for layer, (key, value) in self.kv.items()}
        )

    def padded(self, pad_id: int = 0) -> dict[str, Int64[Tensor, "sample position"]]:
        """`input_ids` and `attention_mask` padded on the right, as models take them."""
        place = self._place()
        input_ids = self.input_ids.new_full(place.shape, pad_id)
        input_ids[place] = self.input_ids
        return {"input_ids": input_ids, "attention_mask": place.to(torch.int64)}

    def padded_kv(
        self, layer: int
    ) -> tuple[Float[Tensor, "sample kv_head position _"], Float[Tensor, "sample kv_head position _"]]:
        """Keys and values of a layer in the model's axes, zero where padded."""
        place = self._place()
        sides = []
        for packed in self.kv[layer]:
            out = packed.new_zeros(*place.shape, *packed.shape[1:])
            out[place] = packed
            sides.append(out.transpose(1, 2))
        return sides[0], sides[1]

    def _place(self) -> Bool[Tensor, "sample position"]:
        lengths = torch.diff(self.cu_seqlens)
        return torch.arange(self.max_seqlen, device=lengths.device) < lengths[:, None]


class KVLoader:
    """Iterates over one epoch of this rank's batches; again over the next.

    Global batches are the same for any number of ranks. Batches are read ahead by threads, in order, within a budget of bytes; an
    error of reading is raised where its batch would come. To stop early, break: nothing is left running, and the next loop goes on
    there. One loop at a time; while it runs, threads hand the interpreter on sooner (`handover`).
    """

    def __init__(
        self,
        store: Store,
        *,
        batch_size: int = 16,
        batch_tokens: int | None = None,
        layers: Sequence[int] | None = None,
        seed: int = 0,
        shuffle: Shuffle = "windowed",
        window_bytes: int = 64 * 2**30,
        tail: Tail = "drop",
        balance: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prefetch_bytes: int = PREFETCH_BYTES,
    ) -> None:
        """Plan over all samples of a store: by the summary of its shards alone, or with `batch_tokens` by the samples' lengths as well.
        Other columns are read for the first batch.

        Args:
            batch_size: samples of a global batch, over all ranks.
            batch_tokens: most tokens of a global batch instead, so that batches differ in their samples and epochs in their batches.
            layers: teacher layers to read; None for all, () for tokens alone.
            window_bytes: decoded bytes of whole shards among which samples are shuffled.
            tail: what becomes of samples that fill no whole batch.

        Raises:
            ValueError: no such layer, or batches that cannot be cut.
        """
        self.store, self.device = store, torch.device(device)
        self.layers = store.spec.layer_numbers if layers is None else tuple(layers)
        store.spec.select(self.layers or store.spec.layer_numbers)
        summary = store.samples.summary
        sizes = [np.asarray(summary[name].to_numpy(), dtype=np.int64) for name in ("num_samples", "num_tokens")]
        shards = Shards(*(column[sizes[0] > 0] for column in sizes))
        self._plan = BatchPlan(
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            seed=seed,
            window_tokens=max(window_bytes // (4 * store.spec.values_per_token), 1),
            kv_steps=0,
            shuffle=shuffle,
            tail=tail,
            balance=balance,
        )
        self._sampler = KVBatchSampler(lambda: sample_table(store), self._plan, shards=shards, rank=rank, world_size=world_size)
        self._prefetch_bytes = prefetch_bytes
        self._on_device: dict[tuple[str, Kind], tuple[Tensor | None, Tensor | None]] = {}
        self._epoch = self._consumed = 0
        self._loop = object()
        self._known_cuts: tuple[int, Int64[np.ndarray, "boundary"]] | None = None

    def __len__(self) -> int:
        """Batches of the whole epoch that the next batch is of."""
        return len(self._cuts) - 1

    @property
    def dropped(self) -> int:
        """Samples each epoch leaves out."""
        return self._sampler.dropped

    @property
    def padded(self) -> int:
        """Samples of weight 0 that fill up batches; with `batch_tokens` those of the first epoch."""
        return self._sampler.padded

    @property
    def epoch(self) -> int:
        """The epoch the next batch is of."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is: after the last batch it was handed, whatever was read ahead. The same on every rank; JSON."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.store.manifest.fingerprint,
            "plan_hash": self._plan_hash,
            "epoch": self._epoch,
            "samples_consumed": self._consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind a state, on any number of ranks, with any layers, device and budget; a loop that runs ends with an error.

        Raises:
            ValueError: it is of another store, of other settings, of another version, or no place between two batches.
        """
        found = parse(LoaderState, dict(state) if isinstance(state, Mapping) else state, "state")
        expected = self.state_dict()
        for field in ("version", "fingerprint", "plan_hash"):
            got = getattr(found, field)
            if got != expected[field]:
                raise ValueError(
                    f"state: {field}: got {got!r}, expected {expected[field]!r}; it is of another store, or of another seed, order or "
                    "batch_size"
                )
        epoch, consumed = found.epoch, found.samples_consumed
        cuts = self._sampler.cuts(epoch)
        if consumed not in cuts[:-1]:
            raise ValueError(
                f"state: got samples_consumed {consumed!r}, expected the end of a batch of epoch {epoch}: {_some(cuts)}"
            )
        self._epoch, self._consumed, self._loop = epoch, consumed, object()

    @property
    def _plan_hash(self) -> str:
        plan = dataclasses.asdict(self._plan)
        plan.pop("balance")  # changes who gets which sample of a batch, not the batch
        return fingerprint(plan)

    @property
    def _cuts(self) -> Int64[np.ndarray, "boundary"]:
        if self._known_cuts is None or self._known_cuts[0] != self._epoch:
            self._known_cuts = self._epoch, self._sampler.cuts(self._epoch)
        return self._known_cuts[1]

    def __iter__(self) -> Iterator[PackedBatch]:
        self._loop = loop = object()
        cuts = self._cuts
        done = int(np.searchsorted(cuts, self._consumed))
        requests = self._sampler.batches_of(self._epoch, done)
        pending: deque[tuple[int, SampleBatch, Future[CodeBatch | PackedBatch]]] = deque()
        executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-loader")
        with contextlib.ExitStack() as held:
            held.callback(executor.shutdown, wait=True, cancel_futures=True)
            held.enter_context(quick_handover())
            following, in_flight = next(requests, None), 0
            while pending or following is not None:
                while following is not None and (not pending or in_flight + self._size(following) <= self._prefetch_bytes):
                    size = self._size(following)
                    pending.append((size, following, executor.submit(self._read, following)))
                    in_flight += size
                    following = next(requests, None)
                in_flight -= pending[0][0]
                # Popped as it is handed over, and taken elsewhere: a name here would keep a batch until the next is asked for.
                taken = [self._take(*pending.popleft()[1:])]
                done += 1
                self._consumed = int(cuts[done])
                if done == len(cuts) - 1:
                    self._epoch, self._consumed = self._epoch + 1, 0
                yield taken.pop()
                if self._loop is not loop:
                    raise RuntimeError(
                        "KVLoader: another loop over it has begun, or a state was loaded, expected one loop at a time; make a loader for each"
                    )

    def _take(self, request: SampleBatch, future: Future[CodeBatch | PackedBatch]) -> PackedBatch:
        """Wait for a batch that is being read."""
        read = future.result()
        return self._pack(request, read) if isinstance(read, CodeBatch) else read

    def _read(self, request: SampleBatch) -> CodeBatch | PackedBatch:
        """In a thread: a whole batch for the CPU, codes for a GPU, whose work is given to it by the thread that trains."""
        codes = self.store.read_codes(request, self.layers)
        return codes if self.device.type == "cuda" else self._pack(request, codes)

    def _size(self, request: SampleBatch) -> int:
        """Bytes of a batch while it waits."""
        tokens = int(self.store.samples.num_tokens[list(request)].sum())
        return tokens * (4 + self._token_bytes)

    @functools.cached_property
    def _token_bytes(self) -> int:
        """Of one token, in all layers wanted."""
        total = 0
        for layer in self.layers:
            group, _ = self.store.manifest.group_of(layer)
            for kind in KINDS:
                codes = int(np.prod(group.code_shape(kind))) * group.storage_dtype(kind).itemsize
                total += codes if self.device.type == "cuda" else 4 * group.num_kv_heads * group.dim(kind)
        return total

    def _pack(self, request: SampleBatch, codes: CodeBatch) -> PackedBatch:
        lengths = np.diff(codes.cu_seqlens)
        return PackedBatch(
            samples=tuple(request),
            weights=tuple(request.weights or itertools.repeat(1, len(request))),
            step=request.step,
            input_ids=self._tensor(codes.input_ids.astype(np.int64)),
            cu_seqlens=self._tensor(codes.cu_seqlens.astype(np.int32)),
            max_seqlen=int(lengths.max(initial=0)),
            learnt=self._tensor(codes.learnt),
            has_kv=self._tensor(codes.has_kv),
            kv=self._decode(codes),
        )

    def _decode(self, codes: CodeBatch) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the layers wanted, decoded on the device; all layers of a group at once, for every call costs a busy
        interpreter a handover."""
        decoded: dict[Kind, dict[int, Tensor]] = {kind: {} for kind in KINDS}
        for group, slots in self.store.manifest.slots_of(self.layers):
            for kind in KINDS:
                moved = self._tensor(codes.codes[group.path, kind])
                values = codec.decode(group.quantizer(kind), moved, *self._channels(group, kind, slots))
                decoded[kind].update(zip((group.layers[slot] for slot in slots), values, strict=True))
        return {layer: (decoded["key"][layer], decoded["value"][layer]) for layer in self.layers}

    def _channels(self, group: Group, kind: Kind, slots: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """Means and steps on the device; brought there once."""
        if (group.path, kind) not in self._on_device:
            mean, step = self.store.calibration.get(group.path, {}).get(kind, (None, None))
            self._on_device[group.path, kind] = (
                None if mean is None else self._tensor(mean[slots]),
                None if step is None else self._tensor(step[slots]),
            )
        return self._on_device[group.path, kind]

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _some(cuts: Int64[np.ndarray, "boundary"]) -> str:
    """The places between batches, as many as can be read."""
    shown = ", ".join(map(str, cuts[:4].tolist()))
    return shown if len(cuts) <= 5 else f"{shown}, ... {cuts[-2]}"
