"""What a call leaves in the model's attributes, and objects that have none but methods."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import idioms
import keras
import models
import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops

import qpool
from qpool.errors import (
    AttributeNotSetError,
    AttributeNotSetWarning,
    ModelError,
    NotCompiledWarning,
    StatefulCallError,
)

Z = tf.constant(np.random.default_rng(0).normal(0, 0.5, (idioms.BATCH, 2)).astype("float32"))


class Keeping(idioms.FixedBatch):
    """Leaves a norm, and a table of more, for a penalty in the caller's loss."""

    def __call__(self, z):
        found = super().__call__(z)
        self.norm = tf.reduce_sum(found**2, axis=1)
        self.more = {"largest": tf.reduce_max(found), "pair": [found[0], found[1]]}
        self.scratch = object()
        return found

    def cost(self, factor):
        state = self.state(tf.constant([0.1] * 4), tf.constant([0.2] * 4))
        self.overlap = tf.abs(state.ket()[:, 0, 0]) ** 2
        return factor * tf.reduce_sum(self.overlap)


class Looping(idioms.LoopByIndex):
    def __call__(self, z):
        self.seen = super().__call__(z)
        return self.seen


class Recurrent(idioms.FixedBatch):
    """Goes on from what its last call left."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = tf.zeros([2])

    def __call__(self, z):
        found = super().__call__(z + self.memory)
        self.memory = tf.reduce_mean(found, axis=0)
        return found


def penalised(call, model):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(call(Z)) + tf.reduce_sum(model.norm) + model.more["largest"]
    return [loss, tape.gradient(loss, model.w), model.norm, *model.more["pair"]]


def test_in_place_a_compiled_call_sets_what_the_models_own_sets() -> None:
    ours, stock = Keeping(), Keeping()
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        for _ in range(3):
            for found, expected in zip(
                penalised(generator, ours), penalised(stock, stock), strict=True
            ):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            for model in (ours, stock):
                model.w.assign_add(0.1 * tf.ones_like(model.w))
        assert generator.stats()["compiled"][0]["level"] == "xla"


def test_so_does_a_method_that_is_not_pooled() -> None:
    ours, stock = Keeping(), Keeping()
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        for _ in range(4):
            np.testing.assert_allclose(generator.cost(2.0), stock.cost(2.0), rtol=1e-5)
            np.testing.assert_allclose(ours.overlap, stock.overlap, rtol=1e-5)
            for model in (ours, stock):
                model.w.assign_add(0.1 * tf.ones_like(model.w))
        (way,) = generator.stats()["unpooled"]
        assert way["level"] in ("graph", "xla")


def test_what_a_call_goes_on_from_is_no_constant() -> None:
    ours, stock = Recurrent(), Recurrent()
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        with pytest.warns(qpool.errors.NotCompiledWarning):
            np.testing.assert_allclose(generator(Z), stock(Z), atol=1e-5)
        for _ in range(2):
            np.testing.assert_allclose(generator(Z), stock(Z), atol=1e-5)


class Averaging(idioms.FixedBatch):
    """A moving average, which begins with the first value; averaged with itself it is the same."""

    mean = None

    def __call__(self, z):
        found = super().__call__(z)
        now = tf.stop_gradient(tf.reduce_mean(found, axis=0))
        self.mean = now if self.mean is None else 0.5 * (self.mean + now)
        return found - self.mean


class Filling(idioms.FixedBatch):
    """A dict that the first call makes, and each fills."""

    found = None

    def __call__(self, z):
        given = super().__call__(z)
        if self.found is None:
            self.found = {}
        self.found["mean"] = tf.reduce_mean(given, axis=0)
        return given


def test_a_dict_that_calls_fill_is_filled() -> None:
    ours, stock = Filling(), Filling()
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        for n in range(3):
            generator(Z * (1 + 0.1 * n))
            stock(Z * (1 + 0.1 * n))
            np.testing.assert_allclose(ours.found["mean"], stock.found["mean"], atol=1e-6)
        assert generator.stats()["compiled"][0]["level"] == "xla"


class Annealed(idioms.FixedBatch):
    """By less a call than what is compiled may differ."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.temperature = 0, 1.0

    def __call__(self, z):
        self.calls += 1
        self.temperature *= 0.9995
        return super().__call__(z * self.temperature)


@pytest.mark.parametrize("kind", [Averaging, Annealed])
def test_nor_is_what_hardly_shows(kind) -> None:
    ours, stock = kind(), kind()
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        with pytest.warns(qpool.errors.NotCompiledWarning):
            np.testing.assert_allclose(generator(Z), stock(Z), atol=1e-6)
        for n in range(4):
            z = Z * (1 + 0.1 * n)
            np.testing.assert_allclose(generator(z), stock(z), atol=1e-6)


