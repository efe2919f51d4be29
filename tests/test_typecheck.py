"""The run-time checks of axes are able to fail, at every call."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from jaxtyping import Float32, TypeCheckError, jaxtyped

from tests.typecheck import beartype


@jaxtyped(typechecker=beartype)
def returns(shape: tuple[int, ...]) -> Float32[np.ndarray, "row row"]:
    return np.zeros(shape, np.float32)


@jaxtyped(typechecker=beartype)
def takes(left: Float32[np.ndarray, "row"], right: Float32[np.ndarray, "row"]) -> None:
    """Nothing."""


@jaxtyped(typechecker=beartype)
def without_axes(name: Literal["first"] | str) -> str:
    return name


@pytest.mark.parametrize("attempt", [1, 2])
def test_returned_axes_are_checked(attempt: int) -> None:
    returns((2, 2))
    with pytest.raises(TypeCheckError, match="return value"):
        returns((2, 3))


@pytest.mark.parametrize("attempt", [1, 2])
def test_taken_axes_are_checked(attempt: int) -> None:
    one, two = np.zeros(1, np.float32), np.zeros(2, np.float32)
    takes(two, two)
    with pytest.raises(TypeCheckError, match="parameters"):
        takes(one, two)


def test_a_function_without_axes_is_left_alone_from_its_second_call_on() -> None:
    without_axes("first")
    assert without_axes(2) == 2
