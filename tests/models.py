"""Models as users write them. Workers import this module too."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from workers import sf_compat

sf_compat.install()
import strawberryfields as sf  # noqa: E402
from strawberryfields import ops  # noqa: E402


class Scale:
    """The smallest model: z * w."""

    def __init__(self, value: float = 2.0, dtype: Any = tf.float32) -> None:
        self.w = tf.Variable(value, dtype=dtype)
        self.trainable_variables = [self.w]

    def __call__(self, z: Any) -> Any:
        return z * self.w


class Displaced:
    """A plain class with an SF program and one engine, looping over its batch: stock SF.

    Two modes, displacement encoding, every kind of gate; mean quadratures out.
    """

    def __init__(self, dtype: Any = tf.complex64, cutoff: int = 5, seed: int = 0) -> None:
        real = dtype.real_dtype
        rng = np.random.default_rng(seed)
        self.w = tf.Variable(rng.uniform(-0.4, 0.4, 6), dtype=real, name="w")
        self.kerr = tf.Variable(0.1, dtype=real, name="kerr")
        self.engine = sf.Engine("tf", backend_options={"cutoff_dim": cutoff, "dtype": dtype})
        self.program = sf.Program(2)
        names = [*(f"w{n}" for n in range(6)), "k", "z0", "z1"]
        p = dict(zip(names, self.program.params(*names), strict=True))
        with self.program.context as q:
            ops.Xgate(p["z0"]) | q[0]
            ops.Xgate(p["z1"]) | q[1]
            ops.Sgate(p["w0"], p["w1"]) | q[0]
            ops.BSgate(p["w2"], p["w3"]) | (q[0], q[1])
            ops.Dgate(p["w4"], p["w5"]) | q[1]
            ops.Rgate(2 * p["w5"] + p["w0"]) | q[0]
            ops.Kgate(p["k"]) | q[0]
        self.trainable_variables = [self.w, self.kerr]
        self.note = "an attribute like any other"

    def __call__(self, z: Any) -> Any:
        w = {f"w{n}": self.w[n] for n in range(6)} | {"k": self.kerr}
        rows = []
        for row in tf.unstack(z):
            if self.engine.run_progs:
                self.engine.reset()
            args = {**w, "z0": row[0], "z1": row[1]}
            state = self.engine.run(self.program, args=args).state
            rows.append(tf.stack([state.quad_expectation(mode)[0] for mode in range(2)]))
        return tf.stack(rows)


class FixedBatch(tf.Module):
    """An engine built with a batch_size: the model takes that many rows, no more and no fewer."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.w = tf.Variable(0.3, name="w")
        self.rows = rows
        self.engine = sf.Engine("tf", backend_options={"cutoff_dim": 4, "batch_size": rows})
        self.program = sf.Program(1)
        z, w = self.program.params("z", "w")
        with self.program.context as q:
            ops.Xgate(z) | q[0]
            ops.Sgate(w) | q[0]

    def __call__(self, z: Any) -> Any:
        if self.engine.run_progs:
            self.engine.reset()
        assert z.shape[0] == self.rows
        state = self.engine.run(self.program, args={"z": z[:, 0], "w": self.w}).state
        return state.quad_expectation(0)[0][:, tf.newaxis]


class Several(tf.Module):
    """Nested outputs, complex among them, a grid, labels, and an unused variable."""

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable([1.0, -2.0], name="w")
        self.c = tf.Variable(1.0 + 0.5j, dtype=tf.complex64, name="c")
        self.unused = tf.Variable(3.0, name="unused")
        self.shift = tf.Variable(0.5, trainable=False, name="shift")

    def __call__(self, z: Any) -> Any:
        return {
            "real": tf.sin(z * self.w) + self.shift,
            "complex": tf.cast(z, tf.complex64) * self.c,
        }

    def generate_batch(self, z: Any, grid: Any, return_norm: bool = False) -> Any:
        assert isinstance(grid, np.ndarray)
        density = tf.exp(-((z[:, :1] * self.w[0] - tf.constant(grid, z.dtype)[None, :]) ** 2))
        if return_norm:
            return density, tf.reduce_sum(density, axis=1)
        return density

    def conditional(self, z: Any, labels: Any, scale: float = 1.0) -> Any:
        return scale * z * tf.gather(self.w, labels)[:, tf.newaxis]


class Generating:
    """Only ``generate``, and ``latent_dim``."""

    latent_dim = 3

    def __init__(self) -> None:
        self.w = tf.Variable(tf.ones((3, 2)))
        self.trainable_variables = (self.w,)

    def generate(self, z: Any) -> Any:
        return z @ self.w


class Drawing:
    """Draws from TensorFlow, NumPy and a generator of its own in its call."""

    def __init__(self) -> None:
        self.w = tf.Variable(1.0)
        self.rng = np.random.default_rng(5)
        self.trainable_variables = [self.w]

    def __call__(self, z: Any) -> Any:
        noise = tf.random.normal(z.shape) + np.random.normal() + self.rng.normal()
        return self.w * (z + tf.cast(noise, z.dtype))


class Raising(Scale):
    """Raises for negative input."""

    def __call__(self, z: Any) -> Any:
        if float(tf.reduce_min(z)) < 0:
            raise ArithmeticError("negative latent")
        return super().__call__(z)


class Killing(Scale):
    """Ends its process by a signal when a row is negative, as often as ``lives`` files allow."""

    def __init__(self, folder: str, deaths: int, how: int = signal.SIGKILL) -> None:
        super().__init__()
        self.folder = folder
        self.deaths = deaths
        self.how = int(how)

    def __call__(self, z: Any) -> Any:
        if float(tf.reduce_min(z)) < 0:
            for n in range(self.deaths):
                try:
                    os.close(os.open(f"{self.folder}/{n}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.kill(os.getpid(), self.how)
        return super().__call__(z)


class Locked(Scale):
    """Holds something that cannot travel."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = {"inner": [threading.Lock()]}


class Counting(tf.Module):
    """Changes a non-trainable variable in its call."""

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(1.0)
        self.seen = tf.Variable(0.0, trainable=False, name="seen")

    def __call__(self, z: Any) -> Any:
        self.seen.assign_add(1.0)
        return z * self.w


class Net(keras.Model):
    """A subclassed Keras model without get_config, with dropout."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(4, activation="tanh")
        self.dropout = keras.layers.Dropout(0.5, seed=3)
        self.out = keras.layers.Dense(width)

    def call(self, z: Any, training: bool = False) -> Any:
        return self.out(self.dropout(self.hidden(z), training=training))


class LooksAtNumbers:
    """A branch on a number: it cannot be traced."""

    def __init__(self) -> None:
        self.w = tf.Variable(2.0)
        self.trainable_variables = [self.w]

    def __call__(self, z: Any) -> Any:
        rows = [self.w * row if float(row[0]) > 0 else row for row in z]
        return tf.stack(rows)


class Placed(tf.Module):
    """Tells which virtual CPU device it lies on; on the first one it computes for longer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(1.0)

    def __call__(self, z: Any) -> Any:
        number = int(self.w.device.rpartition(":")[2])
        if number == 0:
            for _ in range(20):
                tf.linalg.matmul(tf.ones((200, 200)), tf.ones((200, 200)))
        return self.w * z + float(number)
