"""The engine's benchmark cases: stock Strawberry Fields, the traced engine and Piquasso in turns.

Owns the circuits and read-outs that are timed. All figures are of a forward pass and the weights'
gradient, in samples a second. Stock calls take seconds each, so they are timed once a turn.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import tensorflow as tf

from qpool.models import circuit
from qpool.studies.bench import peers
from qpool.studies.bench.alone import alone_on_a_core, answer, obey, side_by_side
from qpool.studies.bench.timing import ratio, turns_of
from workers import sf_compat
from workers.engine import TracedEngine
from workers.process import affinity

sf_compat.install()
import strawberryfields as sf  # noqa: E402

#: Multiplications and additions of one sample of the three-mode case, forward and back.
THREE_MODE_FLOP = 35e6


class Case:
    """A CV-QNN with displacement encoding, and what is read out of its state."""

    def __init__(self, modes: int, layers: int, cutoff: int, read: str = "quadratures") -> None:
        self.modes, self.layers, self.cutoff = modes, layers, cutoff
        self.inputs = [f"{name}_{mode}" for mode in range(modes) for name in ("r", "phi")]
        self.program = circuit.build(modes, layers, self._encode)
        sizes = [block.size(modes) for block in circuit.BLOCKS]
        self.names = [
            circuit.parameter_name(block.name, layer, n)
            for layer in range(layers)
            for block, size in zip(circuit.BLOCKS, sizes, strict=True)
            for n in range(size)
        ]
        self.weights = tf.Variable(
            np.random.default_rng(0).normal(size=len(self.names)) * 0.1, dtype=tf.float32
        )
        self.trainable_variables = [self.weights]
        self._read = self._density if read == "density" else self._quadratures
        x = np.linspace(-4, 4, 40)
        waves = [np.exp(-(x**2) / 4) / (2 * np.pi) ** 0.25, x * 0]
        for n in range(1, cutoff):
            waves.insert(n, (x * waves[n - 1] - np.sqrt(n - 1) * waves[n - 2]) / np.sqrt(n))
        self._waves = np.array(waves[:cutoff], np.float32)

    def _encode(self, program: Any, q: Any) -> None:
        from strawberryfields import ops

        for mode, register in enumerate(q):
            ops.Dgate(*program.params(f"r_{mode}", f"phi_{mode}")) | register

    def z(self, batch: int) -> tf.Tensor:
        draws = np.random.default_rng(1).normal(size=(batch, 2 * self.modes)) * 0.3
        return tf.constant(draws, tf.float32)

    def __call__(self, z: tf.Tensor) -> tf.Tensor:
        """Stock, or traced where ``sf.Engine`` makes traced engines: the whole batch at once."""
        options = {"cutoff_dim": self.cutoff}
        if z.shape[0] > 1:
            options["batch_size"] = z.shape[0]
        return self.run(sf.Engine("tf", backend_options=options), z)

    def run(self, engine: Any, z: tf.Tensor) -> tf.Tensor:
        batched = isinstance(engine, TracedEngine) or engine.backend_options.get("batch_size")
        columns = tf.unstack(z, axis=1) if batched else tf.unstack(z[0])
        args = dict(zip(self.names, tf.unstack(self.weights), strict=True))
        args |= dict(zip(self.inputs, columns, strict=True))
        ket = engine.run(self.program, args=args).state.ket()
        return self._read(tf.reshape(ket, [z.shape[0], *[self.cutoff] * self.modes]))

    def _quadratures(self, ket: tf.Tensor) -> tf.Tensor:
        """Mean x of each mode, hbar = 2: (batch, modes)."""
        root = np.sqrt(np.arange(1, self.cutoff)).astype(np.float32)[:, None]
        means = []
        for mode in range(self.modes):
            axes = [0, mode + 1, *(n + 1 for n in range(self.modes) if n != mode)]
            rows = tf.reshape(tf.transpose(ket, axes), [ket.shape[0], self.cutoff, -1])
            low, high = rows[:, :-1], rows[:, 1:]
            overlap = tf.math.real(low) * tf.math.real(high)
            overlap += tf.math.imag(low) * tf.math.imag(high)
            means.append(2 * tf.reduce_sum(overlap * root, [1, 2]))
        return tf.stack(means, 1)

    def _density(self, ket: tf.Tensor) -> tf.Tensor:
        """The position density of the first two modes on a 40 x 40 grid, others traced out."""
        total, waves = 0.0, tf.constant(self._waves)
        for part in (tf.math.real(ket), tf.math.imag(ket)):
            rows = tf.reshape(part, [ket.shape[0], self.cutoff, self.cutoff, -1])
            rows = tf.einsum("bnma,nx->bxma", rows, waves)
            amplitude = tf.einsum("bxma,my->bxya", rows, waves)
            total += tf.reduce_sum(amplitude**2, -1)
        return total

    def step(self, call: Callable[[tf.Tensor], tf.Tensor], z: tf.Tensor) -> Callable[[], Any]:
        """A loss and its gradient, through ``call``."""

        def step() -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(call(z)))
            return tape.gradient(loss, self.weights)

        return step

    def function(self) -> Any:
        """Loss and gradient with the traced engine, as one compiled function of z."""

        @tf.function(jit_compile=True, autograph=False)
        def step(z: tf.Tensor) -> Any:
            engine = TracedEngine("tf", backend_options={"cutoff_dim": self.cutoff})
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.run(engine, z)))
            return loss, tape.gradient(loss, self.weights)

        return step

    def compiled(self, z: tf.Tensor) -> Callable[[], Any]:
        """The same step in this process, ready to be called."""
        function = self.function()
        return lambda: function(z)[1].numpy()


def compare(case: Case, batch: int, *, turns: int = 3, peer: bool = False) -> dict[str, Any]:
    """Stock (its batch_size; one sample at a time too), traced, and Piquasso if asked for."""
    z = case.z(batch)
    began = time.perf_counter()
    compiled = case.compiled(z)
    compiled()
    first = time.perf_counter() - began
    one = z[:1]
    contenders = {
        "stock batch_size": (case.step(case, z), batch, 1),
        "stock one at a time": (case.step(case, one), 1, 2),
        "traced": (compiled, batch, 200 if batch * case.cutoff**case.modes < 1e5 else 20),
    }
    if peer:
        contenders["Piquasso, JAX, jit, vmap"] = (peers.piquasso_step(case, z.numpy()), batch, 50)
    seconds = turns_of({name: (call, n) for name, (call, _, n) in contenders.items()}, turns)
    rates = {
        name: [contenders[name][1] / s for s in seconds_of] for name, seconds_of in seconds.items()
    }
    found: dict[str, Any] = {
        "batch": batch,
        "first_call_seconds": first,
        "samples_per_second": {name: statistics.median(rate) for name, rate in rates.items()},
    }
    for name in rates:
        if name != "traced":
            found[f"traced against {name}"] = ratio(rates["traced"], rates[name])
    return found


def engine() -> dict[str, Any]:
    """The seed's circuit (2 modes, 2 layers, cutoff 8) against stock and Piquasso."""
    case = Case(2, 2, 8)
    return {
        "case": "engine",
        **{
            f"batch {batch}": compare(case, batch, peer=peers.has_piquasso())
            for batch in (16, 64, 256, 1024)
        },
    }


