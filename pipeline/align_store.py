"""An aligned store for one student from a raw store, without the teacher: other layers, heads, dims, and other tokens.

One extraction serves many students. Where the student has another tokenizer, each sample's text is written again in its tokens and
every token takes the mean of the teacher tokens under it (`align.spans`); then heads and dims are mapped. The same call again goes
on where it was stopped (`kvstore.compose`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvstore import FingerprintMismatchError, KVStoreError, open_store
from kvstore.calibration import (
    CALIBRATION_TOKENS,
    SINK_TOKENS,
    Calibration,
    ChannelMoments,
    calibration_mask,
    fit_groups,
    refuse_broken_sample,
)
from kvstore.codec import KINDS, format_codecs, parse_codecs
from kvstore.commits import Commit, sample_id, token_crc32c
from kvstore.compose import Member, Origin, Plan, Progress, RewriteSummary, TokenIdentity, cut, make, origins_of, planned
from kvstore.drop import read_dropped
from kvstore.fidelity import Trial, refuse_lossy
from kvstore.groups import plan_groups
from kvstore.manifest import Manifest
from kvstore.reader import Store
from kvstore.records import plain
from kvstore.spec import format_layers
from kvstore.storage import locate
from kvstore.writer import ShardWriter
from pipeline.align import Alignment, choose_student_layers
from pipeline.align.fit import MAPS, Fit
from pipeline.align.same_tokens import tokenizer_differences
from pipeline.align.spans import AlignedSample, TextChangedError, TimeMode, align_sample
from pipeline.align.token_bytes import TokenBytes
from pipeline.models.fingerprint import tokenizer_fingerprint
from pipeline.models.load import build_student, load_tokenizer, tokenizer_files
from pipeline.models.probe import probe_kv_spec
from pipeline.models.resolve import resolve_model


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AlignSettings:
    """What to align a store to."""

    student: str
    """Preset, id, folder or config file."""
    tokenizer: str | None = None
    """Folder or id of the tokenizer of a fresh student; None for that of a pretrained one, else the store's."""
    layer_map: str = "last_aligned"
    layers: str | None = None
    """Student layers, 'all' or a list; None for eight spread evenly."""
    codec: str = "mix"
    fit: str | None = None
    """File of `kvpipe fit` with fitted maps of heads and dims; None for the area map."""
    time: TimeMode = "overlap"
    """What a student token of another tokenizer takes of the teacher's."""
    workers: int = 1
    """Shards made at a time."""
    accept_fidelity: bool = False
    """Store it even where typical tokens do not survive the codec."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AlignSummary(RewriteSummary):
    """What aligning did."""

    baked: bool
    """Whether heads and dims are the student's; False where those would take more room, and are mapped at load."""
    coverage: float
    """Share of the student's tokens with keys and values of their own."""
    left_out: int
    """Samples of which no whole character is left, or whose text the student's tokenizer changes."""


def align_store(source: str, out: str, settings: AlignSettings, progress: Progress = lambda *_: None) -> AlignSummary:
    """Make a store for one student from a raw one.

    Raises:
        ValueError: no such student, tokenizers that cannot be aligned, or nothing to align.
        KVStoreError: the source is baked, not complete or damaged, or `out` is the source.
        FidelityError: the codec loses typical tokens; where the first samples show it, nothing was written.
        FingerprintMismatchError: `out` holds another store; nothing was written.
        LeaseHeldError: somebody is writing into `out`.
    """
    target, store = locate(out), open_store(source)
    _refuse_source(store, target.location)
    aligner = _Aligner(store, settings)
    origins, coverage, left_out = aligner.origins()
    wanted = aligner.manifest()
    origin = {"location": store.location, "fingerprint": store.manifest.fingerprint, "student": settings.student}
    run = {"first_part": 0, "complete": True, "aligned_from": origin}
    dropped = read_dropped(store.storage) if aligner.same_tokens else []
    summary = make(
        Plan(
            target=target,
            stores=[store],
            origins=origins,
            manifest=planned(wanted, [store], origins, dropped, run),
            dropped=dropped,
            calibrate=lambda told: aligner.calibrate(wanted, origins, told),
            convert=aligner.convert,
            gate=None,
            tokenizer=None if aligner.same_tokens else tokenizer_files(aligner.ours.tokenizer),
            projection=None if aligner.fit is None else {MAPS: aligner.fit.content()},
            workers=settings.workers,
        ),
        f"kvpipe align {source}",
        progress,
    )
    return AlignSummary(
        **{field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)},
        baked=aligner.alignment.baked,
        coverage=coverage,
        left_out=left_out,
    )


