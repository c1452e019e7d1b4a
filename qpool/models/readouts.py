"""What is read out of a state. Each is a function of a state and its modes: (batch, features).

All are differentiable, and expectation values: no noise is added. hbar is Strawberry Fields' (2
unless set): the vacuum's x has variance hbar / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from workers.errors import ConfigurationError, nearest


def positions(state: Any, modes: int) -> Any:
    """Mean of the position quadrature x of each mode: ``modes`` features."""
    return _columns(state.quad_expectation(mode)[0] for mode in range(modes))


def quadratures(state: Any, modes: int) -> Any:
    """Means of x and of p of each mode, x_0, p_0, x_1, ...: 2 ``modes`` features."""
    return _columns(
        state.quad_expectation(mode, phi)[0] for mode in range(modes) for phi in (0.0, math.pi / 2)
    )


def photons(state: Any, modes: int) -> Any:
    """Mean photon number of each mode: ``modes`` features."""
    return _columns(state.mean_photon(mode)[0] for mode in range(modes))


READOUTS: dict[str, Callable[[Any, int], Any]] = {
    "positions": positions,
    "quadratures": quadratures,
    "photons": photons,
}


def find(name: str) -> Callable[[Any, int], Any]:
    """The read-out of that name; ConfigurationError names the nearest."""
    try:
        return READOUTS[name]
    except (KeyError, TypeError):
        raise ConfigurationError(
            f"unknown readout {name!r}: {nearest(str(name), tuple(READOUTS))}"
        ) from None


def _columns(values: Any) -> Any:
    """Expectation values, (batch,) or scalar each, as columns: (batch, number of values)."""
    columns = tf.stack([tf.math.real(value) for value in values], axis=-1)
    return columns if columns.shape.rank == 2 else columns[tf.newaxis]