class Counted(idioms.FixedBatch):
    calls = 0

    def __call__(self, z):
        self.calls += 1
        return super().__call__(z)


def test_a_count_of_calls_that_nothing_goes_by_is_no_reason() -> None:
    with qpool.parallelize(Counted(), strategy="cpu_batch") as generator:
        generator(Z)
        assert generator.stats()["compiled"][0]["level"] == "xla"


def test_tapes_are_told_of_the_variables_that_a_call_uses() -> None:
    model = idioms.FixedBatch()
    model.unused = tf.Variable(1.0)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for _ in range(2):
            with tf.GradientTape() as tape:
                generator(Z)
            assert all(variable is not model.unused for variable in tape.watched_variables())


@pytest.mark.parametrize(("model", "named"), [(Keeping, "norm, self.more"), (Looping, "seen")])
def test_that_workers_do_not_is_said_once(worker, model, named: str) -> None:
    stock = model()
    with qpool.parallelize(model(), pool=worker) as generator:
        with pytest.warns(AttributeNotSetWarning, match=rf"sets self\.{named} in"):
            np.testing.assert_allclose(generator(Z), stock(Z), atol=1e-5)
        np.testing.assert_allclose(generator(Z), stock(Z), atol=1e-5)


class DrawnOnce(Looping):
    """What is not trained is made on the first call, and kept."""

    random = True

    def __call__(self, z):
        if not hasattr(self, "mixing"):
            normal = tf.random.normal if self.random else tf.random.stateless_normal
            options = {} if self.random else {"seed": (1, 2)}
            self.mixing = normal([z.shape[1], z.shape[1]], **options)
        return super().__call__(tf.tanh(tf.matmul(z, self.mixing)))


class MadeOnce(DrawnOnce):
    random = False