def _refuse_source(store: Store, out: str) -> None:
    if store.location == out:
        raise KVStoreError(f"align: --out is the store itself ({out}); choose a new folder")
    manifest = store.manifest
    planned_shards, committed = manifest.layout.num_shards, len(store.samples.summary)
    if committed < planned_shards or manifest.is_growing:
        raise KVStoreError(
            f"align: {store.location} has {committed} of {planned_shards} shards; finish it first with the command that began it"
        )
    baked = manifest.alignment is not None and manifest.alignment["baked"]
    if baked or "kv_mask" in manifest.token_arrays:
        raise KVStoreError(
            f"align: {store.location} is already aligned to a student; expected a raw store, as 'kvpipe extract' without --student makes"
        )


def _tokenizer_folder(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else resolve_model(name).path


def _counted(samples: Sequence[AlignedSample]) -> np.ndarray:
    """Tokens that get keys and values of their own."""
    return np.concatenate([sample.spans.kept for sample in samples])


class _Aligner:
    """Brings samples of one store to one student."""

    def __init__(self, store: Store, settings: AlignSettings) -> None:
        if store.tokenizer_path is None:
            raise ValueError(f"align: {store.location} keeps no tokenizer, so its tokens cannot be read; extract it again")
        self._store, self._settings = store, settings
        self._theirs = TokenBytes(load_tokenizer(store.tokenizer_path))
        given = None if settings.tokenizer is None else load_tokenizer(_tokenizer_folder(settings.tokenizer))
        tokens = given or self._theirs.tokenizer
        student, own = build_student(settings.student, vocab_size=len(tokens), seed=0)
        if own is not None and given is not None and (differences := tokenizer_differences(own, given)):
            raise ValueError(
                f"--tokenizer: {settings.student} has a tokenizer of its own; leave --tokenizer out ({settings.tokenizer} is another: "
                f"{'; '.join(differences)})"
            )
        self.ours = TokenBytes(own or tokens)
        self.same_tokens = self._theirs.same_as(self.ours)
        self._positions = getattr(student.config, "max_position_embeddings", None)
        self.alignment = self._plan(probe_kv_spec(student, key_domain=store.spec.key_domain))
        self._spec = self.alignment.stored_spec() if self.alignment.baked else store.spec.select(self.alignment.teacher_layers)
        self.fit = None if settings.fit is None else self._load_fit(settings.fit)
        self._codecs = parse_codecs(settings.codec, self._spec.layer_numbers)

    def _plan(self, student: Any) -> Alignment:
        store, settings = self._store, self._settings
        layers = choose_student_layers(settings.layers, settings.layer_map, student.layer_numbers)
        alignment = Alignment.plan(store.manifest.teacher, student, layer_map=settings.layer_map, student_layers=layers)
        missing = set(alignment.teacher_layers) - set(store.spec.layer_numbers)
        if missing:
            raise ValueError(
                f"--layer-map: {settings.layer_map} wants teacher layers {format_layers(missing)}, but {store.location} holds "
                f"{format_layers(store.spec.layer_numbers)}; choose others with --layers or --layer-map"
            )
        if not self.same_tokens and store.spec.key_domain == "post_rope":
            raise ValueError(
                f"align: {store.location} holds rotated keys, of which no mean can be taken; extract with keys before rotation"
            )
        if alignment.is_smaller:
            return dataclasses.replace(alignment, baked=True)
        if self.same_tokens:
            raise ValueError(
                f"align: {settings.student} has the store's tokenizer and no fewer values per layer than the teacher, so an aligned store would "
                f"not be smaller; train it from {store.location} itself, the map is applied at load"
            )
        return alignment

    def _load_fit(self, path: str) -> Fit:
        fit = Fit.load(path)
        fit.require(self.alignment)
        if fit.store != self._store.manifest.fingerprint:
            raise FingerprintMismatchError(
                f"--fit: {path} was fitted on store {fit.store[:12]}, expected {self._store.manifest.fingerprint[:12]} ({self._store.location}); fit "
                "again on this store"
            )
        if not self.alignment.baked:
            raise ValueError(
                f"--fit: heads and dims of {self._settings.student} are not smaller, so nothing is projected here; leave it out"
            )
        return fit

    def manifest(self) -> Manifest:
        """But for layout, data and calibration."""
        manifest = self._store.manifest
        arrays = manifest.token_arrays
        signal = {
            **{name: value for name, value in manifest.signal.items() if name not in ("calibration", "recoded_from")},
            "tokenizer": tokenizer_fingerprint(self.ours.tokenizer),
            "layers": format_layers(self._spec.layer_numbers),
            "spec": self._spec.to_json(),
            "alignment": self.alignment.to_json(),
            "codec": format_codecs(self._codecs),
            "aligned_from": manifest.signal_fingerprint,
            "time": "identity" if self.same_tokens else self._settings.time,
        }
        if self.fit is not None:
            signal["fit"] = {"fit_id": self.fit.fit_id, "method": self.fit.method}
        return dataclasses.replace(
            manifest,
            spec=self._spec,
            groups=plan_groups(self._spec, self._codecs),
            alignment=self.alignment.to_json(),
            signal=plain(signal),
            token_arrays=arrays if self.same_tokens else (*arrays, "kv_mask"),
        )

    def origins(self) -> tuple[list[Origin], float, int]:
        """Every sample in the student's tokens by id, the share of tokens that get keys and values, and how many are left out."""
        before = origins_of([self._store])
        if self.same_tokens:
            return before, 1.0, 0
        found: dict[str, Origin] = {}
        kept = total = left_out = 0
        changed: TextChangedError | None = None
        for run in cut(before, lambda origin: origin.num_tokens):
            for origin, tokens in zip(run, self._tokens([origin.index for origin in run]), strict=True):
                try:
                    sample = self._align(*tokens)
                except TextChangedError as error:
                    changed, left_out = error, left_out + 1
                    continue
                if len(sample.input_ids) == 0:
                    left_out += 1
                    continue
                ids = sample.input_ids.astype(np.int32)
                identity = sample_id(ids)
                known = found.get(identity)
                found[identity] = Origin(
                    id=identity,
                    store=0,
                    index=origin.index if known is None else known.index,
                    num_tokens=len(ids),
                    count=origin.count + (known.count if known else 0),
                    tokens=TokenIdentity(source_id=origin.id, crc32c=token_crc32c(ids)) if known is None else known.tokens,
                )
                kept, total = kept + int(sample.spans.kept.sum()), total + len(ids)
        if changed is not None and left_out > len(before) / 2:
            raise ValueError(
                f"{changed}; so it is with {left_out:,} of {len(before):,} samples of {self._store.location}"
            ) from changed
        if not found:
            raise ValueError(f"align: no sample of {self._store.location} has a whole character in it")
        longest = max(origin.num_tokens for origin in found.values())
        if self._positions is not None and longest > self._positions:
            raise ValueError(
                f"--student: {self._settings.student} has max_position_embeddings {self._positions}, but a sample has {longest} of its tokens; "
                "raise it in the student's config, or extract with a smaller --seq-len"
            )
        return [found[identity] for identity in sorted(found)], kept / total, left_out

    def _samples(self, indices: Sequence[int]) -> list[AlignedSample]:
        return [self._align(*tokens) for tokens in self._tokens(indices)]

    def _tokens(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Token ids of each of these samples, and which have keys and values."""
        batch = self._store.read(indices, layers=())
        has_kv = batch.learnt if self._store.manifest.is_response_only else np.ones(len(batch.input_ids), dtype=np.bool_)
        for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            yield batch.input_ids[first:last], has_kv[first:last]

    def _align(self, input_ids: np.ndarray, has_kv: np.ndarray) -> AlignedSample:
        sample = align_sample(self._theirs, self.ours, input_ids, self._settings.time)
        if self.same_tokens:
            return sample
        # A first token's keys are those of an attention sink, wherever the student would have them.
        usable = has_kv & (np.arange(len(input_ids)) >= SINK_TOKENS)
        return dataclasses.replace(sample, spans=sample.spans.within(usable))

    def calibrate(self, wanted: Manifest, origins: Sequence[Origin], progress: Progress) -> Calibration:
        """Mean and step of every channel from the first samples by id, as many as an extraction takes."""
        ends = np.cumsum([origin.num_tokens for origin in origins])
        chosen = origins[: int(np.searchsorted(ends, CALIBRATION_TOKENS)) + 1]
        total, done = sum(origin.num_tokens for origin in chosen), 0
        moments = {
            (layer, kind): ChannelMoments.zeros(group.num_kv_heads, group.dim(kind))
            for group in wanted.groups
            if group.quantizer("key")
            for layer in group.layers
            for kind in KINDS
        }
        for run in cut(chosen, lambda origin: origin.num_tokens):
            progress(done, total)
            indices = [origin.index for origin in run]
            samples = self._samples(indices)
            counted = calibration_mask([len(sample.input_ids) for sample in samples])
            counted &= _counted(samples)
            named = [
                (self._store.samples.ids[index], len(sample.input_ids)) for index, sample in zip(indices, samples, strict=True)
            ]
            for layer, *sides in self._layers(indices, samples):
                for kind, values in zip(KINDS, sides, strict=True):
                    if (layer, kind) in moments:
                        refuse_broken_sample(values, named, layer, kind, self._store.location)
                        moments[layer, kind].add(values[counted])
            done += sum(origin.num_tokens for origin in run)
        calibration = fit_groups(wanted.groups, moments)
        if not self._settings.accept_fidelity:
            self._try(Trial(wanted, calibration), chosen)
        return calibration

    def _try(self, trial: Trial, origins: Sequence[Origin]) -> None:
        """Encode what the calibration was fitted on, and refuse a codec that loses it."""
        for run in cut(origins, lambda origin: origin.num_tokens):
            indices = [origin.index for origin in run]
            samples = self._samples(indices)
            for layer, *sides in self._layers(indices, samples):
                for kind, values in zip(KINDS, sides, strict=True):
                    trial.add(layer, kind, values)
            trial.end(_counted(samples), [(origin.id, origin.num_tokens) for origin in run])
        trial.refuse_lossy()

    def convert(self, writer: ShardWriter, store: Store, members: Sequence[Member], commit: Commit) -> None:
        """Put samples of one shard of the source into a writer."""
        indices = [origin.index for origin, _ in members]
        samples = self._samples(indices)
        batch = store.read(indices, layers=())
        for (_, offset), sample, first in zip(members, samples, batch.cu_seqlens, strict=False):
            beside = {
                name: np.where(sample.source < 0, name == "loss_mask", array[first + sample.source]).astype(np.uint8)
                for name, array in batch.beside.items()
            }
            if not self.same_tokens:
                beside["kv_mask"] = sample.spans.kept.astype(np.uint8)
            writer.put_tokens(offset, sample.input_ids.astype(np.int32), beside)
        spans = [(offset, origin.num_tokens) for origin, offset in members]
        for layer, key, value in self._layers(indices, samples):
            measured = writer.put(layer, spans, key, value, commit.fidelity[str(layer)])
            if not self._settings.accept_fidelity:
                measures = {(layer, kind): of_kind for kind, of_kind in measured.items()}
                refuse_lossy(
                    writer.manifest, measures, _counted(samples), [(origin.id, origin.num_tokens) for origin, _ in members]
                )

    def _layers(self, indices: Sequence[int], samples: Sequence[AlignedSample]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Keys and values of each layer for the student's tokens of these samples, concatenated."""
        for layer in self._spec.layer_numbers:
            batch = self._store.read(indices, [layer])
            key, value = torch.from_numpy(batch.key[0]), torch.from_numpy(batch.value[0])
            if not self.same_tokens:
                bounds = list(zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist(), samples, strict=False))
                key, value = (
                    torch.cat([sample.spans.apply(side[first:last]) for first, last, sample in bounds]) for side in (key, value)
                )
            if self.fit is not None:
                key, value = self.fit.maps[layer].project(key, value)
            elif self.alignment.baked:
                key, value = self.alignment.project(layer, key, value)
            yield layer, key.numpy(), value.numpy()
