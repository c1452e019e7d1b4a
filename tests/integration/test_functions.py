"""Functions in the place of models, and calls that are given their weights."""

from __future__ import annotations

import functools
import pickle
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import scripted
import tensorflow as tf

import qpool
from qpool import shipping
from qpool.executors.auto import course
from workers import errors
from workers.compiling import together

pytestmark = pytest.mark.filterwarnings("ignore:.*disconnected components.*")

Z = scripted.latent(5)


def options(strategy: str, worker: qpool.Pool) -> dict[str, Any]:
    return {"strategy": strategy} | ({"pool": worker} if strategy == "processes" else {})


def step(call: Callable[[], Any], sources: Sequence[Any]) -> list[np.ndarray]:
    """What it returns, and the gradient of a loss of it."""
    with tf.GradientTape() as tape:
        result = call()
        loss = tf.reduce_sum(result**2)
    return [np.asarray(x) for x in (result, *tape.gradient(loss, sources))]


def assert_same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def compiled(pooled: Any) -> list[tuple[str, bool]]:
    return [(way["level"], way["by_rows"]) for way in pooled.stats()["compiled"]]


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes", "threads"])
def test_a_function_is_a_model_with_the_variables_that_it_leads_to(worker, strategy: str) -> None:
    sources = [scripted.weights, *scripted.shifts["photons"]]
    with qpool.parallelize(scripted.generate, **options(strategy, worker)) as generate:
        assert {id(v) for v in generate.trainable_variables} == set(map(id, sources))
        assert (generate.__name__, generate.__doc__) == ("generate", scripted.generate.__doc__)
        for factor in (1.0, 1.3):
            scripted.weights.assign(scripted.weights * factor)
            expected = step(lambda: scripted.generate(Z), sources)
            assert_same(step(lambda: generate(Z), sources), expected)
        scripted.weights.assign([0.2, 0.3])
        assert compiled(generate) == [("xla", True)]
        assert str(generate).startswith("generate, pooled")


def test_so_is_a_method_a_closure_a_partial_one_and_what_a_factory_makes(worker) -> None:
    gan = scripted.Gan()
    closed = scripted.closing(0.7)
    own = closed.__closure__[0].cell_contents
    squared = functools.partial(gan.generate, power=2)
    here = {"strategy": "cpu_batch"}
    cases = (
        (gan.generate, gan.scale, here),
        (squared, gan.scale, here),
        (closed, own, {"pool": worker}),
    )
    for function, variable, where in cases:
        sources = [scripted.weights, variable]
        with qpool.parallelize(function, **where) as pooled:
            expected = step(lambda: function(Z), sources)  # noqa: B023
            assert_same(step(lambda: pooled(Z), sources), expected)
    with qpool.parallelize(lambda: scripted.closing(0.7), pool=worker) as pooled:
        np.testing.assert_allclose(pooled(Z), closed(Z), rtol=2e-5, atol=2e-5)


def test_a_global_that_is_bound_anew_is_the_new_one(monkeypatch) -> None:
    with qpool.parallelize(scripted.generate, strategy="cpu_batch") as generate:
        generate(Z)
        other = tf.Variable([0.4, -0.1])
        monkeypatch.setattr(scripted, "weights", other)
        assert_same(step(lambda: generate(Z), [other]), step(lambda: scripted.generate(Z), [other]))
        assert any(other is variable for variable in generate.trainable_variables)


