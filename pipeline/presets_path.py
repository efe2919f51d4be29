"""Where the shipped TOML files are. Knows neither their fields nor who reads them."""

from __future__ import annotations

from pathlib import Path


def configs_dir() -> Path:
    """Folder of `teachers/`, `students/`, `recipes/` and `tiny/`: inside the package in a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else packaged.parent.parent / "configs"
