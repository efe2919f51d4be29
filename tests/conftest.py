"""Settings every test shares: no network, no telemetry, one thread unless a test asks for more."""

from __future__ import annotations

import os
import sys

# Tiny models lose by a second thread, and much where several tests share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers run at a niceness of 15, at which they wait for every other test.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "--benchmark-only" not in sys.argv:  # checking takes time of what is timed
    from tests import typecheck  # noqa: F401  # first: it checks what is imported from then on
from tests.s3 import bucket, proxy, s3_server

__all__ = ["bucket", "proxy", "s3_server"]