def test_what_the_first_call_draws_and_keeps_is_drawn_before_the_model_is_copied(worker) -> None:
    model = DrawnOnce()
    told = r"set self\.mixing, and drew .* call the model once on a batch before"
    with (
        qpool.parallelize(model, pool=worker) as generator,
        pytest.raises(StatefulCallError, match=told),
    ):
        generator(Z)
    expected = model(Z)
    with (
        qpool.parallelize(model, pool=worker) as generator,
        pytest.warns(AttributeNotSetWarning, match=r"sets self\.seen in"),
    ):
        np.testing.assert_allclose(generator(Z), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore::qpool.errors.AttributeNotSetWarning")  # of ``seen``
def test_in_place_it_is_drawn_as_it_is_without_us() -> None:
    model = DrawnOnce()
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        found = [generator(Z) for _ in range(3)]
    for values in found:
        np.testing.assert_allclose(values, model(Z), atol=1e-5)


def test_what_is_made_once_of_constants_is_no_news(worker) -> None:
    with qpool.parallelize(MadeOnce(), pool=worker) as generator:
        with pytest.warns(AttributeNotSetWarning, match=r"sets self\.seen in"):
            found = generator(Z)
        np.testing.assert_allclose(found, MadeOnce()(Z), atol=1e-5)


def test_so_does_a_vectorised_loop() -> None:
    ours, stock = Looping(), Looping()
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        for rows in (4, 4, 3):
            np.testing.assert_allclose(generator(Z[:rows]), stock(Z[:rows]), atol=1e-5)
            np.testing.assert_allclose(ours.seen, stock.seen, atol=1e-5)
            for model in (ours, stock):
                model.w.assign_add(0.1 * tf.ones_like(model.w))
        assert [way["by_rows"] for way in generator.stats()["compiled"]] == [True, True]
        assert generator.stats()["compiled"][1]["seconds"] == 0  # by what was compiled for more


class Monitor:
    norm: Any = None


class Leaving(idioms.FixedBatch):
    """Leaves things for a penalty wherever there is a place."""

    def __init__(self) -> None:
        super().__init__()
        self.log: dict[str, Any] = {}
        self.monitor = Monitor()
        self.norms: list[Any] = []

    def __call__(self, z):
        self.last = self.state(z[:, 0], z[:, 1])
        self.log["norm"] = self.last.trace()
        self.monitor.norm = self.last.fock_prob([0, 0])
        self.norms.append(tf.reduce_mean(tf.math.real(self.last.trace())))
        self.info = {"photons": self.last.mean_photon(0)[0], "rows": len(z)}
        return tf.stack([self.last.mean_photon(n)[0] for n in range(2)], axis=1)

    def penalty(self):
        return [
            self.last.fidelity_vacuum(),
            tf.math.real(self.log["norm"]),
            self.monitor.norm,
            tf.stack(self.norms[-2:]),
            self.info["photons"],
        ]


LEFT: dict[str, Any] = {}


class LeavingInTheModule(idioms.FixedBatch):
    norms: ClassVar[list[Any]] = []

    def __call__(self, z):
        state = self.state(z[:, 0], z[:, 1])
        LEFT["norm"] = tf.math.real(state.trace())
        return tf.stack([state.mean_photon(n)[0] for n in range(2)], axis=1)

    def penalty(self):
        return [LEFT["norm"]]


class LeavingInAModule(tf.Module):
    """TensorFlow tracks what lists and dicts are given; they are saved without tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = idioms.FixedBatch()
        self.w = self.model.w
        self.norms: list[Any] = []
        self.log: dict[str, Any] = {}

    def __call__(self, z):
        state = self.model.state(z[:, 0], z[:, 1])
        self.norms.append(tf.math.real(state.trace()))
        self.log["vacuum"] = state.fidelity_vacuum()
        return tf.stack([state.mean_photon(n)[0] for n in range(2)], axis=1)

    def penalty(self):
        return [self.log["vacuum"], tf.stack(list(self.norms))[-1]]


class LeavingInAKerasModel(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.inner = LeavingInAModule()
        self.w = self.inner.w
        self.norms: list[Any] = []

    def call(self, z):
        found = self.inner(z)
        self.norms.append(tf.reduce_sum(found))
        return found

    def penalty(self):
        return [*self.inner.penalty(), self.norms[-1]]


class LeavingByRow(idioms.LoopByIndex):
    """In each row's turn."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[Any] = []

    def __call__(self, z):
        self.states = []
        found = []
        for row in z:
            self.last = self.state(row[0], row[1])
            self.states.append(self.last)
            self.norms.append(tf.math.real(self.last.trace()))
            found.append(idioms.photons(self.last))
        return tf.stack(found)

    def penalty(self):
        return [
            self.last.fidelity_vacuum(),
            tf.stack([state.fidelity_vacuum() for state in self.states]),
            tf.stack(self.norms[-6:]),
        ]


@pytest.mark.parametrize(
    "kind",
    [Leaving, LeavingByRow, LeavingInTheModule, LeavingInAModule, LeavingInAKerasModel],
)
@pytest.mark.parametrize("strategy", ["cpu_batch", "auto"])
def test_what_a_call_leaves_anywhere_is_that_of_the_last_call(
    tmp_path, kind, strategy: str
) -> None:
    ours, stock = kind(), kind()

    def step(call, model, z):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(z))
            loss += sum(tf.reduce_sum(tf.sin(3 * x)) for x in model.penalty())
        return loss, tape.gradient(loss, model.w)

    with qpool.parallelize(ours, strategy=strategy) as generator:
        for n in range(4):
            z = Z * (1 + 0.1 * n)
            for found, expected in zip(
                step(generator, ours, z), step(stock, stock, z), strict=True
            ):
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            assert len(ours.norms) == len(stock.norms)
            for model in (ours, stock):
                model.w.assign_add(0.05 * tf.ones_like(model.w))
        if strategy == "cpu_batch":
            assert [way["level"] for way in generator.stats()["compiled"]] == ["xla"]
    if kind is LeavingInAModule:
        tf.train.Checkpoint(model=ours).save(str(tmp_path / "saved"))


class LeavingALot(idioms.LoopByIndex):
    """The last three, of any call."""

    def __init__(self) -> None:
        super().__init__()
        self.recent: collections.deque[Any] = collections.deque(maxlen=3)

    def __call__(self, z):
        found = super().__call__(z)
        self.recent.append(tf.reduce_sum(found))
        return found


def test_what_a_compiled_call_cannot_leave_is_an_error_to_read() -> None:
    model = LeavingALot()
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        with pytest.warns(AttributeNotSetWarning, match=r"sets self\.recent in"):
            generator(Z)
        assert len(model.recent) == 1
        np.testing.assert_allclose(generator(Z), LeavingALot()(Z), atol=1e-5)
        assert generator.stats()["compiled"][0]["by_rows"]
        assert len(model.recent) == 1
        last = model.recent[-1]
        for read in (len, list, tf.convert_to_tensor, lambda x: 2 * x, lambda x: x.shape):
            with pytest.raises(AttributeNotSetError, match=r"self\.recent is not there"):
                read(last)


