"""The traced engine in workers: what the model is compiled to, and that it is still the model."""

from __future__ import annotations

import idioms
import models
import numpy as np
import pytest
import tensorflow as tf
from idioms import photons

import qpool
from qpool import errors
from qpool.models import QuantumSFGenerator
from workers.engine.scope import traced_engines


def small(**options):
    return QuantumSFGenerator(n_modes=2, latent_dim=4, layers=1, cutoff_dim=4, seed=1, **options)


def value_and_gradients(call, model, z):
    with traced_engines(False), tf.GradientTape() as tape:  # what is called in place is stock
        tape.watch(z)
        values = call(z)
        loss = tf.reduce_sum(tf.sin(values))
    return values, tape.gradient(loss, [*model.trainable_variables, z])


def assert_close(ours, theirs, atol: float = 1e-5) -> None:
    for a, b in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=atol)


Z = tf.constant(np.random.default_rng(0).normal(size=(19, 4)) * 0.5, tf.float32)


def test_a_model_that_makes_engines_is_compiled_and_is_the_same_for_any_number_of_workers(
    pool_of,
) -> None:
    model = small()
    bits = []
    for workers in (1, 2):
        with qpool.parallelize(model, pool=pool_of(workers), tile=8) as generator:
            found = []
            for batch in (19, 16, 1):
                ours = value_and_gradients(generator, model, Z[:batch])
                assert_close(ours, value_and_gradients(model, model, Z[:batch]))
                found += [np.asarray(x).tobytes() for x in tf.nest.flatten(ours)]
            (compiled,) = generator.stats()["compiled"]
            assert compiled["level"] == "xla"
            assert compiled["seconds"] > 0
            bits.append(found)
    assert bits[0] == bits[1]


def test_engine_stock_is_strawberry_fields_as_it_is(worker) -> None:
    model = small()
    with qpool.parallelize(model, pool=worker, engine="stock") as generator:
        assert_close(generator(Z[:4]), model(Z[:4]))
        (compiled,) = generator.stats()["compiled"]
        assert compiled["level"] == "eager"
        assert "stock" in compiled["why_not_better"]


def test_a_model_that_loops_over_its_batch_is_vectorised(worker) -> None:
    model = models.Displaced(tf.complex128, cutoff=4)
    z = tf.constant(np.random.default_rng(1).normal(size=(5, 2)) * 0.5)
    with qpool.parallelize(model, pool=worker) as generator:
        ours = value_and_gradients(generator, model, z)
        assert_close(ours, value_and_gradients(model, model, z), atol=1e-9)
        assert generator.stats()["compiled"][0]["level"] == "xla"
        assert generator.stats()["compiled"][0]["by_rows"]
        assert generator.stats()["tiles_by_batch"] == {5: 2}


def test_what_cannot_be_traced_runs_eagerly_and_says_where(worker) -> None:
    model = models.LooksAtNumbers()
    z = tf.constant([[1.0], [-2.0], [3.0]])
    with qpool.parallelize(model, pool=worker) as generator:
        ours = value_and_gradients(generator, model, z)
        assert_close(ours, value_and_gradients(model, model, z))
        (compiled,) = generator.stats()["compiled"]
    assert compiled["level"] == "eager"
    assert "models.py" in compiled["why_not_better"]
    assert "for row in z" in compiled["why_not_better"]


def test_cpu_batch_is_the_model_compiled_in_place() -> None:
    model = small()
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for batch in (1, 5):
            ours = value_and_gradients(generator, model, Z[:batch])
            assert_close(ours, value_and_gradients(model, model, Z[:batch]))
        assert generator.stats()["compiled"][0]["level"] == "xla"
        rows = generator.per_sample_gradients(Z[:3], tf.ones((3, 2)))
        stock = qpool.parallelize(model, strategy="sequential", engine="stock")
        assert_close(rows, stock.per_sample_gradients(Z[:3], tf.ones((3, 2))))

        @tf.function(jit_compile=True)
        def step(z):
            return value_and_gradients(generator, model, z)

        assert_close(step(Z[:5]), ours)


def test_in_a_graph_that_xla_compiles_pools_say_what_to_do(worker) -> None:
    with qpool.parallelize(small(), pool=worker) as generator:
        step = tf.function(generator, jit_compile=True)
        with pytest.raises(qpool.errors.InputError, match="Leave jit_compile out, or use strategy"):
            step(Z[:2])


