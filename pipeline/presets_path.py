"""Where the shipped TOML files are, and which of them a name means. Knows no field of theirs but the repository of a model."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Iterable
from pathlib import Path


def configs_dir() -> Path:
    """Folder of `teachers/`, `students/`, `recipes/` and `tiny/`: inside the package in a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else packaged.parent.parent / "configs"


def same_name(one: str, other: str) -> bool:
    """Whether two names of models differ in case, in - and _ and in spaces around them at most, or one of them leaves the organisation out."""
    one, other = (name.strip().casefold().replace("_", "-") for name in (one, other))
    if ("/" in one) == ("/" in other):
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """At most three of `names` that somebody who wrote `name` may have meant; the organisation and the case do not count."""
    plain = {candidate.rpartition("/")[2].casefold(): candidate for candidate in names}
    return [plain[found] for found in difflib.get_close_matches(name.rpartition("/")[2].casefold(), plain, n=3)]


def find_preset(folder: Path, name: str) -> Path | None:
    """The TOML file in `folder` that `name` means, None if there is none.

    A preset is called by its file's name or by its repository's, in any case, with - or _, with or without the organisation.

    Raises:
        ValueError: several presets have that name; they are listed.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if name in files:
        return files[name]
    found = [path for path in files.values() if any(same_name(name, spelling) for spelling in _spellings(path))]
    if len(found) > 1:
        raise ValueError(f"{name}: got the name of several presets, expected one of {', '.join(path.stem for path in found)}")
    return found[0] if found else None


@functools.cache
def _spellings(path: Path) -> tuple[str, str]:
    """A preset's own name and that of its repository, both with the organisation, which is empty where there is none."""
    repository = str(tomllib.loads(path.read_text(encoding="utf-8")).get("id", path.stem))
    organisation, _, name = repository.rpartition("/")
    return f"{organisation}/{path.stem}", f"{organisation}/{name}"