class OfAllRows(idioms.LoopByIndex):
    """Of all rows, and of the first one: where the first batch has equal rows it does not show."""

    def __call__(self, z):
        found = super().__call__(z)
        self.mean, self.first, self.reverse = tf.reduce_mean(found, 0), found[0], found[::-1]
        return found


def test_what_is_of_all_rows_is_not_taken_for_that_of_the_last() -> None:
    ours, stock = OfAllRows(), OfAllRows()
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        for z in (tf.zeros_like(Z), Z):
            np.testing.assert_allclose(generator(z), stock(z), atol=1e-5)
            for name in ("mean", "first", "reverse"):
                np.testing.assert_allclose(getattr(ours, name), getattr(stock, name), atol=1e-5)
        assert generator.stats()["compiled"][0]["level"] == "xla"


def trimmed(model, x):
    model.history.append(x)
    del model.history[:-2]


def moved(model, x):
    model.pair[0], model.pair[1] = model.pair[1], x


def by_number(model, x):
    model.found[len(model.found)] = x


def the_one_before(model, x):
    model.before, model.now = model.now, x


def every_other(model, x):
    model.calls += 1
    if model.calls % 2:
        model.now = x


def from_the_second_on(model, x):
    model.calls += 1
    if model.calls > 1:
        model.now = x


def a_list_more(model, x):
    model.history = [*model.history, x]


def within_a_function(model, x):
    model.read = lambda: x


def filled_anew(model, x):
    model.history.clear()
    model.history += [x, 2 * x]


GOING_ON = [
    trimmed,
    moved,
    by_number,
    the_one_before,
    every_other,
    from_the_second_on,
    a_list_more,
    within_a_function,
    filled_anew,
]


class GoingOn(idioms.FixedBatch):
    def __init__(self, keep) -> None:
        super().__init__()
        self.keep, self.history, self.pair, self.found = keep, [], [tf.constant(0.0)] * 2, {}
        self.before = self.now = tf.constant(0.0)
        self.read, self.calls = (lambda: 0.0), 0

    def __call__(self, z):
        found = super().__call__(z)
        self.keep(self, tf.reduce_sum(found))
        return found

    def left(self):
        found = [*self.history, *self.pair, *self.found.values(), self.before, self.now]
        return [float(x) for x in (*found, self.read())]


@pytest.mark.filterwarnings("ignore::qpool.errors.NotCompiledWarning")
@pytest.mark.filterwarnings("ignore::qpool.errors.AttributeNotSetWarning")
@pytest.mark.parametrize("strategy", ["cpu_batch", "auto"])
@pytest.mark.parametrize("keep", GOING_ON)
def test_what_a_call_leaves_by_what_was_there_is_right_or_an_error(keep, strategy: str) -> None:
    ours, stock = GoingOn(keep), GoingOn(keep)
    refused = False
    with qpool.parallelize(ours, strategy=strategy) as generator:
        for n in range(4):
            z = Z * (1 + 0.1 * n)
            np.testing.assert_allclose(generator(z), stock(z), atol=1e-5)
            try:
                np.testing.assert_allclose(ours.left(), stock.left(), atol=1e-4)
            except AttributeNotSetError:
                refused = True
    assert refused == (keep in (trimmed, moved, the_one_before, every_other, within_a_function))


def test_nothing_of_a_compiled_call_is_in_the_engine() -> None:
    model = idioms.FixedBatch()
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for _ in range(2):
            generator(Z)
        with pytest.raises(StatefulCallError, match="left no state in the engine"):
            generator.engine.backend.state()
        generator.engine.reset()
        assert not generator.engine.run_progs


class Detectors:
    """A simulation that trains nothing: ndarrays in, counts out."""

    def measure(self, amplitudes, phases):
        program = sf.Program(2)
        r, phi = program.params("r", "phi")
        with program.context as q:
            ops.Coherent(r, phi) | q[0]
            ops.LossChannel(0.7) | q[0]
            ops.BSgate() | (q[0], q[1])
            ops.MeasureFock() | q
        options = {"cutoff_dim": 4, "batch_size": len(amplitudes)}
        args = {"r": amplitudes, "phi": phases}
        samples = sf.Engine("tf", backend_options=options).run(program, args=args).samples
        return np.array([[int(n) for n in row[0]] for row in samples])


