"""The continuous-variable quantum neural network as a Strawberry Fields program.

One layer after Killoran et al., Phys. Rev. Research 1, 033063 (2019): interferometer, squeezing,
interferometer, displacement, Kerr. Owns the order of gates, the parameter blocks and their names;
``BLOCKS`` is the one place where a block's size and its gate meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers import sf_compat


@dataclass(frozen=True)
class Block:
    """Parameters of one kind within a layer.

    ``size`` gives how many there are for a number of modes; ``active`` ones change the photon
    number and start small, passive ones are angles and start anywhere.
    """

    name: str
    size: Callable[[int], int]
    active: bool


def _pairs(modes: int) -> int:
    """Beamsplitters of a rectangular interferometer (Clements et al., Optica 3, 1460, 2016)."""
    return modes * (modes - 1) // 2


#: In order of application. Two modes: 3 + 2 + 3 + 4 + 2 = 14 parameters a layer.
BLOCKS = (
    Block("theta_1", _pairs, active=False),
    Block("phi_1", _pairs, active=False),
    Block("rotation_1", lambda modes: max(1, modes - 1), active=False),
    Block("squeezing_r", lambda modes: modes, active=True),
    Block("theta_2", _pairs, active=False),
    Block("phi_2", _pairs, active=False),
    Block("rotation_2", lambda modes: max(1, modes - 1), active=False),
    Block("displacement_r", lambda modes: modes, active=True),
    Block("displacement_phi", lambda modes: modes, active=False),
    Block("kerr", lambda modes: modes, active=True),
)


def parameter_name(block: str, layer: int, index: int) -> str:
    """The name of one free parameter of the program."""
    return f"{block}_{layer}_{index}"


def build(modes: int, layers: int, encode: Callable[[Any, Any], None]) -> Any:
    """The program: ``encode(program, modes' registers)``, then ``layers`` layers.

    Its free parameters are those that ``encode`` makes and, for each layer and block,
    ``parameter_name(block, layer, index)``.
    """
    sf_compat.install()
    import strawberryfields as sf

    program = sf.Program(modes)
    with program.context as q:
        encode(program, q)
        for layer in range(layers):
            _layer(program, q, layer)
    return program


def _layer(program: Any, q: Any, layer: int) -> None:
    from strawberryfields import ops

    modes = len(q)
    p = {
        block.name: [
            program.params(parameter_name(block.name, layer, index))
            for index in range(block.size(modes))
        ]
        for block in BLOCKS
    }
    _interferometer(q, p["theta_1"], p["phi_1"], p["rotation_1"])
    for mode in range(modes):
        ops.Sgate(p["squeezing_r"][mode]) | q[mode]
    _interferometer(q, p["theta_2"], p["phi_2"], p["rotation_2"])
    for mode in range(modes):
        ops.Dgate(p["displacement_r"][mode], p["displacement_phi"][mode]) | q[mode]
    for mode in range(modes):
        ops.Kgate(p["kerr"][mode]) | q[mode]


def _interferometer(q: Any, theta: list[Any], phi: list[Any], rotation: list[Any]) -> None:
    from strawberryfields import ops

    modes = len(q)
    pair = 0
    for column in range(modes):
        for first in range(column % 2, modes - 1, 2):
            ops.BSgate(theta[pair], phi[pair]) | (q[first], q[first + 1])
            pair += 1
    for mode, angle in enumerate(rotation):
        ops.Rgate(angle) | q[mode]
