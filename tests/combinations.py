"""Combinations of the values of several parameters, of which half run with every change."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def halved(*axes: Iterable[Any]) -> list[Any]:
    """Combine values, for `pytest.mark.parametrize`; every other combination runs at night.

    Each value still runs with every change, and so do any two values of different axes if there are three axes or more.
    A tuple stands for the values of as many parameters.
    """
    return [
        pytest.param(
            *(part for _, value in chosen for part in (value if isinstance(value, tuple) else (value,))),
            marks=[pytest.mark.nightly] if sum(place for place, _ in chosen) % 2 else [],
        )
        for chosen in product(*map(enumerate, axes))
    ]