def test_an_attribute_that_is_bound_anew_is_the_new_one() -> None:
    gan = scripted.Gan()
    with qpool.parallelize(gan, strategy="cpu_batch") as pooled:
        pooled.generate(Z)
        gan.scale = tf.Variable(-0.5)
        expected = step(lambda: scripted.Gan.generate(gan, Z), [gan.scale])
        assert_same(step(lambda: pooled.generate(Z), [gan.scale]), expected)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_weights_are_given_with_each_call(worker, strategy: str) -> None:
    first, second = tf.Variable([0.5, -0.3]), tf.Variable([0.1, 0.2])
    alone = [tf.Variable(0.2), tf.Variable(0.3)]
    given = [
        (lambda: first, [first]),
        (lambda: second, [second]),
        (lambda: tf.tanh(first), [first]),
        (lambda: {0: alone[0], 1: tf.sin(alone[1])}, alone),
    ]
    with qpool.parallelize(scripted.circuit, **options(strategy, worker)) as circuit:
        for weights, sources in given:
            expected = step(lambda: scripted.circuit(Z, weights()), sources)  # noqa: B023
            assert_same(step(lambda: circuit(Z, weights()), sources), expected)  # noqa: B023
        ways = 2 if strategy == "cpu_batch" else 3  # there, a variable is none to the function
        assert compiled(circuit) == [("xla", True)] * ways


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_within_a_graph(worker, strategy: str) -> None:
    weights = tf.Variable([0.5, -0.3])
    with qpool.parallelize(scripted.circuit, **options(strategy, worker)) as circuit:

        @tf.function
        def trained(z):
            with tf.GradientTape() as tape:
                result = circuit(z, tf.tanh(weights))
                loss = tf.reduce_sum(result**2)
            return result, tape.gradient(loss, weights)

        expected = step(lambda: scripted.circuit(Z, tf.tanh(weights)), [weights])
        assert_same([np.asarray(x) for x in trained(Z)], expected)


def test_a_batch_that_nobody_named_is_told_in_a_graph(worker) -> None:
    with qpool.parallelize(scripted.circuit, pool=worker) as circuit:
        unknown = tf.TensorSpec([None, 2])
        with pytest.raises(errors.InputError, match=r"name it: sharded="):
            tf.function(circuit).get_concrete_function(Z, unknown)


