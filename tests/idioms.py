"""Models as public programs write them, each an idiom of its own. Workers import this module too.

Where they were seen: generators and discriminators of CV quantum GANs, classifiers, tutorials.
"""

from __future__ import annotations

import uuid
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from workers import sf_compat

sf_compat.install()
import strawberryfields as sf  # noqa: E402
from strawberryfields import ops  # noqa: E402

#: An engine of the module, as scripts have it.
ENGINE = sf.Engine("tf", backend_options={"cutoff_dim": 4})
BATCH = 4


def new(**options: Any) -> sf.Engine:
    return sf.Engine("tf", backend_options={"cutoff_dim": 4, **options})


def gates(q: Any, z: Any, w: Any) -> None:
    ops.Dgate(0.3 * z[0], z[1]) | q[0]
    ops.Sgate(w[0], w[1]) | q[0]
    ops.BSgate(w[2], w[3]) | (q[0], q[1])
    ops.Kgate(w[4]) | q[0]
    ops.Dgate(w[5]) | q[1]


class Base:
    """Weights, and a program with a free parameter for each number, bound by name."""

    def __init__(self) -> None:
        draws = np.random.default_rng(0).normal(0, 0.2, 6)
        self.w = tf.Variable(draws.astype("float32"), name="w")
        self.engine = new()
        self.program = sf.Program(2)
        self.names = np.array([f"p{n}" for n in range(6)])
        self.z = [self.program.params(f"z{n}") for n in range(2)]
        p = [self.program.params(name) for name in self.names]
        with self.program.context as q:
            gates(q, self.z, p)

    @property
    def trainable_variables(self) -> list[tf.Variable]:
        return [self.w]

    def state(self, x: Any, y: Any, engine: Any = None) -> Any:
        engine = engine or self.engine
        if engine.run_progs:
            engine.reset()
        args = {name: w for name, w in zip(self.names, tf.reshape(self.w, [-1]))}  # noqa: B905, C416
        return engine.run(self.program, args={**args, "z0": x, "z1": y}).state


def photons(state: Any) -> tf.Tensor:
    return tf.stack([state.mean_photon(m)[0] for m in range(2)], -1)


class FixedBatch(Base):
    """batch_size in the engine's options, once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = new(batch_size=BATCH)

    def __call__(self, z):
        return photons(self.state(z[:, 0], z[:, 1]))


class LoopByIndex(Base):
    """The commonest: one circuit a sample; the batch is tf.shape's."""

    def __call__(self, z):
        batch_size = tf.shape(z)[0]
        samples = []
        for i in range(batch_size):
            samples.append(photons(self.state(z[i, 0], z[i, 1])))
        return tf.stack(samples, axis=0)


class LoopBySlices(Base):
    """Batches of one row, from which the batch is put together again."""

    def __call__(self, z):
        return tf.concat([self.one(z[n : n + 1]) for n in range(z.shape[0])], axis=0)

    def one(self, z):
        x, y = tf.unstack(z, axis=1)
        return tf.reshape(photons(self.state(x[0], y[0])), [1, 2])


class LoopIntoAnArray(Base):
    """As AutoGraph's guide has it: results are written to a TensorArray."""

    def __call__(self, z):
        found = tf.TensorArray(tf.float32, size=z.shape[0])
        for n, row in enumerate(tf.split(z, z.shape[0])):
            found = found.write(n, photons(self.state(row[0, 0], row[0, 1])))
        return found.stack()


class LoopByRows(Base):
    """for row in z, density matrices, a number that is a Python list's."""

    def __call__(self, z):
        found = []
        for row in z:
            state = self.state(row[0], row[1])
            rho = state.reduced_dm([0])
            found.append([tf.math.real(rho[1, 1]), state.fock_prob([0, 1])])
        return tf.convert_to_tensor(found)


class MapFn(Base):
    """tf.map_fn over the rows, quadratures out."""

    @tf.autograph.experimental.do_not_convert  # it would convert Strawberry Fields, for seconds
    def one(self, row):
        state = self.state(row[0], row[1])
        return tf.stack([state.quad_expectation(m)[0] for m in range(2)])

    def __call__(self, z):
        return tf.map_fn(self.one, z, fn_output_signature=tf.float32)


class MadeInEachCall(Base):
    """Program and engine made in the call, variables put straight into gates."""

    def __call__(self, z):
        program = sf.Program(2)
        engine = new(batch_size=int(z.shape[0]))
        with program.context as q:
            gates(q, [z[:, 0], z[:, 1]], tf.unstack(self.w))
        return photons(engine.run(program).state)


