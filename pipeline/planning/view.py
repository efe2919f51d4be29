"""An estimate as people read it: one screen on stdout."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from pipeline.monitor.reading import duration, short, size
from pipeline.planning.estimate import Estimate
from pipeline.terminal import aligned, console, in_line, shown


def show_estimate(estimate: Estimate) -> None:
    """Print what an extraction will take."""
    screen = console()
    screen.print(Text.assemble((in_line(estimate.teacher), "bold"), " -> ", (in_line(estimate.out), "bold")))
    screen.print(aligned(_estimate_lines(estimate).items()))
    screen.print(_rung_table(estimate))
    screen.print(aligned(_needs_lines(estimate).items()))
    if estimate.fits is False:
        assert estimate.chosen.total_bytes is not None
        assert estimate.room.bytes is not None
        screen.print(
            Text(
                f"DOES NOT FIT: {size(estimate.chosen.total_bytes)} where there is room for {size(max(estimate.room.bytes, 0))}. "
                + ("With one of these it would:" if estimate.alternatives else "Nothing less would fit either.")
            )
        )
        screen.print(aligned((other.arguments, size(other.total_bytes)) for other in estimate.alternatives))
    if estimate.note:
        screen.print(Text(shown(estimate.note)))


def _estimate_lines(estimate: Estimate) -> dict[str, str]:
    geometry, chosen = estimate.geometry, estimate.chosen
    lines = {}
    if estimate.num_tokens is None:
        lines["data"] = f"size not known: {estimate.how}; --max-tokens sets it"
    else:
        about = "" if estimate.is_exact else "about "
        margin = (
            "" if estimate.relative_error is None else f", give or take {estimate.relative_error:.1%} if the rest is like it"
        )
        lines["data"] = f"{about}{estimate.num_tokens:,} tokens ({estimate.how}{margin})"
    where = "the student's geometry, baked" if geometry["baked"] else "the teacher's own geometry"
    lines["geometry"] = (
        f"{len(_numbers(geometry['layers']))} of {geometry['teacher_layers']} layers in {where}; keys {geometry['key_domain'].replace('_', '-')}, "
        f"{geometry['dtype']}; {geometry['values_per_token']:,} values per token"
    )
    for kind in geometry["kinds"]:
        lines[f"- {kind['layers']}"] = (
            f"{kind['num_kv_heads']} kv heads, {kind['key_dim']} key and {kind['value_dim']} value channels; rope: {kind['rope']}"
        )
    shards = "" if chosen.shards is None else f"{chosen.shards:,} shards, {estimate.files:,} files; "
    lines["layout"] = f"{shards}shards of {estimate.shard_tokens:,} tokens in chunks of {estimate.chunk_tokens}"
    return lines


def _rung_table(estimate: Estimate) -> Table:
    table = Table("codec", "bits per value", "bytes per token", "store")
    for row, rung in enumerate(estimate.rungs):
        total = "" if rung.total_bytes is None else size(rung.total_bytes)
        table.add_row(
            f"{rung.codec} <" if row == 0 else rung.codec,
            f"{rung.bits_per_value:.2f}",
            f"{rung.bytes_per_token:,.0f}",
            total,
        )
    return table


def _needs_lines(estimate: Estimate) -> dict[str, str]:
    lines = {}
    if estimate.sized_tokens:
        margin = "" if estimate.bytes_relative_error is None else f", give or take {estimate.bytes_relative_error:.1%}"
        lines["sizes"] = f"tried on {estimate.sized_tokens:,} tokens{margin}"
    if estimate.tokens_per_s is not None and estimate.hours is None:
        lines["time"] = (
            f"{short(estimate.tokens_per_s)} tokens/s, {duration(1e6 / estimate.tokens_per_s)} for every million of tokens"
        )
    if (hours := estimate.hours) and estimate.tokens_per_s is not None:
        lines["time"] = (
            f"{duration(hours.total)}: {duration(hours.steady)} at {short(estimate.tokens_per_s)} tokens/s, start-up {hours.start_up:.0f} s, "
            f"tokenising {hours.tokenise:.0f} s, gate {hours.gate:.0f} s (tried on {hours.measured_tokens:,} tokens)"
        )
    lines["training"] = (
        f"reads {size(estimate.read_bytes_per_s)}/s at {estimate.student_tokens_per_s:,} student tokens/s, an assumption "
        "(--student-tokens-per-s)"
    )
    room, fitting = estimate.room, ""
    if estimate.tokens_that_fit is not None:
        fitting = f"; {short(estimate.tokens_that_fit)} tokens would fit"
    if room.free_bytes is not None:
        lines["disk"] = f"{size(room.free_bytes)} free{fitting}"
    if room.stored_bytes:
        lines["there"] = f"{size(room.stored_bytes)} are at --out already"
    if room.max_bytes is not None and estimate.chosen.total_bytes is not None:
        needed = estimate.chosen.total_bytes + room.slack_bytes
        lines["limit"] = (
            f"--max-bytes {room.max_bytes:,}; {needed:,} would let it finish, for a shard begins only if it fits uncompressed"
        )
    return lines


def _numbers(layers: str) -> list[int]:
    bounds = [part.split("-") for part in layers.split(",")]
    return [number for bound in bounds for number in range(int(bound[0]), int(bound[-1]) + 1)]