def test_cpu_batch_differentiates_twice() -> None:
    model = small()
    z = Z[:3]

    def penalty(call):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(z)
                total = tf.reduce_sum(call(z) ** 2)
            slope = tf.reduce_sum(inner.gradient(total, z) ** 2)
        return outer.gradient(slope, model.trainable_variables)

    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        ours = penalty(generator)
    step, weights = 1e-2, model.trainable_variables[0]

    def slope_at(shift: float) -> float:
        weights.assign_add(tf.fill(weights.shape, shift))
        with tf.GradientTape() as tape:
            tape.watch(z)
            total = tf.reduce_sum(model(z) ** 2)
        found = float(tf.reduce_sum(tape.gradient(total, z) ** 2))
        weights.assign_sub(tf.fill(weights.shape, shift))
        return found

    numeric = (slope_at(step) - slope_at(-step)) / (2 * step)
    np.testing.assert_allclose(tf.reduce_sum(ours[0]), numeric, rtol=2e-2)


class Restless(tf.Module):
    """Counts its calls, in a weight, in a variable beside them, or by its draws."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w = tf.Variable(1.0)
        self.fixed = tf.Variable(2.0, trainable=False)
        self.how = how

    def __call__(self, z):
        if self.how == "counts":
            self.w.assign_add(1.0)
        if self.how == "updates":
            self.fixed.assign_add(1.0)
        if self.how == "draws":
            return z * self.w + 1e-4 * np.random.normal()
        return z * self.w * self.fixed


@pytest.mark.parametrize(
    ("how", "level"), [("counts", "eager"), ("draws", "eager"), ("updates", "xla")]
)
def test_cpu_batch_compiles_what_computes_and_updates_and_does_no_more(
    how: str, level: str
) -> None:
    model = Restless(how)
    generator = qpool.parallelize(model, strategy="cpu_batch")
    values = {float(generator(tf.ones((1, 1)))[0, 0]) for _ in range(3)}
    assert len(values) == 3
    assert generator.stats()["compiled"][0]["level"] == level
    assert float(model.w) == (4.0 if how == "counts" else 1.0)
    assert float(model.fixed) == (5.0 if how == "updates" else 2.0)


def test_cpu_batch_pulls_back_through_the_call_that_was_made() -> None:
    model = Restless("")
    generator = qpool.parallelize(model, strategy="cpu_batch")
    z = tf.constant([[3.0]])
    generator(z)
    with tf.GradientTape() as tape:
        tape.watch([z, model.fixed])
        total = tf.reduce_sum(generator(z) ** 2)
    model.w.assign(5.0)
    of_z, of_w, of_fixed = tape.gradient(total, [z, model.w, model.fixed])
    np.testing.assert_allclose(np.ravel([float(of_z[0, 0]), of_w, of_fixed]), [24, 72, 36])
    assert generator.stats()["compiled"][0]["level"] == "xla"


_ELSEWHERE = tf.Variable([2.0, 0.5])


class Many(tf.Module):
    """Outputs of several kinds; variables that are trained, whole numbers, idle, or in no
    attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable([1.5, -0.5])
        self.power = tf.Variable(2, trainable=False)
        self.idle = tf.Variable(1.0)

    def __call__(self, z):
        waves = tf.sin(z * self.w) * _ELSEWHERE ** tf.cast(self.power, tf.float32)
        return {"waves": waves, "signs": tf.cast(z[:, 0] > 0, tf.int32), "lines": z * self.w}