def wide() -> dict[str, Any]:
    """3 modes (one an ancilla), 6 layers, cutoff 12, 40 x 40 density; and other shapes."""
    return {
        "case": "wide",
        "3 modes, 6 layers, cutoff 12, density, batch 8": compare(Case(3, 6, 12, "density"), 8),
        "4 modes, 2 layers, cutoff 7, batch 8": compare(Case(4, 2, 7), 8, turns=2),
        "1 mode, 8 layers, cutoff 40, batch 16": compare(Case(1, 8, 40), 16),
    }


class Loop:
    """A generator that loops over its batch in Python, as many are written."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.trainable_variables = case.trainable_variables

    def __call__(self, z: tf.Tensor) -> tf.Tensor:
        return tf.concat([self._case(z[n : n + 1]) for n in range(z.shape[0])], 0)


def pinned() -> dict[str, float]:
    """The three-mode case at batch 64 on one pinned core, in a process of its own.

    Beside it what that core does in a float32 product of 1024 x 1024 matrices, in turns.
    """
    return alone_on_a_core(__name__, "rate")


def memory() -> dict[str, Any]:
    """What a step of the three-mode case at batch 64 adds to a process, by number of layers.

    The backward pass must keep the state before each gate that is applied: twelve a layer (six
    beamsplitters, six matrices of one mode), of 0.85 MiB each at this batch.
    """
    state = 64 * 12**3 * 2 * 4 / 2**20
    found = {layers: alone_on_a_core(__name__, "memory", layers) for layers in (1, 2, 4, 6)}
    return {
        "case": "memory",
        "batch": 64,
        "mib_by_layers": {
            str(layers): {**figures, "states_that_must_be_kept": 12 * layers * state}
            for layers, figures in found.items()
        },
    }


def _memory_here(layers: int) -> dict[str, float]:
    """MiB after compiling and the first step, beyond a step of one row; and after ten more."""
    case, process = Case(3, layers, 12, "density"), psutil.Process()
    small = case.compiled(case.z(1))
    small()
    before = process.memory_info().rss / 2**20
    step = case.compiled(case.z(64))
    step()
    first = process.memory_info().rss / 2**20 - before
    for _ in range(10):
        step()
    return {"first_step": first, "ten_steps_later": process.memory_info().rss / 2**20 - before}


def _on_this_core() -> dict[str, float]:
    case, batch = Case(3, 6, 12, "density"), 64
    matrix = tf.random.stateless_normal((1024, 1024), (1, 2)) / 32
    product = tf.function(lambda x: x @ x, jit_compile=True)
    seconds = turns_of(
        {
            "step": (case.compiled(case.z(batch)), 10),
            "product": (lambda: product(matrix).numpy(), 20),
        },
        5,
    )
    rate = [batch / s for s in seconds["step"]]
    limit = [2 * 1024**3 / s / THREE_MODE_FLOP for s in seconds["product"]]
    return {
        "samples_per_second": statistics.median(rate),
        "gflops_of_a_matrix_product": statistics.median(limit) * THREE_MODE_FLOP / 1e9,
        "share_of_the_arithmetic_limit": ratio(rate, limit)["median"],
        "memory_mb": psutil.Process().memory_info().rss / 2**20,
    }


def pooled() -> dict[str, Any]:
    """The three-mode case at batch 64 in the pool: two workers, one, and one process's threads;
    with a tape around the call, and with the loss in the workers.

    Two processes that each compute half of the batch, and hand nothing over, are what a pool of two
    could reach at most. One pinned core is also set against the arithmetic limit: 35 MFLOP a sample
    at the rate of the core's own float32 matrix product.
    """
    import qpool

    affinity.keep_memory()  # the single process too: it is a tenth to a third faster for it
    case, batch = Case(3, 6, 12, "density"), 64
    z = case.z(batch)

    def mean_square(density: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.square(density), [1, 2])

    with (
        qpool.Pool(workers=1, pin=True) as alone,
        qpool.Pool(workers=2, pin=True) as both,
        qpool.parallelize(case, pool=alone, tile=64) as one,
        qpool.parallelize(case, pool=both, tile=32) as two,
        side_by_side(2, __name__, "half") as halves,
    ):
        contenders = {
            "one process, TensorFlow's threads": (case.compiled(z), 5),
            "one worker": (case.step(one, z), 5),
            "two workers": (case.step(two, z), 5),
            "two workers, one exchange": (lambda: two.loss_and_gradient(z, mean_square), 5),
            "two processes of their own": (halves, 5),
        }
        seconds = turns_of(contenders, 5)
        worker = one.stats()["pool"]["workers"][0]["pid"]
        memory = psutil.Process(worker).memory_info().rss
        stock = turns_of({"stock": (case.step(case, z), 1)}, 1)["stock"]
    rates = {name: [batch / s for s in found] for name, found in seconds.items()}
    return {
        "case": "pooled",
        "batch": batch,
        "samples_per_second": {
            **{name: statistics.median(rate) for name, rate in rates.items()},
            "stock batch_size": batch / stock[0],
        },
        "two workers against one process": ratio(
            rates["two workers"], rates["one process, TensorFlow's threads"]
        ),
        **{
            f"two workers, one exchange, against {other}": ratio(
                rates["two workers, one exchange"], rates[other]
            )
            for other in ("one process, TensorFlow's threads", "two processes of their own")
        },
        "two processes of their own against one process": ratio(
            rates["two processes of their own"], rates["one process, TensorFlow's threads"]
        ),
        "two workers against stock batch_size": statistics.median(rates["two workers"])
        * stock[0]
        / batch,
        "one pinned core": pinned(),
        "worker_memory_mb": memory / 2**20,
    }


def loop() -> dict[str, Any]:
    """A generator that loops over its batch in Python: two workers against it in place, stock."""
    import qpool

    case, batch = Case(2, 2, 8), 16
    z, model = case.z(batch), Loop(case)
    with qpool.parallelize(model, workers=2) as generator:
        contenders = {
            "stock, in place": (case.step(model, z), 1),
            "two workers, traced": (case.step(generator, z), 20),
        }
        seconds = turns_of(contenders, 3)
        tile = generator.stats()["tiles_by_batch"][batch]
    rates = {name: [batch / s for s in found] for name, found in seconds.items()}
    return {
        "case": "loop",
        "batch": batch,
        "tile": tile,
        "samples_per_second": {name: statistics.median(rate) for name, rate in rates.items()},
        "two workers against stock": ratio(rates["two workers, traced"], rates["stock, in place"]),
    }


def accuracy() -> dict[str, Any]:
    """Worst distance from stock complex128, relative to the largest entry, over random weights."""
    circuits = 12
    worst: dict[str, float] = defaultdict(float)
    for seed in range(circuits):
        case = Case(2, 2, 6)
        rng = np.random.default_rng(seed)
        values = {name: rng.normal() * 0.4 for name in case.names}
        values |= {name: rng.normal(size=3) * 0.4 for name in case.inputs}
        truth = None
        for kind, make, dtype in (
            ("truth", sf.Engine, tf.complex128),
            ("traced complex128", TracedEngine, tf.complex128),
            ("traced complex64", TracedEngine, tf.complex64),
            ("stock complex64", sf.Engine, tf.complex64),
        ):
            options = {"cutoff_dim": 6, "dtype": dtype}
            if make is sf.Engine:
                options["batch_size"] = 3
            args = {name: tf.constant(value, dtype.real_dtype) for name, value in values.items()}
            with tf.GradientTape() as tape:
                tape.watch(args)
                ket = make("tf", backend_options=options).run(case.program, args=args).state.ket()
                total = tf.reduce_sum(tf.math.real(ket) ** 3)
            slopes = tape.gradient(total, args)
            found = [ket, *(slopes[name] for name in values)]
            found = [np.asarray(x, np.complex128) for x in found]
            if truth is None:
                truth = found
                continue
            scale = max(np.abs(x).max() for x in truth[1:])
            apart = [np.abs(a - b).max() for a, b in zip(found, truth, strict=True)]
            worst[f"{kind}, values"] = max(
                worst[f"{kind}, values"], apart[0] / np.abs(truth[0]).max()
            )
            worst[f"{kind}, gradients"] = max(worst[f"{kind}, gradients"], max(apart[1:]) / scale)
    return {"case": "accuracy", "circuits": circuits, "worst_relative_error": dict(worst)}


def _half() -> None:
    case = Case(3, 6, 12, "density")
    obey(case.compiled(case.z(32)))


def _alone(what: str, *arguments: int) -> Any:
    programs: dict[str, Callable[..., Any]] = {
        "memory": _memory_here,
        "rate": _on_this_core,
        "half": _half,
    }
    return programs[what](*arguments)


if __name__ == "__main__":
    answer(_alone)
