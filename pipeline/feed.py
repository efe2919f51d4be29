"""From captured tensors to codes in a shard: encoded where they are, then brought to the host and handed to the shard's writer.

On a GPU the codes cross the bus, not the numbers: on a stream of their own, into pinned memory, while the model goes on. On the CPU
the same steps follow each other at once. Knows tensors and shard writers; neither models nor tasks.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.calibration import Calibration, channels_of
from kvstore.codec import KINDS, Encoded, Kind, encode_measured
from kvstore.manifest import Manifest
from kvstore.writer import Placed, ShardWriter

QUEUE_BYTES = 512 * 2**20
"""Codes on their way from a GPU, in pinned memory: those of a whole shard, so that the model need not wait for them to be put there."""

_CUDA: Any = torch.cuda  # its classes have no types
_OnDevice = tuple[Tensor, Tensor] | tuple[None, None]


class StoreCodec:
    """How one store encodes each layer; its calibration goes to every device once. Safe between threads."""

    def __init__(self, manifest: Manifest, calibration: Calibration) -> None:
        self.manifest, self.calibration = manifest, calibration
        self._on_device: dict[tuple[int, Kind, torch.device], _OnDevice] = {}

    def encode(self, layer: int, kind: Kind, values: Float[Tensor, "token kv_head dim"]) -> Encoded:
        """Codes and measures of one layer's keys or values: tensors on a GPU, numpy arrays for the CPU."""
        group, slot = self.manifest.group_of(layer)
        quantizer, channels = group.quantizer(kind), channels_of(self.calibration, group, kind, slot)
        if values.device.type == "cpu":
            return encode_measured(quantizer, as_numpy(values.float() if quantizer else values), *channels)
        place = (layer, kind, values.device)
        if place not in self._on_device:
            mean, step = channels
            self._on_device[place] = (
                (None, None)
                if mean is None or step is None
                else (torch.from_numpy(mean).to(values.device), torch.from_numpy(step).to(values.device))
            )
        return encode_measured(quantizer, values, *self._on_device[place])


@dataclasses.dataclass(frozen=True, slots=True)
class _OnItsWay:
    """Codes that a GPU is still copying, or computing."""

    layer: int
    kind: Kind
    placed: Sequence[Placed]
    codes: Tensor
    measures: Tensor
    begun: torch.cuda.Event
    encoded: torch.cuda.Event
    copied: torch.cuda.Event

    @property
    def size_bytes(self) -> int:
        return self.codes.nbytes + self.measures.nbytes


class Feed:
    """Encodes what the tap hands over and feeds it to one shard's writer; used by one thread at a time.

    Holds at most QUEUE_BYTES of codes, and those of one layer, beyond what the writer holds.
    """

    def __init__(self, writer: ShardWriter, codec: StoreCodec) -> None:
        self._writer, self._codec = writer, codec
        self._queue: deque[_OnItsWay] = deque()
        self._queued_bytes = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.encode_s = 0.0
        """Time that encoding took, of the host or of the GPU."""
        self.copy_s = 0.0
        """Time the host waited for copies, and for putting codes into the shard."""

    def take(
        self,
        layer: int,
        placed: Sequence[Placed],
        key: Float[Tensor, "token kv_head key_dim"],
        value: Float[Tensor, "token kv_head value_dim"],
    ) -> None:
        """Encode one layer of a batch; the same samples again replace what came of them before.

        Raises:
            CodecError: a value is not finite, of this layer or, on a GPU, of one taken before.
        """
        for kind, values in zip(KINDS, (key, value), strict=True):
            if values.device.type == "cpu":
                begun = time.perf_counter()
                encoded = self._codec.encode(layer, kind, values)
                done = time.perf_counter()
                self._writer.put_encoded(layer, kind, placed, encoded)
                self.encode_s += done - begun
                self.copy_s += time.perf_counter() - done
            else:
                self._send(layer, kind, placed, values)
        self.drain(QUEUE_BYTES)

    def drain(self, keep_bytes: int = 0) -> None:
        """Hand over to the writer what was queued first, until no more than so much is queued."""
        while self._queued_bytes > keep_bytes:
            item = self._queue.popleft()
            self._queued_bytes -= item.size_bytes
            item.encoded.synchronize()  # this wait is the model's, the next is the bus's
            begun = time.perf_counter()
            item.copied.synchronize()
            self._writer.put_encoded(item.layer, item.kind, item.placed, Encoded(item.codes.numpy(), item.measures.numpy()))
            self.copy_s += time.perf_counter() - begun
            self.encode_s += item.begun.elapsed_time(item.encoded) / 1e3

    def _send(self, layer: int, kind: Kind, placed: Sequence[Placed], values: Tensor) -> None:
        with torch.cuda.device(values.device):
            begun, encoded, copied = (_CUDA.Event(enable_timing=True) for _ in range(3))
            begun.record()
            found = self._codec.encode(layer, kind, values)
            encoded.record()
            stream = self._streams.setdefault(values.device, _CUDA.Stream())
            stream.wait_event(encoded)
            with torch.cuda.stream(stream):
                codes, measures = (_to_pinned(tensor, stream) for tensor in (found.codes, found.measures))
                copied.record()
        item = _OnItsWay(layer, kind, placed, codes, measures, begun, encoded, copied)
        self._queue.append(item)
        self._queued_bytes += item.size_bytes


def _to_pinned(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Begin to copy to the host; torch keeps both ends until the stream is through, and gives pinned memory out again."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    return host


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor on the host without a copy, bfloat16 as `ml_dtypes` has it."""
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())