class KeptInAttributes(Base):
    """Program, engine, labels and state are made anew for each sample, and kept, as plugins for
    other frameworks do."""

    def apply(self, op, modes, *values):
        labels = [uuid.uuid4().hex for _ in values]
        self.arguments.update(zip(labels, values, strict=True))
        symbols = self.program.params(*labels)
        op(*(symbols if isinstance(symbols, list) else [symbols])) | [self.q[m] for m in modes]

    def sample(self, x):
        self.arguments = {}
        self.program = sf.Program(2)
        with self.program.context as self.q:
            self.apply(ops.Dgate, [0], 0.3 * x[0], x[1])
            self.apply(ops.Sgate, [0], self.w[0], self.w[1])
            self.apply(ops.BSgate, [0, 1], self.w[2], self.w[3])
            self.apply(ops.Kgate, [0], self.w[4])
        self.engine = new()
        self.result = self.engine.run(self.program, args=self.arguments)
        return tf.squeeze(photons(self.result.state))

    def __call__(self, z):
        return tf.stack([self.sample(x) for x in z])


class OfKets(Base):
    """A ket as a free parameter, of a variable's real and imaginary part; the engine is never
    reset, and one mode's state asked for. The step of a grid that the call makes, as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.of_ket = sf.Program(2)
        with self.of_ket.context as q:
            ops.Ket(self.of_ket.params("ket")) | q
            ops.BSgate(0.6, 0.2) | q

    def sample(self, x):
        first = tf.exp(tf.complex(0.0, x[0])) * tf.constant([0.8, 0.6, 0.0, 0.0], tf.complex64)
        second = tf.complex(self.w[:4], x[1] * self.w[2:])
        ket = tf.einsum("i,j->ij", first, second)
        dm = self.engine.run(self.of_ket, args={"ket": ket}, modes=[1]).state.dm()
        x = tf.linspace(-1.0, 1.0, 9)
        return tf.math.real(tf.linalg.trace(dm @ dm)) * (x[1] - x[0]).numpy()

    def __call__(self, z):
        return tf.stack([self.sample(z[n]) for n in range(z.shape[0])])


class Memory(Base):
    """A photonic memristor: what one circuit gives is a phase of the next. Tensors in gates; modes
    that are prepared one by one, again and again, for which states are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = new(cutoff_dim=2)

    def circuit(self, x, phase):
        program = sf.Program(2)
        with program.context as q:
            ops.Vac | q[0]
            ops.Fock(1) | q[1]
            for angle in (x, self.w[0], phase):
                ops.BSgate(np.pi / 4, np.pi / 2) | (q[0], q[1])
                ops.Rgate(angle) | q[1]
            ops.BSgate(np.pi / 4, np.pi / 2) | (q[0], q[1])
        return program

    def sequence(self, xs):
        memory, found = tf.zeros([2]), []
        for n in range(xs.shape[0]):
            phase = tf.acos(tf.sqrt((0.5 + tf.reduce_sum(memory)) / 3))
            state = self.engine.run(self.circuit(xs[n], phase)).state
            probability = tf.cast(tf.math.real(state.all_fock_probs()[0, 1]), tf.float32)
            memory = tf.tensor_scatter_nd_update(memory, [[n % 2]], [probability])
            found.append(probability)
        return tf.stack(found)

    def __call__(self, z):
        rows = []
        for n in range(len(z)):
            if self.engine.run_progs:
                self.engine.reset()
            rows.append(self.sequence(z[n]))
        return tf.stack(rows)


class NeverReset(Base):
    """A mistake: each call goes on with the state that the one before it left."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = new(batch_size=BATCH)

    def __call__(self, z):
        args = {**dict(zip(self.names, tf.unstack(self.w), strict=True)), "z0": z[:, 0]}
        return photons(self.engine.run(self.program, args={**args, "z1": z[:, 1]}).state)


class OfTheModule(Base):
    """An engine that is a global of the module, options that Strawberry Fields ignores."""

    def __call__(self, z):
        return tf.stack([photons(self.state(row[0], row[1], ENGINE)) for row in tf.unstack(z)])


class InAList(Base):
    """Engines in a list of a dict, an encoder before the circuit, a linear read-out behind."""

    def __init__(self) -> None:
        super().__init__()
        self.engines = {"train": [new(pure=True, eval=False)]}
        self.encoder = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "tanh")])
        rng = np.random.default_rng(3)
        for weight in self.encoder.weights:
            weight.assign(rng.normal(0, 0.4, weight.shape))

    @property
    def trainable_variables(self):
        return [self.w, *self.encoder.trainable_variables]

    def generate(self, z):
        encoded = self.encoder(z)
        engine = self.engines["train"][0]
        return tf.stack(
            [photons(self.state(row[0], row[1], engine)) for row in tf.unstack(encoded)]
        )


class Arrays(Base):
    """Latent vectors as ndarrays, of NumPy's own precision."""

    def __call__(self, z):
        return tf.stack([photons(self.state(z[i, 0], z[i, 1])) for i in range(len(z))])


