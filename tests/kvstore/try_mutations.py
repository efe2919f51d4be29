"""Tries changed stores, each in a process of its own with 4 GiB of address space and ten seconds; started by `test_mutations`.

    python -m tests.kvstore.try_mutations STORE FOLDER FIRST COUNT

Prints a line of JSON for each. The processes are forked, because importing takes longer than trying.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from kvstore import KVStoreError, open_store
from kvstore.arrays import read_calibration
from kvstore.describe import describe
from kvstore.drop import read_dropped
from kvstore.verify import verify_store
from tests.kvstore.mutations import mutate

ADDRESS_SPACE_BYTES, LIMIT_S = 4 * 2**30, 10.0
_TOLD_ONLY = ("created", "kvpipe_version", "fidelity", "gate", "quarantined", "complete", "parts")
"""What a store says of its own making: nothing else in it tells whether that is true, and no number read depends on it."""


def snapshot(path: Path) -> dict[str, str]:
    """Everything a reader gets from a store, by name."""
    store = open_store(path)
    samples = store.samples
    columns = ("ids", "source", "text", "shard", "token_start", "num_tokens", "crc32c", "count")
    found: dict[str, Any] = {name: getattr(samples, name) for name in columns}
    found = {name: value if isinstance(value, list) else value.tolist() for name, value in found.items()}
    found["length"] = len(store)
    for index in range(len(store)):
        batch = store.read([index])
        found[f"sample {index}"] = [array.tobytes() for array in (batch.key, batch.value, batch.input_ids)]
        found[f"token arrays {index}"] = {name: array.tobytes() for name, array in batch.beside.items()}
    found["learnt"] = store.count_learnt().tolist()
    found["compared"] = store.count_compared().tolist()
    found["summary"] = samples.summary.to_pylist()
    calibration = read_calibration(store.storage, store.manifest)
    found["calibration"] = [
        (group, kind, *(array.tobytes() for array in arrays))
        for group, kinds in sorted(calibration.items())
        for kind, arrays in sorted(kinds.items())
    ]
    for name, folder in (("tokenizer", store.tokenizer_path), ("projection", store.projection_path)):
        files = sorted(folder.rglob("*")) if folder else []
        found[name] = [(file.name, file.read_bytes()) for file in files if file.is_file()]
    found["dropped"] = read_dropped(store.storage)
    found["spec"], found["teacher"] = store.spec.to_json(), store.manifest.teacher.to_json()
    found["described"] = {
        name: value for name, value in describe(store).items() if name not in (*_TOLD_ONLY, "path", "fingerprints")
    }
    return {name: hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest() for name, value in found.items()}


def try_one(path: Path, whole: dict[str, str]) -> tuple[str, str]:
    """What comes of verifying and reading a store: outcome and reason."""
    try:
        report = verify_store(str(path), deep=True)
        told = report.problems[0].message if report.problems else ""
    except KVStoreError as error:
        report, told = None, str(error)
    except BaseException as error:
        return "other exception", _named(error)
    try:
        found = snapshot(path)
    except KVStoreError as error:
        if report is not None and report.ok:
            return "refused, though verified", str(error)
        return "refused", told
    except BaseException as error:
        return "other exception", _named(error)
    wrong = [name for name in whole if found.get(name) != whole[name]]
    if not wrong and found.keys() == whole.keys():
        return "same", told
    return ("silent", ", ".join(wrong[:5])) if report is not None and report.ok else ("reported", told)


def _named(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"


def in_a_process(path: Path, whole: dict[str, str], answer: Path) -> tuple[str, str]:
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            answer.write_text(json.dumps(try_one(path, whole)))
        finally:
            os._exit(0)
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if answer.exists():
                outcome, reason = json.loads(answer.read_text())
                return outcome, reason
            return "death", f"status {status}"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang", ""


def main() -> None:
    store, folder, first, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    folder.mkdir()
    answer = folder / "answer.json"
    shutil.copytree(store, folder / "whole")
    child = os.fork()
    if child == 0:  # tensorstore's threads must not be in the process that forks
        answer.write_text(json.dumps(snapshot(folder / "whole")))
        os._exit(0)
    os.waitpid(child, 0)
    whole = json.loads(answer.read_text())
    for seed in range(first, first + count):
        copy = folder / "store"
        shutil.rmtree(copy, ignore_errors=True)
        answer.unlink(missing_ok=True)
        shutil.copytree(folder / "whole", copy)
        change = mutate(copy, seed)
        outcome, reason = in_a_process(copy, whole, answer)
        print(json.dumps({"seed": seed, "change": change, "outcome": outcome, "reason": reason}), flush=True)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
