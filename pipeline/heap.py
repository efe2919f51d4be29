"""Giving free memory back to the system: each thread of a pipeline allocates from a heap of its own, and what it frees there stays.

Knows nothing of kvpipe.
"""

from __future__ import annotations

import psutil


def trim_heap() -> None:
    """Give back what is free; to be called when much has just been let go of. Does nothing where the C library cannot."""
    if hasattr(psutil, "heap_trim"):
        psutil.heap_trim()