@pytest.mark.filterwarnings("ignore::qpool.errors.NotCompiledWarning")  # it returns NumPy arrays
@pytest.mark.parametrize("strategy", ["processes", "threads", "cpu_batch"])
def test_a_simulation_without_variables(worker, strategy: str) -> None:
    amplitudes = np.linspace(0, 0.9, 300, dtype=np.float32)
    options = {"processes": {"pool": worker}, "threads": {"workers": 2}}.get(strategy, {})
    with qpool.parallelize(
        Detectors(), strategy=strategy, methods="measure", sharded="phases", **options
    ) as simulation:
        found = np.concatenate([simulation.measure(amplitudes, amplitudes) for _ in range(2)])
    assert found.shape == (600, 2)
    each = 0.7 * np.mean(amplitudes**2) / 2  # photons, of a Poisson distribution with that mean
    np.testing.assert_allclose(found.mean(0), each, atol=5 * np.sqrt(each / 600))
    with pytest.raises(ModelError, match="or methods="):
        qpool.parallelize(Detectors())


FACTOR = 1.0


class Annealed(idioms.FixedBatch):
    """Looks at a number of its own, and at one of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.noise, self.epoch, self.calls = 0.5, 0, 0

    def __call__(self, z):
        self.calls += 1
        return super().__call__(z) * self.scale()

    def scale(self) -> float:
        return self.noise * FACTOR


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_numbers_that_calls_look_at_are_those_of_now(worker, monkeypatch, strategy: str) -> None:
    model = Annealed()
    options = {"pool": worker} if strategy == "processes" else {"strategy": strategy}
    with qpool.parallelize(model, **options) as generator:
        first = generator(Z).numpy()
        executor = generator._qpool.executor()
        model.epoch = 1  # no call looks at it
        generator(Z)
        assert generator._qpool.executor() is executor
        model.noise = 0.25
        np.testing.assert_allclose(generator(Z), first / 2, rtol=1e-5)
        monkeypatch.setitem(globals(), "FACTOR", 3.0)
        np.testing.assert_allclose(generator(Z), 1.5 * first, rtol=1e-5)

        def restlessly() -> tf.Tensor:
            for noise in (0.1, 0.2, 0.3, 0.4):
                model.noise = noise
                found = generator(Z)
            return found

        with pytest.warns(NotCompiledWarning, match=r"looks at noise in its call.*Variable"):
            found = restlessly()
        np.testing.assert_allclose(found, 6 * 0.4 * first, rtol=1e-5)
        assert generator.stats()["strategy"] == "sequential"


def test_a_pool_of_its_own_is_kept_where_one_changes_and_what_was_compiled() -> None:
    model = Annealed()
    with qpool.parallelize(model, workers=1, strategy="processes") as generator:
        first, pids = generator(Z).numpy(), workers_of(generator)
        found = []
        for noise in (1.0, 0.5) * 4:  # to and fro, as between training and validation
            model.noise = noise
            np.testing.assert_allclose(generator(Z), 2 * noise * first, rtol=1e-5)
            found.append(generator._qpool.executor())
        assert len(set(found)) == 2
        assert workers_of(generator) == pids


def test_an_attribute_of_what_a_factory_made_is_seen_too(worker) -> None:
    with qpool.parallelize(Annealed, pool=worker) as generator:
        first = generator(Z).numpy()
        generator.noise = 0.25
        np.testing.assert_allclose(generator(Z), first / 2, rtol=1e-5)


class EagerlyAnnealed(Annealed):
    """Not compiled: it looks at its numbers, and at the module's, in every call."""

    def __call__(self, z):
        return super().__call__(z) + 0.0 * float(z[0, 0])


@pytest.mark.filterwarnings("ignore::qpool.errors.NotCompiledWarning")
def test_a_number_of_the_module_is_that_of_now_however_often_it_was_before(monkeypatch) -> None:
    model = EagerlyAnnealed()
    with qpool.parallelize(model, workers=1, strategy="processes") as generator:
        first, pids = generator(Z).numpy(), workers_of(generator)
        for factor in (3.0, 1.0, 3.0):
            monkeypatch.setitem(globals(), "FACTOR", factor)
            np.testing.assert_allclose(generator(Z), factor * first, rtol=1e-5)
        assert workers_of(generator) == pids


def workers_of(generator) -> list[int]:
    return [worker["pid"] for worker in generator.stats()["pool"]["workers"]]


GAINS = {"all": 1.0}


@dataclasses.dataclass
class Config:
    scale: float = 1.0

    @property
    def gain(self) -> float:
        return 1.0


class Settings:
    """Asked by attribute, kept in a dict."""

    def __init__(self, **given: float) -> None:
        self._given = given

    def __getattr__(self, name: str) -> float:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._given[name]


@dataclasses.dataclass(slots=True)
class Slotted:
    depth: float = 1.0


