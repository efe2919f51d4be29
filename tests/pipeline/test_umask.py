"""Who can read what kvpipe writes: whoever the umask lets, and the same of every file."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore import open_store
from tests.pipeline.conftest import Bench
from tests.processes import KVPIPE, Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=["022", "027", "077"])
def test_every_file_of_stores_runs_and_exports_has_the_permissions_that_the_umask_leaves(
    umask: int, bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "all").mkdir()
    out, maps = tmp_path / "all", tmp_path / "all" / "maps.safetensors"
    commands = [
        bench.extract(out / "store"),
        bench.append(out / "store"),
        ["recode", str(out / "store"), "--codec", "q4z", "--out", str(out / "recoded")],
        ["fit", "--store", str(out / "store"), "--student", str(bench.student), "--out", str(maps)],
        [*bench.align(out / "aligned", out / "store"), "--fit", str(maps)],
        bench.train(out / "run", out / "store"),
        ["report", str(out / "run"), "--out", str(out / "report")],
        ["drop", str(out / "store"), "--ids", str(tmp_path / "ids.txt")],
        ["repair", str(out / "store")],
    ]
    out.chmod(0o777 & ~umask)
    for arguments in commands:
        if arguments[0] == "drop":
            (tmp_path / "ids.txt").write_text(f"{open_store(out / 'store').samples.ids[0]}\n")
        done = Process(f"import os; os.umask({umask}); {KVPIPE}", *arguments).finish()
        assert done.returncode == 0, (arguments, done.stderr)
    found = [out, *out.rglob("*")]
    wrong = [
        (oct(path.stat().st_mode & 0o777), path.relative_to(out).as_posix())
        for path in found
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    ]
    assert not wrong, wrong
    print(f"\numask {umask:03o}: {len(found)} files and folders of stores, maps, runs and reports, all as it leaves them")
