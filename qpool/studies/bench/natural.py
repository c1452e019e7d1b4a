"""The natural gradient against plain ones on one problem: preparing a single photon.

The circuit and the target are those of Arrazola et al., Quantum Sci. Technol. 4, 024004 (2019):
one mode, eight CV-QNN layers, from the vacuum to |1>. Owns the problem and the loop over steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from qpool import programs
from qpool.models import circuit
from qpool.training.natural_gradient import QuantumFisher, natural_gradient

LAYERS, CUTOFF, STEPS = 8, 8, 2000

#: Infidelities whose first crossing is reported.
GOALS = (0.1, 0.01, 0.001)


class Photon:
    """The circuit, its weights, and 1 - fidelity with |1>."""

    def __init__(self) -> None:
        self.program = circuit.build(1, LAYERS, lambda program, q: None)
        self.names = list(self.program.free_params)
        self.weights = tf.Variable(tf.zeros(len(self.names), tf.float64))

    def begin(self, seed: int) -> None:
        """Set the weights to where a run of this seed begins."""
        draws = np.random.default_rng(seed).normal(size=len(self.names))
        self.weights.assign(draws * 0.1)

    def ket(self, _: Any = None) -> Any:
        """(1, D)."""
        arguments = dict(zip(self.names, tf.unstack(self.weights), strict=True))
        return programs.state(self.program, arguments, CUTOFF, tf.complex128).data[tf.newaxis]

    @tf.function(jit_compile=True)
    def loss_and_gradient(self) -> tuple[Any, Any]:
        """1 - |<1|psi>|^2 and its gradient."""
        with tf.GradientTape() as tape:
            loss = 1 - tf.abs(self.ket()[0, 1]) ** 2
        return loss, tape.gradient(loss, self.weights)


def _descend(problem: Photon, optimizer: Any, turn: Callable[[Any], Any]) -> dict[str, Any]:
    """Steps and seconds to each of ``GOALS``; what is compiled first is not counted."""
    turn(problem.loss_and_gradient()[1])
    found: dict[str, Any] = {}
    began = time.perf_counter()
    for step in range(STEPS + 1):
        loss, gradient = problem.loss_and_gradient()
        for goal in GOALS:
            if float(loss) < goal and f"steps to {goal}" not in found:
                found[f"steps to {goal}"] = step
                found[f"seconds to {goal}"] = time.perf_counter() - began
        if float(loss) < GOALS[-1]:
            break
        optimizer.apply_gradients([(turn(gradient), problem.weights)])
    return {**found, "loss": float(loss), "seconds a step": (time.perf_counter() - began) / step}


def natural() -> dict[str, Any]:
    """Plain gradient descent, Adam and the natural gradient, each at the best of a few rates."""
    seeds = (0, 1, 2)
    contenders: dict[str, tuple[Callable[..., Any], Sequence[float], bool]] = {
        "gradient descent": (keras.optimizers.SGD, (0.03, 0.1, 0.3), False),
        "Adam": (keras.optimizers.Adam, (0.003, 0.01, 0.03), False),
        "natural gradient": (keras.optimizers.SGD, (0.05, 0.1, 0.3), True),
    }
    problem = Photon()
    fisher = QuantumFisher(problem.ket, [problem.weights])
    results: dict[str, Any] = {"case": "natural", "weights": len(problem.names)}

    @tf.function(jit_compile=True)
    def along_the_geometry(gradient: Any) -> Any:
        return natural_gradient(fisher.compute(0.0), [gradient], damping=1e-2)[0]

    for name, (make, rates, turned) in contenders.items():
        turn = along_the_geometry if turned else tf.identity
        for rate in rates:
            for seed in seeds:
                problem.begin(seed)
                results[f"{name}, rate {rate}, seed {seed}"] = _descend(problem, make(rate), turn)
    return results