@dataclasses.dataclass
class Schedule:
    height: float = 1.0

    def now(self) -> float:
        return self.height


OF_THE_MODULE = Schedule()


class Louder(Config):
    @property
    def gain(self) -> float:
        return 2.0


@dataclasses.dataclass
class Softer:
    """That a call finds in its module, or in an attribute."""

    factor: ClassVar[float] = 1.0

    @staticmethod
    def gain() -> float:
        return 1.0


class Another:
    factor = 2.0

    @staticmethod
    def gain() -> float:
        return 2.0


class Root(idioms.FixedBatch):
    of_the_root = 1.0

    @staticmethod
    def fixed() -> float:
        return 1.0

    @property
    def asked(self) -> float:
        return 1.0


class Configured(Root):
    """What a call looks at, in the places where it may be changed."""

    of_the_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.array, self.tensor = np.ones(2), tf.constant(1.0)
        self.function = tf.identity
        self.options, self.gains = {"loss": {"gain": 1.0}, "name": "a"}, [1.0, np.ones(2)]
        self.settings, self.schedule = Settings(level=1.0), Schedule()
        self.of_a_library, self.slotted = types.SimpleNamespace(width=1.0), Slotted()
        self.now, self.rest = self.schedule.now, 1.0
        self.gain, self.large = None, np.ones(5000)
        self.steps, self.kind, self.plain = [tf.identity, None], Softer, Config()

    def __call__(self, z):
        scale = self.of_the_class * self.config.scale * self.array[1] * self.method()
        scale *= self.of_the_root * self.fixed() * self.asked
        rest = self.rest * (self.gain or 1.0) * self.large[-1]

        def more() -> float:
            return rest * self.now() * OF_THE_MODULE.height

        scale *= self.settings.level * self.slotted.depth * self.of_a_library.width * more()
        scale *= self.plain.gain * self.kind.gain() * Found.gain() * Found.factor
        scale *= self.options["loss"]["gain"] * self.gains[0] * self.gains[1][0] * GAINS["all"]
        return self.steps[0](self.function(super().__call__(z) * scale)) * self.tensor

    def method(self) -> float:
        return 1.0

    def reset(self) -> None:
        """Which a call does not call, but for an engine's of that name."""
        self.rest = 1.0


class Found(Softer):
    pass


CHANGES: dict[str, Callable[[Any], Any]] = {
    "the class's": lambda model: setattr(model, "of_the_class", 2.0),
    "a part's": lambda model: setattr(model.config, "scale", 2.0),
    "another part": lambda model: setattr(model, "config", Config(4.0)),
    "an array": lambda model: model.array.__setitem__(1, 2.0),
    "a tensor": lambda model: setattr(model, "tensor", tf.constant(2.0)),
    "a function": lambda model: setattr(model, "function", lambda x: 2.0 * x),
    "a method": lambda model: setattr(model, "method", lambda: 2.0),
    "the class's own": lambda model: setattr(Configured, "of_the_root", 2.0),
    "a static method": lambda model: setattr(Root, "fixed", staticmethod(lambda: 2.0)),
    "a property": lambda model: setattr(Configured, "asked", property(lambda self: 2.0)),
    "in a dict": lambda model: model.options["loss"].update(gain=2.0),
    "in a list": lambda model: model.gains.__setitem__(0, 2.0),
    "an array in it": lambda model: model.gains[1].__setitem__(0, 2.0),
    "in a list of functions": lambda model: model.steps.__setitem__(0, lambda x: 2.0 * x),
    "in a dict that is asked by attribute": lambda model: model.settings._given.update(level=2.0),
    "in slots": lambda model: setattr(model.slotted, "depth", 2.0),
    "in a namespace": lambda model: setattr(model.of_a_library, "width", 2.0),
    "of a bound method's object": lambda model: setattr(model.schedule, "height", 2.0),
    "of an object of the module's": lambda model: setattr(OF_THE_MODULE, "height", 2.0),
    "what a local variable is named like": lambda model: setattr(model, "rest", 2.0),
    "what was nothing": lambda model: setattr(model, "gain", 2.0),
    "a large array": lambda model: setattr(model, "large", np.full(5000, 2.0)),
    "an object's class": lambda model: setattr(model.plain, "__class__", Louder),
    "which class it is": lambda model: setattr(model, "kind", Another),
    "a number of a class of the module's": lambda model: setattr(Found, "factor", 2.0),
    "a function of it": lambda model: setattr(Found, "gain", Another.gain),
    "in the module's": lambda model: GAINS.update(all=2.0),
}