def test_cpu_batch_gives_tapes_what_the_model_gives_them() -> None:
    """Of any kind: through gathers, persistent, by rows, of second order, in forward mode."""
    model = Many()
    generator = qpool.parallelize(model, strategy="cpu_batch")
    z = tf.constant([[1.0, 2.0], [3.0, -1.0]])
    generator(z)

    def found(call):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(z)
            made = call(z)
            total = tf.reduce_sum(made["waves"] * made["lines"])
            rows = tf.gather(made["lines"], [0, 0])
        of_all = tape.gradient(total, [z, model.w, _ELSEWHERE])
        assert tape.gradient(total, model.idle) is None
        of_rows = tape.gradient(rows, model.w)
        jacobian = tape.jacobian(made["waves"], model.w)
        model.power.assign(3)  # after the call: its gradient is that of what it computed
        later = [tape.gradient(total, model.w), tape.jacobian(made["waves"], model.w)]
        assert int(model.power) == 3
        model.power.assign(2)
        with tf.autodiff.ForwardAccumulator(model.w, tf.ones_like(model.w)) as forward:
            with tf.GradientTape() as tape:
                made = call(z)
                total = tf.reduce_sum(made["waves"] ** 2)
            slope = tape.gradient(total, model.w)
        hessian_row, pushed = forward.jvp(slope), forward.jvp(made["waves"])
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                total = tf.reduce_sum(call(z)["waves"] ** 2)
            slope = inner.gradient(total, model.w)
        hessian = outer.jacobian(slope, model.w)
        return made, of_all, of_rows, jacobian, later, hessian_row, hessian, pushed

    assert_close(found(generator), found(model))
    (compiled,) = generator.stats()["compiled"]
    assert compiled["level"] == "xla"


@pytest.mark.parametrize("called_before", [True, False])
def test_cpu_batch_is_compiled_within_a_graph_that_is_not(called_before: bool) -> None:
    model = Many()
    generator = qpool.parallelize(model, strategy="cpu_batch")
    z = tf.constant([[1.0, 2.0], [3.0, -1.0]])
    if called_before:
        generator(z)

    def step(call):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(call(z)["waves"] ** 2)
        return tape.gradient(total, [model.w, _ELSEWHERE])

    graph = tf.function(lambda: step(generator))
    assert_close(graph(), step(model))
    attributes = [
        function.definition.attr["_XlaMustCompile"].b
        for function in graph.get_concrete_function().graph._functions.values()
    ]
    assert any(attributes)
    assert generator.stats()["compiled"][0]["level"] == "xla"


_COUNTER = tf.Variable(0.0, trainable=False)


