"""Experiment trackers: started before the first step or refused, and never the end of a run afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pipeline.models.resolve import one_line


def make_trackers(names: Sequence[str], say: Callable[[str], None]) -> list[Tracker]:
    """The trackers of transformers of these names.

    Raises:
        ValueError: there is none of that name, or its package is not installed.
    """
    return [Tracker(name, _make(name), say) for name in dict.fromkeys(names)]


def _make(name: str) -> TrainerCallback:
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"report_to: got {name!r}, expected one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
    try:
        return INTEGRATION_TO_CALLBACK[name]()
    except Exception as error:  # each package has errors of its own
        raise ValueError(f"report_to: {name} cannot be used here ({one_line(error)}); install it, or leave it out") from error


class Tracker:
    """A tracker that is refused where it cannot start, and left out for the rest of a run where it fails later."""

    def __init__(self, name: str, callback: TrainerCallback, say: Callable[[str], None]) -> None:
        self._name, self._callback, self._say = name, callback, say
        self._failed = False

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return functools.partial(self._call, event)

    def _call(self, event: str, *args: Any, **kwargs: Any) -> Any:
        if self._failed:
            return None
        try:
            return getattr(self._callback, event)(*args, **kwargs)
        except Exception as error:  # each package has errors of its own
            if event in ("on_init_end", "on_train_begin"):
                raise ValueError(
                    f"report_to: {self._name} cannot start ({one_line(error)}); log in, set it to work offline, or leave it out"
                ) from error
            self._failed = True
            self._say(
                f"report_to: {self._name} failed and gets no more of this run ({one_line(error)}); metrics.jsonl has everything"
            )
            return None
