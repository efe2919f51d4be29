"""Axes are checked at run time: beartype under jaxtyping's import hook, in the modules that annotate axes.

mypy knows all other types, and checks at every call of everything would double the time of the suite.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beartype as _beartype
from jaxtyping import AbstractArray, install_import_hook

_ROOT = Path(__file__).parents[1]

Checked = Callable[..., Any]

_made: dict[Any, Checked] = {}
"""By all that a check depends on."""


def beartype(function: Checked) -> Checked:
    """Check the arguments of a function that jaxtyping makes: it has a function's signature, an empty body and no closure.

    The check is made at the first call, and a nested function gets that of its likes. Making one takes milliseconds; most functions
    of a module are not called in most processes, and a function defined inside another is a new one at every call of that: both
    would take more time than the tests do.
    """
    checked: Checked | None = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = _check_of(function)
            # Of the two made for each function, the one that checks what it returns has all annotations; in the other that is Any.
            if function.__annotations__.get("return") is not Any and not any(map(_has_axes, function.__annotations__.values())):
                _leave_alone(function)
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


def _has_axes(annotation: Any) -> bool:
    """Whether an annotation is, or has somewhere inside it, an array type of jaxtyping."""
    if isinstance(annotation, str) or (isinstance(annotation, type) and issubclass(annotation, AbstractArray)):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return False
    return any(_has_axes(part) for part in typing.get_args(annotation))


def _leave_alone(function: Checked) -> None:
    """From its second call on, a function without axes runs as if it had never been wrapped."""
    found: Any = sys.modules[function.__module__]
    for name in function.__qualname__.split("."):
        found = vars(found).get(name)
        if found is None:  # defined inside another function
            return
    for wrapped in (
        found,
        getattr(found, "__func__", None),
        *(getattr(found, kind, None) for kind in ("fget", "fset", "fdel")),
    ):
        if isinstance(wrapped, types.FunctionType):
            wrapped.__no_type_check__ = True


def _annotated() -> list[str]:
    """The modules that annotate axes."""
    paths = [path for package in ("kvstore", "pipeline", "training") for path in sorted((_ROOT / package).rglob("*.py"))]
    with_axes = [path for path in paths if "from jaxtyping" in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(_ROOT).with_suffix("").parts) for path in with_axes]


install_import_hook(_annotated(), f"{__name__}.beartype")
