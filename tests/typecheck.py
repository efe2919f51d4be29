"""beartype for jaxtyping's import hook: a function gets its checks at its first call, a nested one those of its likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beartype as _beartype

Checked = Callable[..., Any]

_made: dict[Any, Checked] = {}
"""By all that a check depends on."""


def beartype(function: Checked) -> Checked:
    """Check the arguments of a function that jaxtyping makes: it has a function's signature, an empty body and no closure.

    Making a check takes milliseconds. Most functions of a module are not called in most processes, and a function defined inside
    another is a new one at every call of that: both would take more time than the tests do.
    """
    checked: Checked | None = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = _check_of(function)
        return checked(*args, **kwargs)

    return check


def _check_of(function: Checked) -> Checked:
    key = (function.__module__, function.__qualname__, function.__code__, *function.__annotations__.items())
    try:
        found = _made.get(key)
    except TypeError:  # an annotation without a hash
        return _beartype.beartype(function)
    if found is None:
        found = _made[key] = _beartype.beartype(function)
    return found
