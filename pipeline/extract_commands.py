"""Commands around an extraction: plan it, run it, and look at it from elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from pipeline.options import EXTRACT_OPTIONS, extract_config, with_options
from pipeline.terminal import print_record, say

_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_RUNNING, _STOPPED = 3, 4


@click.command()
@with_options(EXTRACT_OPTIONS)
@_json
@click.option("--list", "list_presets", is_flag=True, help="List the teacher presets and exit.")
def extract(config: Path | None, settings: tuple[str, ...], as_json: bool, list_presets: bool, **flags: Any) -> None:
    """Run a teacher over text and store its keys and values.

    The same command again resumes where it was stopped. With other settings on the same --out it refuses and names what differs.
    'kvpipe plan' with the same arguments says beforehand what it will take, 'kvpipe status' from elsewhere how far it is.

    On SIGTERM or Ctrl-C the tasks in hand are finished, for at most 20 s (--set grace_s=60), and the exit status is 75: run the same
    command again. A second signal ends at once.
    """
    if list_presets:
        from pipeline.models import presets

        click.echo("\n".join(presets.teacher_preset_names()))
        return
    chosen = extract_config(config, settings, flags)
    from pipeline.models.resolve import resolve_model
    from pipeline.stop import Interrupted, stop_on_signals

    try:
        with stop_on_signals(chosen.grace_s, say) as stop:
            resolved = resolve_model(chosen.teacher, chosen.revision)
            from pipeline.extract import extract as run_extract

            summary = run_extract(chosen, resolved, say, stop)
    except Interrupted as error:
        say(f"{error}. The same command goes on from there")
        sys.stdout.flush()
        os._exit(os.EX_TEMPFAIL)  # a thread may still be at a task that was given up
    print_record(dataclasses.asdict(summary), as_json)


@click.command()
@with_options(EXTRACT_OPTIONS)
@_json
@click.option(
    "--trial-s",
    type=float,
    default=20.0,
    show_default=True,
    help="Seconds for which speed is measured; sizes take up to three times as long.",
)
@click.option(
    "--student-tokens-per-s",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Speed of the student for which the reading is stated.",
)
def plan(
    config: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
    trial_s: float,
    student_tokens_per_s: int,
    **flags: Any,
) -> None:
    """Say what an extraction will take: size in every codec, hours, files, disk, and what would fit if it does not.

    Takes the arguments of 'kvpipe extract' and writes nothing to --out. The teacher really runs: a few tasks of the real data, by
    the workers asked for, into a temporary folder (TMPDIR), so what is said of speed holds for this machine and these settings; a
    bucket or a slow disk at --out is not in it. Without the teacher's weights on this machine nothing is downloaded: a preset then
    gives sizes, and no time.

    Exit status 1 when the store would not fit the disk or --max-bytes.

    \b
    kvpipe plan --teacher qwen2-7b --data 'corpus/**/*.jsonl.zst' --out my-store --max-tokens 100000000
    kvpipe plan --teacher qwen2-7b --layers 6,13,20,27 --codec q4z --json
    """
    chosen = extract_config(config, settings, flags)
    from pipeline.planning.planner import plan_extraction
    from pipeline.planning.view import show_estimate

    estimate = plan_extraction(chosen, say, trial_s=trial_s, student_tokens_per_s=student_tokens_per_s)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(estimate)))
    else:
        show_estimate(estimate)
    sys.exit(1 if estimate.fits is False else 0)


@click.command()
@click.argument("store")
@click.option("--watch", is_flag=True, help="Go on until the extraction is complete or stopped.")
@click.option(
    "--every", type=click.FloatRange(min=0.5), default=5.0, show_default=True, help="Seconds between looks of --watch."
)
@click.option("--json", "as_json", is_flag=True, help="Print the state as JSON, a line for each look.")
def status(store: str, watch: bool, every: float, as_json: bool) -> None:
    """How far an extraction is: shards, tokens, speed, who is writing, what is slow, and when it ends.

    Needs nothing but the store, so it works from another terminal, from another host and on a bucket, whoever writes; it writes
    nothing itself. Claims of writers that died are shown as stale: they are in nobody's way.

    \b
    Exit status:
      0  complete
      1  no store there, or it cannot be read
      3  not complete, and somebody is writing
      4  not complete, and nobody is writing: the same extract command goes on

    \b
    kvpipe status my-store --watch
    while ! kvpipe status my-store > /dev/null; do kvpipe extract --teacher qwen2-7b --out my-store; done
    """
    from pipeline.monitor.status import StatusReader
    from pipeline.monitor.status_view import show_status

    reader = StatusReader(store)
    with show_status(as_json=as_json, live=watch) as show:
        while True:
            found = reader.read()
            show(found)
            if not watch or found.state in ("complete", "stopped"):
                break
            time.sleep(every)
    sys.exit({"complete": 0, "stopped": _STOPPED}.get(found.state, _RUNNING))