def test_a_gradient_of_the_gradient_for_given_weights(worker) -> None:
    weights = tf.Variable([0.5, -0.3])

    def penalty(call):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = tf.reduce_sum(call(Z, 2 * weights))
            gradient = inner.gradient(loss, weights)
            norm = tf.reduce_sum(gradient**2)
        return [gradient.numpy(), outer.gradient(norm, weights).numpy()]

    # Not against Strawberry Fields, whose gates have no second derivative.
    in_place = qpool.parallelize(scripted.circuit, strategy="cpu_batch")
    with qpool.parallelize(scripted.circuit, pool=worker) as circuit:
        for a, b in zip(penalty(circuit), penalty(in_place), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_weights_come_first_where_the_batch_is_named(worker, strategy: str) -> None:
    weights = tf.Variable([0.5, -0.3])
    named = options(strategy, worker) | {"sharded": "x"}
    with qpool.parallelize(scripted.weights_first, **named) as pooled:
        expected = step(lambda: scripted.weights_first(weights, Z), [weights])
        assert_same(step(lambda: pooled(weights, Z), [weights]), expected)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_a_list_of_batches_is_shared_out(worker, strategy: str) -> None:
    labels = tf.constant([1, 0, 2, 1, 3])
    with qpool.parallelize(scripted.of_labels, **options(strategy, worker)) as pooled:
        expected = step(lambda: scripted.of_labels([Z, labels]), [scripted.weights])
        assert_same(step(lambda: pooled([Z, labels]), [scripted.weights]), expected)
        assert [level for level, _ in compiled(pooled)] == ["xla"]


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_without_a_batch_it_is_computed_here(worker, strategy: str) -> None:
    listed, one = [tf.Variable(0.2), tf.Variable(0.3)], tf.Variable([0.2, 0.3])
    with qpool.parallelize(scripted.cost, **options(strategy, worker)) as cost:
        for weights, sources in ((listed, listed), (one, [one])):
            expected = step(lambda: scripted.cost(weights), sources)  # noqa: B023
            for _ in range(2):
                assert_same(step(lambda: cost(weights), sources), expected)  # noqa: B023
        assert compiled(cost) == [("xla", False)] * 2
    with qpool.parallelize(scripted.loss_of_the_modules, **options(strategy, worker)) as loss:
        expected = step(scripted.loss_of_the_modules, [scripted.weights])
        assert_same(step(loss, [scripted.weights]), expected)
    with qpool.parallelize(scripted.cost, **options(strategy, worker)) as cost:
        vector = tf.constant([0.2, 0.3])
        np.testing.assert_allclose(cost(vector), scripted.cost(vector), atol=1e-6)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes", "auto"])
def test_plain_values_alone_are_no_batch(worker, monkeypatch, strategy: str) -> None:
    monkeypatch.setattr(course, "SHARE", 0.0)
    gate = scripted.Gate()
    for success in (None, 0.25):
        expected = step(lambda: gate.cost(success, 1.5, [2, 2]), [gate.weights])  # noqa: B023
        for pooled in (
            qpool.parallelize(gate, methods="cost", **options(strategy, worker)).cost,
            qpool.parallelize(gate.cost, **options(strategy, worker)),
        ):
            for _ in range(2):
                found = step(lambda: pooled(success, 1.5, [2, 2]), [gate.weights])  # noqa: B023
                assert_same(found, expected)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_an_engine_and_a_program_may_be_handed_on(worker, strategy: str) -> None:
    weights = tf.Variable([[0.2, 0.3]])
    symbols = np.array([scripted.z_, scripted.w0_, scripted.w1_])
    target = np.array([0.0, 1.0, 0.0, 0.0])
    rest = symbols, scripted.engine, scripted.program, target
    with qpool.parallelize(scripted.handed, **options(strategy, worker)) as handed:
        expected = step(lambda: scripted.handed(weights, *rest), [weights])
        for _ in range(2):
            assert_same(step(lambda: handed(weights, *rest), [weights]), expected)
        assert compiled(handed) == [("xla", False)]


@pytest.mark.parametrize(("most", "level"), [(48, "xla"), (3, "graph")])
def test_a_cost_over_data_is_one_circuit(monkeypatch, most: int, level: str) -> None:
    monkeypatch.setattr(together, "_FOR_XLA", most)
    weights = tf.Variable([0.2, 0.3])
    with qpool.parallelize(scripted.fit) as fit:
        for factor in (1.0, 1.3):
            weights.assign(weights * factor)
            expected = step(lambda: scripted.fit(weights), [weights])
            assert_same(step(lambda: fit(weights), [weights]), expected)
        (way,) = fit.stats()["compiled"]
    assert (way["level"], way["together"]) == (level, True)


def test_auto_takes_them_all(monkeypatch) -> None:
    monkeypatch.setattr(course, "SHARE", 0.0)
    labels = tf.constant([1, 0, 2, 1, 3])
    weights = [tf.Variable(0.2), tf.Variable(0.3)]
    calls = [
        (scripted.of_labels, ([Z, labels],), [scripted.weights]),
        (scripted.circuit, (Z, weights), weights),
        (scripted.cost, (weights,), weights),
    ]
    for function, given, sources in calls:
        with qpool.parallelize(function) as pooled:
            expected = step(lambda: function(*given), sources)  # noqa: B023
            for _ in range(3):
                assert_same(step(lambda: pooled(*given), sources), expected)  # noqa: B023


def test_an_object_without_variables_may_be_given_them(worker) -> None:
    class Circuit:
        def __call__(self, z, w):
            return scripted.circuit(z, w)

    weights = tf.Variable([0.5, -0.3])
    with qpool.parallelize(Circuit(), pool=worker) as circuit:
        expected = step(lambda: scripted.circuit(Z, weights), [weights])
        assert_same(step(lambda: circuit(Z, weights), [weights]), expected)


def test_a_function_may_do_without_variables_and_without_circuits(worker) -> None:
    with qpool.parallelize(lambda z: 2 * z, pool=worker) as pooled:
        np.testing.assert_allclose(pooled(Z), 2 * Z)


def test_a_class_is_told_from_an_object_of_it() -> None:
    class Needs:
        def __init__(self, cutoff):
            self.cutoff = cutoff

    with pytest.raises(errors.ModelError, match=r"lambda: Needs\(\.\.\.\)"):
        qpool.parallelize(Needs)


def test_variables_of_a_module_are_the_coordinators_in_every_worker(worker) -> None:
    """A worker that imports the module has others, of other values."""
    model = scripted.OfTheModule()
    scripted.weights.assign([0.7, -0.4])  # the module's own, when it is imported, are others
    with qpool.parallelize(model, pool=worker) as pooled:
        for _ in range(2):
            expected = step(lambda: model(Z), [model.own, scripted.weights])
            assert_same(step(lambda: pooled(Z), [model.own, scripted.weights]), expected)
            found = pooled.loss_and_gradient(Z, scripted.loss)
            np.testing.assert_allclose(found.loss, tf.reduce_mean(scripted.loss(model(Z))), 1e-5)
            scripted.weights.assign([0.2, 0.3])
        assert [way["in_workers"] for way in pooled.stats()["losses"]] == [True]


@pytest.mark.parametrize("strategy", ["processes", "threads"])
@pytest.mark.parametrize("given", [tf.Variable, tf.constant])
def test_a_vector_that_is_no_batch_is_computed_here(worker, strategy: str, given: Any) -> None:
    weights = given([0.5, -0.3, 0.2])

    def cost(weights: tf.Tensor) -> tf.Tensor:
        return scripted.cost(weights[:2]) * weights[2]

    def of(call: Callable[..., Any]) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            found = call(weights)
        return [found.numpy(), tape.gradient(found, weights).numpy()]

    with qpool.parallelize(cost, **options(strategy, worker)) as pooled:
        for _ in range(2):
            assert_same(of(pooled), of(cost))
        assert compiled(pooled) == [("xla", False)]


def test_what_fails_with_a_vector_as_it_is_fails_as_it_did(worker) -> None:
    def never(z: tf.Tensor) -> tf.Tensor:
        raise ValueError("not this one")

    with (
        qpool.parallelize(never, pool=worker) as pooled,
        pytest.raises(qpool.errors.RemoteError, match="not this one"),
    ):
        pooled(tf.constant([0.1, 0.2, 0.3]))


def test_the_main_script_of_a_multiprocessing_child_travels_along(monkeypatch) -> None:
    script = types.ModuleType("__mp_main__")
    monkeypatch.setitem(sys.modules, "__mp_main__", script)
    script.Model = type("Model", (), {"__module__": "__mp_main__", "__call__": lambda _, z: 3 * z})
    payload = shipping.pack(script.Model()).payload
    monkeypatch.delitem(sys.modules, "__mp_main__")
    assert pickle.loads(payload).model(2.0) == 6.0


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes", "threads"])
def test_a_helper_that_is_defined_anew_is_seen(worker, strategy: str) -> None:
    """As in a notebook, whose cells are run again."""
    scale = tf.Variable(2.0)

    def helper(x):
        return scale * x

    def generate(z):
        return tf.stack([helper(row) for row in z])

    z = tf.constant([[1.0], [2.0], [3.0]])
    options = {"pool": worker} if strategy == "processes" else {"strategy": strategy}
    with qpool.parallelize(generate, **options) as pooled:
        np.testing.assert_allclose(pooled(z), 2.0 * z)

        def helper(x):
            return scale * x**2

        for _ in range(2):
            np.testing.assert_allclose(pooled(z), 2.0 * z**2)


def test_what_a_function_leaves_in_its_module_is_of_the_last_call() -> None:
    def steps(call):
        scripted.kept.clear()
        for n in range(3):
            z = Z * (1 + 0.1 * n)
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(call(z)) + scripted.last.fidelity_vacuum() + scripted.kept[-1]
            yield loss, *tape.gradient(loss, [scripted.weights])

    expected = list(steps(scripted.leaving))
    with qpool.parallelize(scripted.leaving, strategy="cpu_batch") as pooled:
        for ours, stock in zip(steps(pooled), expected, strict=True):
            np.testing.assert_allclose(ours[0], stock[0], rtol=1e-5)
            np.testing.assert_allclose(ours[1], stock[1], rtol=1e-4, atol=1e-5)
        assert len(scripted.kept) == 3
        assert pooled.stats()["compiled"][0]["level"] == "xla"
