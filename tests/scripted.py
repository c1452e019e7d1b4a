"""A program as scripts and notebooks have it: functions, and globals that they use."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from workers import sf_compat

sf_compat.install()
import strawberryfields as sf  # noqa: E402
from strawberryfields.ops import Dgate, Kgate, Sgate  # noqa: E402

engine = sf.Engine("tf", backend_options={"cutoff_dim": 4})
program = sf.Program(1)
names = ["z", "w0", "w1"]
with program.context as q:
    z_, w0_, w1_ = (program.params(name) for name in names)
    Dgate(z_) | q[0]
    Sgate(w0_) | q[0]
    Kgate(w1_) | q[0]
    Dgate(w0_) | q[0]

weights = tf.Variable([0.2, 0.3])
shifts = {"photons": [tf.Variable(0.1)]}
unused = tf.Variable(1.0)
data = np.linspace(-0.5, 0.5, 4).astype("float32")
targets = np.sin(3 * data)


def run(x: Any, w: Any) -> Any:
    if engine.run_progs:
        engine.reset()
    return engine.run(program, args=dict(zip(names, (x, w[0], w[1]), strict=True))).state


def circuit(z: Any, w: Any) -> Any:
    """The photons of each sample, of the weights that it is given."""
    return tf.stack([[run(z[i, 0], w).mean_photon(0)[0]] for i in range(z.shape[0])])


def generate(z: Any) -> Any:
    """The same, of the module's weights."""
    return circuit(z, weights) + shifts["photons"][0]


kept: list[Any] = []
last: Any = None


def leaving(z: Any) -> Any:
    """Leaves what it has made in its module."""
    global last
    last = run(z[0, 0], weights)
    kept.append(tf.math.real(last.trace()))
    return generate(z)


def of_labels(inputs: Any) -> Any:
    """A batch of two, and labels in a list beside it."""
    z, labels = inputs
    return generate(z) * tf.cast(labels, tf.float32)[:, None]


def weights_first(w: Any, x: Any) -> Any:
    return circuit(x, w)


def fit(parameters: Any) -> Any:
    """A cost over data of the module, one circuit for each."""
    loss = 0.0
    for x, y in zip(data, targets, strict=True):
        loss += (run(tf.constant(x), parameters).quad_expectation(0)[0] - y) ** 2
    return loss / len(data)


def cost(parameters: Any) -> Any:
    """Of weights alone, two numbers or a variable of two: there is no batch."""
    return 1 - run(tf.constant(0.3), parameters).fock_prob([1])


def loss_of_the_modules() -> Any:
    """As ``optimizer.minimize`` takes it."""
    return cost(weights)


def closing(scale: float) -> Any:
    """A function with a variable of its own around it."""
    own = tf.Variable(scale)

    def scaled(z: Any) -> Any:
        return own * generate(z)

    return scaled


class Gan:
    def __init__(self) -> None:
        self.scale = tf.Variable(1.5)

    def generate(self, z: Any, power: int = 1) -> Any:
        return self.scale**power * generate(z)


class Gate:
    """A cost of plain values alone. Its engine has the name of the module's."""

    def __init__(self) -> None:
        self.engine = sf.Engine("tf", backend_options={"cutoff_dim": 3, "batch_size": 2})
        self.weights = tf.Variable([0.2, 0.3])

    def cost(self, success: float | None, factor: float, norms: list[int]) -> Any:
        if self.engine.run_progs:
            self.engine.reset()
        args = dict(zip(names, ([0.1, 0.2], *tf.unstack(self.weights)), strict=True))
        ket = self.engine.run(program, args=args).state.ket()
        kept = tf.boolean_mask(ket, [True, False, True], axis=1)
        cost = factor * tf.math.real(tf.norm(kept, norms[0])) ** 2
        return cost if success is None else cost - success


def handed(parameters: Any, symbols: Any, of_others: Any, of_whom: Any, target: Any) -> Any:
    """A cost that is handed what it needs: symbols, an engine, a program."""
    if of_others.run_progs:
        of_others.reset()
    values = tf.concat([[0.1], tf.reshape(parameters, [-1])], 0)
    args = {p.name: w for p, w in zip(symbols.flatten(), values)}  # noqa: B905
    ket = of_others.run(of_whom, args=args).state.ket()
    return tf.reduce_sum(tf.abs(ket - target)) ** 2


def latent(rows: int) -> tf.Tensor:
    draws = np.random.default_rng(rows).normal(0, 0.4, (rows, 1))
    return tf.constant(draws.astype("float32"))


class OfTheModule:
    """Scaled by a variable of the module, which the model does not name among its own."""

    def __init__(self) -> None:
        self.own = tf.Variable(2.0)
        self.trainable_variables = [self.own]

    def __call__(self, z: Any) -> Any:
        return self.own * z * weights[0]


def loss(samples: Any) -> Any:
    """By a critic that is the module's."""
    return tf.reduce_sum(samples, -1) * weights[1]
