"""How a latent vector enters the circuit. One row a strategy, each with its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers.errors import ConfigurationError, nearest


@dataclass(frozen=True)
class Encoding:
    """``width`` gives the latent_dim that a number of modes needs; ``encode`` adds the gates.

    The gates use free parameters ``z_0, z_1, ...``, one for each latent component.
    """

    width: Callable[[int], int]
    encode: Callable[[Any, Any], None]
    formula: str


def _coherent_state(program: Any, q: Any) -> None:
    from strawberryfields import ops

    for mode in range(len(q)):
        # In Cartesian parts: Dgate's polar form has no gradient at z = 0.
        ops.Xgate(program.params(f"z_{2 * mode}")) | q[mode]
        ops.Zgate(program.params(f"z_{2 * mode + 1}")) | q[mode]


def _direct_displacement(program: Any, q: Any) -> None:
    from strawberryfields import ops

    for mode in range(len(q)):
        ops.Dgate(program.params(f"z_{mode}")) | q[mode]


ENCODINGS = {
    "coherent_state": Encoding(
        lambda modes: 2 * modes,
        _coherent_state,
        "Z(z_2k+1) X(z_2k) |0> on mode k: a coherent state at x = z_2k, p = z_2k+1",
    ),
    "direct_displacement": Encoding(
        lambda modes: modes, _direct_displacement, "D(z_k) |0> on mode k"
    ),
}


def find(name: str) -> Encoding:
    """The encoding of that name; ConfigurationError names the nearest."""
    try:
        return ENCODINGS[name]
    except (KeyError, TypeError):
        raise ConfigurationError(
            f"unknown encoding_strategy {name!r}: {nearest(str(name), tuple(ENCODINGS))}"
        ) from None