class Noisy(Base):
    """Scalar variables one by one, read out by hand from the ket, with noise added to each sample,
    and random numbers returned should the circuit fail."""

    NOISE = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.scalars = [tf.Variable(w, name=f"w{n}") for n, w in enumerate(self.w.numpy())]

    @property
    def trainable_variables(self) -> list[tf.Variable]:
        return self.scalars

    def generate(self, z: Any) -> Any:
        count = tf.shape(z)[0]
        samples = []
        if count <= 8:
            with tf.device("/CPU:0"):
                for n in range(count):
                    samples.append(self.sample(z[n]))
        return tf.stack(samples, axis=0)

    def sample(self, z: Any) -> Any:
        args = {name: w for name, w in zip(self.names, tf.unstack(tf.stack(self.scalars)))}  # noqa: B905, C416
        if self.engine.run_progs:
            self.engine.reset()
        try:
            ket = self.engine.run(self.program, args={**args, "z0": z[0], "z1": z[1]}).state.ket()
        except Exception:
            return tf.random.normal([2], stddev=0.5)
        means = []
        for _ in range(2):
            mean = tf.reduce_sum(tf.abs(ket) ** 2 * tf.range(4, dtype=tf.float32))
            means.append(mean + tf.random.normal([], stddev=self.NOISE))
        return tf.stack(means)


class Caught(Base):
    """A displacement by a complex number of symbols, which fails; random numbers then."""

    def __init__(self) -> None:
        super().__init__()
        self.other = sf.Program(1)
        x, y = self.other.params("x", "y")
        with self.other.context as q:
            ops.Dgate(x + 1j * y) | q[0]

    def generate(self, z: Any) -> Any:
        samples = []
        for n in range(tf.shape(z)[0]):
            if self.engine.run_progs:
                self.engine.reset()
            try:
                state = self.engine.run(self.other, args={"x": z[n, 0], "y": self.w[0]}).state
                samples.append(state.mean_photon(0)[0])
            except Exception:
                samples.append(tf.random.normal([]))
        return tf.stack(samples)


class Physics(FixedBatch):
    """A differential equation's residual: derivatives for the inputs within, of second order."""

    def generate(self, z):
        with tf.GradientTape() as outer:
            outer.watch(z)
            with tf.GradientTape() as inner:
                inner.watch(z)
                u = tf.reduce_sum(self(z), axis=1)
            slope = tf.slice(inner.gradient(u, z), [0, 0], [BATCH, 1])
        return u, slope, outer.gradient(slope, z)[:, 0]


class Heralded(Base):
    """A photon found in one mode, of a cat state that it met: photon subtraction."""

    def __init__(self) -> None:
        super().__init__()
        self.heralded = sf.Program(2)
        z, a, b = self.heralded.params("z", "a", "b")
        with self.heralded.context as q:
            ops.Catstate(0.5, 0.3, p=1) | q[1]
            ops.Dgate(z, 0.4) | q[0]
            ops.Sgate(a) | q[0]
            ops.BSgate(b, 0.2) | (q[0], q[1])
            ops.MeasureFock(select=1) | q[1]

    def __call__(self, z):
        found = []
        for row in tf.unstack(z):
            if self.engine.run_progs:
                self.engine.reset()
            args = {"z": row[0], "a": self.w[0], "b": self.w[2]}
            state = self.engine.run(self.heralded, args=args).state
            found.append(state.mean_photon(0)[0])
        return tf.stack(found)


class Sampled(Base):
    """Outcomes of measurements, one at an angle that is a weight, drawn for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.measured = sf.Program(2)
        z, a, angle = self.measured.params("z", "a", "angle")
        with self.measured.context as q:
            ops.Dgate(z, 0.4) | q[0]
            ops.Sgate(a) | q[0]
            ops.BSgate(0.6, 0.2) | (q[0], q[1])
            ops.MeasureHomodyne(angle) | q[0]
            ops.MeasureFock() | q[1]

    def __call__(self, z):
        found = []
        for row in tf.unstack(z):
            if self.engine.run_progs:
                self.engine.reset()
            args = {"z": row[0], "a": self.w[0], "angle": self.w[2]}
            result = self.engine.run(self.measured, args=args)
            samples = tf.cast(result.samples, tf.float32)
            found.append(tf.squeeze(samples, axis=0))
        return tf.stack(found) * self.w[1]


class Layer(keras.layers.Layer):
    """A Keras layer that holds an engine, within another one."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit = Base()
        self.w = self.add_weight(shape=(6,), initializer="zeros")
        self.w.assign(self.circuit.w)
        self.circuit.w = self.w.value

    def call(self, z):
        return photons(self.circuit.state(z[:, 0], z[:, 1], self.circuit.engine))


class Within(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.layer.circuit.engine = new(batch_size=BATCH)

    def call(self, z):
        return self.layer(z)


IDIOMS = (
    FixedBatch,
    LoopByIndex,
    LoopBySlices,
    LoopIntoAnArray,
    LoopByRows,
    MapFn,
    MadeInEachCall,
    KeptInAttributes,
    OfKets,
    Memory,
    OfTheModule,
    InAList,
    Arrays,
    Heralded,
    Within,
)