def test_changes_are_seen_wherever_they_are_made(monkeypatch) -> None:
    monkeypatch.setitem(GAINS, "all", 1.0)
    monkeypatch.setattr(OF_THE_MODULE, "height", 1.0)
    for name in ("of_the_root", "asked"):  # as it has them of its own
        monkeypatch.setattr(Configured, name, vars(Root)[name])
        monkeypatch.delattr(Configured, name)
    monkeypatch.setattr(Root, "fixed", staticmethod(Root.fixed))
    for name in ("factor", "gain"):
        monkeypatch.setattr(Found, name, vars(Softer)[name])
        monkeypatch.delattr(Found, name)
    model = Configured()
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        factor = 1.0
        first = generator(Z).numpy()
        for name, change in CHANGES.items():
            change(model)
            factor *= 2.0
            np.testing.assert_allclose(generator(Z), factor * first, rtol=1e-4, err_msg=name)
            generator._qpool.pooled_calls += 20  # they come seldom
        monkeypatch.setitem(globals(), "Found", Another)  # the cell of the class is run again
        np.testing.assert_allclose(generator(Z), factor * first, rtol=1e-4)
        monkeypatch.setitem(globals(), "Found", Softer)
        np.testing.assert_allclose(generator(Z), factor / 4 * first, rtol=1e-4)


class Counting(idioms.FixedBatch):
    """Goes by what its own lists and dicts have of earlier calls."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.kept, self.recent = [], {"last": {}}, collections.deque(maxlen=3)

    def __call__(self, z):
        found = super().__call__(z) * float(1 + len(self.history) + len(self.recent))
        self.history.append(1.0)
        self.recent.append(2.0)
        found += 0.5 * self.kept["last"].get("mean", 0.0)
        self.kept["last"]["mean"] = tf.stop_gradient(tf.reduce_mean(found))
        return found


@pytest.mark.filterwarnings("ignore::qpool.errors.NotCompiledWarning")
def test_no_trace_leaves_anything_in_what_a_call_goes_on_from() -> None:
    ours, stock = Counting(), Counting()
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        for _ in range(4):
            np.testing.assert_allclose(generator(Z), stock(Z), rtol=1e-4)
    assert (len(ours.history), list(ours.recent)) == (4, [2.0] * 3)


class Caching(idioms.LoopByIndex):
    """Keeps what it has made for a size of batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = {}

    def __call__(self, z):
        rows = len(z)
        if rows not in self.cache:
            self.cache[rows] = tf.linspace(1.0, 1.0, rows)[:, None]
        return super().__call__(z) * self.cache[rows]


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_nor_tensors_of_a_graph_in_a_cache(worker, strategy: str) -> None:
    model = Caching()
    options = {"pool": worker} if strategy == "processes" else {"strategy": strategy}
    with qpool.parallelize(model, **options) as generator:
        for rows in (4, 4, 3, 1, 4):
            np.testing.assert_allclose(generator(Z[:rows]), Caching()(Z[:rows]), atol=1e-5)
    for rows in (1, 3, 4):
        np.testing.assert_allclose(model(Z[:rows]), Caching()(Z[:rows]), atol=1e-5)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_so_is_another_hbar(worker, monkeypatch, strategy: str) -> None:
    model = models.Displaced()  # whose read-out has its units
    options = {"pool": worker} if strategy == "processes" else {"strategy": strategy}
    with qpool.parallelize(model, **options) as generator:
        for hbar in (2.0, 0.5, 2.0):
            monkeypatch.setattr(sf, "hbar", hbar)
            with tf.GradientTape() as tape:
                found = generator(Z)
            np.testing.assert_allclose(found, model(Z), atol=1e-5)
            assert tape.gradient(found, model.trainable_variables[0]) is not None


