"""Strawberry Fields' TensorFlow backend, with gates that are traced, batched and fused.

Owns the backend's interface: modes, and the states that are handed out. What is asked of them is
collected by its circuit (``deferred``), and computed when the state is wanted.
"""

from __future__ import annotations

import copy
from typing import Any

import tensorflow as tf
from strawberryfields.backends import ModeMap
from strawberryfields.backends.tfbackend.backend import TFBackend
from strawberryfields.backends.tfbackend.states import FockStateTF

from workers.engine.deferred import TracedCircuit
from workers.engine.state import TracedFockState
from workers.errors import StatefulCallError


class TracedTFBackend(TFBackend):
    """A ``TFBackend`` that can be traced, compiled and differentiated twice.

    The same interface, states and conventions (hbar = 2 within the backend). What differs:

    * The batch is whatever leading axis the gates' arguments have, 1 included; the state has a
      batch axis as soon as one argument has. ``batch_size`` may be given too, and is then held to.
    * Scalar arguments stay scalars: the matrix of such a gate is built once for all samples.
    * Modes and samples that are post-selected are each projected onto their own number, as if one
      after another: Strawberry Fields takes the first sample's for all samples, and the wrong axes
      from the second mode on.
    * Gates run when the state is needed, all together; eagerly, as one cached ``tf.function``.
    """

    #: Why a state that was asked for is not there, if so.
    why_no_state = ""

    def begin_circuit(self, num_subsystems: int, **kwargs: Any) -> None:
        """See ``TFBackend.begin_circuit``; ``batch_size=1`` is possible too."""
        if kwargs.get("cutoff_dim") is None:
            raise ValueError("Argument 'cutoff_dim' must be passed to the TensorFlow backend")
        self._modemap = ModeMap(num_subsystems)
        self._init_modes = num_subsystems
        self.circuit = TracedCircuit(
            num_subsystems,
            kwargs["cutoff_dim"],
            kwargs.get("pure", True),
            kwargs.get("batch_size"),
            kwargs.get("dtype", tf.complex64),
        )

    def reset(self, pure: bool = True, **kwargs: Any) -> None:
        """See ``TFBackend.reset``; a backend that has not begun a circuit is blank already."""
        if self.circuit is not None:
            super().reset(pure, **kwargs)

    def go_on_from(self, stock: TFBackend) -> None:
        """Take over the modes and the state of a backend of Strawberry Fields' own."""
        theirs = stock.circuit
        self.begin_circuit(
            theirs.num_modes,
            cutoff_dim=theirs.cutoff_dim,
            batch_size=theirs._batch_size,
            dtype=theirs.dtype,
        )
        self._modemap, self._init_modes = copy.deepcopy(stock._modemap), stock._init_modes
        self.circuit._state_is_pure = theirs.state_is_pure
        self.circuit._update_state(theirs._state)

    def draw_numbers(self, modes: list[int]) -> tf.Tensor:
        """Photon numbers for ``measure_fock`` to select, by their joint distribution."""
        return self.circuit.draw_numbers(self._remap_modes(modes))

    def draw_quadrature(self, phi: Any, mode: int) -> tf.Tensor:
        """A value for ``measure_homodyne`` to select, by the quadrature's distribution."""
        return self.circuit.draw_quadrature(phi, self._remap_modes(mode))

    def state(self, modes: Any = None, **kwargs: Any) -> FockStateTF:
        """See ``TFBackend.state``."""
        if self.why_no_state:
            raise StatefulCallError(self.why_no_state)
        found = super().state(modes, **kwargs)
        return TracedFockState(
            found.data,
            found.num_modes,
            found.is_pure,
            found.cutoff_dim,
            batched=found.batched,
            mode_names=list(found.mode_names.values()),
            dtype=found.dtype,
        )