def _counted(z, w):
    _COUNTER.assign_add(1.0)
    return z * w


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (_counted, "AssignAddVariableOp"),
        (lambda z, w: z * w + w * 1e-4 * tf.random.gamma(tf.shape(z), 1.0), "RandomGamma"),
        (lambda z, w: tf.debugging.check_numerics(z * w, "bad"), "CheckNumerics"),
        (lambda z, w: tf.function(_counted)(z, w), "AssignAddVariableOp"),
    ],
    ids=["assigns", "draws", "checks", "assigns within a function"],
)
def test_cpu_batch_sees_in_the_graph_what_does_more_than_compute(function, operation) -> None:
    class Model(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(1.0)

        def __call__(self, z):
            return function(z, self.w)

    generator = qpool.parallelize(Model(), strategy="cpu_batch")
    generator(tf.ones((2, 1)))
    counted = float(_COUNTER)
    generator(tf.ones((2, 1)))
    assert float(_COUNTER) - counted == (operation == "AssignAddVariableOp")
    (compiled,) = generator.stats()["compiled"]
    assert compiled["level"] == "eager"
    assert operation in compiled["why_not_better"]


def test_cpu_batch_keeps_constants_as_they_were_and_lists_as_they_are() -> None:
    class Scaled(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(1.0)

        def __call__(self, z, scale):
            return sum(z) * self.w if isinstance(z, list) else z * self.w * scale

    generator = qpool.parallelize(Scaled(), strategy="cpu_batch")
    scale = np.array([2.0, 2.0], np.float32)
    generator(tf.ones((2, 2)), scale)
    scale[:] = 5.0
    assert np.all(generator(tf.ones((2, 2)), scale) == 5.0)
    assert np.all(generator(tf.ones((1, 2)), np.array([2.0, 2.0], np.float32)) == 2.0)
    assert float(generator([tf.constant(1.0), tf.constant(2.0)], scale)) == 3.0


def test_cpu_batch_with_an_ndarray_calls_the_model_once() -> None:
    model = Restless("updates")
    generator = qpool.parallelize(model, strategy="cpu_batch")
    generator(np.ones((2, 1), np.float32))
    assert float(model.fixed) == 3.0
    rows = generator.per_sample_gradients(np.ones((2, 1), np.float32), tf.ones((2, 1)))
    assert rows[0].shape == (2,)


@pytest.mark.parametrize("strategy", ["cpu_batch", "auto"])
def test_in_place_an_engine_that_is_never_reset_goes_on_as_stock_does(strategy: str) -> None:
    ours, stock = idioms.NeverReset(), idioms.NeverReset()
    z = Z[: idioms.BATCH]
    with qpool.parallelize(ours, strategy=strategy) as generator:
        assert_close(generator(z), stock(z))
        with pytest.warns(errors.NotCompiledWarning, match="state that an earlier call left"):
            assert_close(generator(z), stock(z))  # where it might have been reset before
        assert_close(generator(z), stock(z))


class ResetOutside(idioms.NeverReset):
    """Whose engine the loop around it resets, as tutorials have it."""

    def __call__(self, z):
        return super().__call__(z)

    def made_ready(self) -> None:
        if self.engine.run_progs:
            self.engine.reset()


def test_in_place_an_engine_that_is_reset_before_each_call_is_compiled() -> None:
    ours, stock = ResetOutside(), ResetOutside()
    z = Z[: idioms.BATCH]
    with qpool.parallelize(ours, strategy="cpu_batch") as generator:
        for _ in range(4):
            ours.made_ready()
            stock.made_ready()
            assert_close(
                value_and_gradients(generator, ours, z), value_and_gradients(stock, stock, z)
            )
        assert generator.stats()["compiled"][0]["level"] == "xla"
        with pytest.raises(errors.StatefulCallError, match="was not reset before this call"):
            generator(z)


@pytest.mark.parametrize("strategy", ["cpu_batch", "auto"])
def test_so_is_one_around_a_step_that_is_a_graph(strategy: str) -> None:
    ours, stock = ResetOutside(), ResetOutside()
    z = Z[: idioms.BATCH]
    with qpool.parallelize(ours, strategy=strategy) as generator:
        step = tf.function(lambda: value_and_gradients(generator, ours, z), autograph=False)
        for _ in range(3):
            ours.made_ready()
            stock.made_ready()
            assert_close(step(), value_and_gradients(stock, stock, z))


def test_an_engine_that_is_never_reset_is_refused_by_the_pool(worker) -> None:
    with (
        qpool.parallelize(idioms.NeverReset(), pool=worker) as generator,
        pytest.raises(errors.StatefulCallError, match=r"engine\.reset\(\) before"),
    ):
        generator(Z[: idioms.BATCH])


@pytest.mark.filterwarnings("ignore::qpool.errors.AttributeNotSetWarning")
def test_what_a_trace_puts_into_a_model_is_taken_out_again(worker) -> None:
    model, z = idioms.KeptInAttributes(), Z[:4, :2]
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        found = generator(z)
        assert generator.stats()["compiled"][0]["level"] == "xla"
        for rows in (z, z + 0.1):
            found = generator(rows)
            assert_close(photons(model.result.state), found[-1])
        found = generator(z)
    with qpool.parallelize(model, pool=worker) as generator:  # it travels
        assert_close(generator(z), found)


def test_cpu_batch_refuses_the_stock_engine() -> None:
    with pytest.raises(qpool.errors.ConfigurationError, match="sequential"):
        qpool.parallelize(small(), strategy="cpu_batch", engine="stock")


@pytest.mark.parametrize("encoding", ["classical_neural", "sparse_parameter"])
def test_other_encodings_in_the_pool(worker, encoding: str) -> None:
    model = qpool.models.QuantumSFGenerator(
        layers=1, latent_dim=2, cutoff_dim=4, encoding_strategy=encoding, seed=2
    )
    z = tf.constant(np.random.default_rng(3).normal(size=(3, 2)) * 0.4, tf.float32)
    with qpool.parallelize(model, pool=worker, tile=2) as generator:
        for call in (generator, model):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(call(z) ** 2)
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            if call is generator:
                pooled = [loss, *gradients]
        for ours, theirs in zip(pooled, [loss, *gradients], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_keras_model_with_a_preprocessing_layer(worker) -> None:
    import keras

    model = keras.Sequential([keras.Input((2,)), keras.layers.Rescaling(3.0)])
    model.add(keras.layers.Dense(1))
    with qpool.parallelize(model, pool=worker, engine="stock") as generator:
        np.testing.assert_allclose(generator(tf.ones((3, 2))), model(tf.ones((3, 2))), rtol=1e-6)