class Logging(idioms.FixedBatch):
    """Writes to its own lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.seen, self.factors = [], {"rows": 0}, {"all": 1.0}

    def __call__(self, z):
        self.history.append(len(self.history))
        self.seen["rows"] += z.shape[0]
        return super().__call__(z) * self.factors["all"]


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_what_a_call_writes_to_itself_is_no_change(worker, strategy: str) -> None:
    model = Logging()
    options = {"pool": worker} if strategy == "processes" else {"strategy": strategy}
    with qpool.parallelize(model, **options) as generator:
        first = generator(Z).numpy()
        executor = generator._qpool.executor()
        generator(Z)
        assert generator._qpool.executor() is executor
        assert generator.stats()["compiled"][0]["level"] == "xla"
        model.factors["all"] = 2.0
        np.testing.assert_allclose(generator(Z), 2.0 * first, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_so_is_another_program_and_one_with_more_gates(worker, strategy: str) -> None:
    model = idioms.LoopByIndex()
    options = {"pool": worker} if strategy == "processes" else {"strategy": strategy}
    with qpool.parallelize(model, **options) as generator:
        first = generator(Z)
        model.program.locked = False  # which running it has done
        with model.program.context as q:
            sf.ops.Dgate(0.3) | q[0]
        np.testing.assert_allclose(generator(Z), model(Z), atol=1e-5)
        assert np.abs(generator(Z) - first).max() > 0.01
        model.program = type(model)().program
        np.testing.assert_allclose(generator(Z), first, atol=1e-5)


class OfAProgram:
    """One circuit a call; a parameter may be bound beforehand."""

    def __init__(self) -> None:
        self.program = program_of()
        self.engine = sf.Engine("tf", backend_options={"cutoff_dim": 4})
        self.w = tf.Variable(0.3)
        self.trainable_variables = [self.w]

    def __call__(self, z):
        if self.engine.run_progs:
            self.engine.reset()
        state = self.engine.run(self.program, args={"x": self.w + z[0]}).state
        return state.quad_expectation(0)[0]


def program_of(*, inverse: bool = False) -> sf.Program:
    program = sf.Program(1)
    x, bound = program.params("x", "bound")
    with program.context as q:
        gate = sf.ops.Sgate(0.5)
        sf.ops.Dgate(x) | q[0]
        (gate.H if inverse else gate) | q[0]
        sf.ops.Dgate(bound) | q[0]
    program.bind_params({"bound": 0.25})
    return program


def test_workers_have_what_is_bound_to_a_parameter(worker) -> None:
    model, z = OfAProgram(), tf.constant([0.1])
    with qpool.parallelize(model, pool=worker) as generator:
        np.testing.assert_allclose(generator(z), model(z), atol=1e-5)


def test_so_are_an_inverse_a_number_of_a_gate_and_one_that_is_bound() -> None:
    model, z = OfAProgram(), tf.constant([0.1])
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        before = float(generator(z))
        for change in (
            lambda: setattr(model, "program", program_of(inverse=True)),
            lambda: model.program.circuit[1].op.p.__setitem__(0, 0.2),
            lambda: model.program.bind_params({"bound": -0.5}),
        ):
            change()
            found = float(generator(z))
            np.testing.assert_allclose(found, model(z), atol=1e-5)
            assert abs(found - before) > 1e-2
            before = found
            generator._qpool.pooled_calls += 20  # they come seldom


def test_so_is_another_layer() -> None:
    class Layered(idioms.FixedBatch):
        def __init__(self) -> None:
            super().__init__()
            self.layer = keras.layers.Dense(2)

        def __call__(self, z):
            return self.layer(super().__call__(z))

    model = Layered()
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        generator(Z)
        model.layer = keras.layers.Dense(2)
        with tf.GradientTape() as tape:
            found = generator(Z)
        np.testing.assert_allclose(found, model(Z), atol=1e-5)
        assert tape.gradient(found, model.layer.kernel.value) is not None


@pytest.mark.parametrize("strategy", ["threads", "cpu_batch", "processes"])
def test_a_class_of_a_script_stays_the_users_own(worker, strategy: str) -> None:
    """Though it travels by value: within one process it would be filled with copies."""
    scale = tf.Variable(2.0)

    @dataclasses.dataclass
    class Shift:
        by: float

        def of(self, x):
            return x + self.by * scale

    class Pair(NamedTuple):
        first: Any
        second: Any

    class Scaled(idioms.FixedBatch):
        def __call__(self, z, shift=None):
            return Pair(self.scaled(super().__call__(z)), shift.of(z))

        def scaled(self, x):
            return scale * x

    before = {kind: dict(vars(kind)) for kind in (Shift, Pair, Scaled)}
    model, options = Scaled(), {"pool": worker} if strategy == "processes" else {}
    with qpool.parallelize(model, strategy=strategy, **options) as generator:
        expected = model(Z, shift=Shift(0.5))
        for _ in range(2):
            with tf.GradientTape() as tape:
                found = generator(Z, shift=Shift(0.5))
            assert type(found) is Pair
            np.testing.assert_allclose(found.first, expected.first, atol=1e-5)
            assert tape.gradient(found, scale) is not None
        for kind, names in before.items():
            assert all(vars(kind)[name] is value for name, value in names.items())
        with tf.GradientTape() as tape:
            found = model(Z, shift=Shift(0.5))
        assert tape.gradient(found, scale) is not None
