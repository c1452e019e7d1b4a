"""Gradients of compiled functions by one program more are those that TensorFlow has eagerly."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.ops import resource_variable_ops

from workers.compiling import compiled
from workers.compiling.taped import Taped
from workers.tensors import differentiable, leaves


def taped(function: Callable[..., Any], inputs: int = 1) -> Taped:
    """``function`` compiled, with ``made`` for how many pull-backs it has been asked for."""

    def pull_back(variables: Any, asked: tuple[bool, ...]) -> Any:
        def pulled(*given: tf.Tensor) -> Any:
            sources = [*filter(differentiable, given[:inputs]), *variables]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                outputs = list(itertools.compress(leaves(function(*given[:inputs])), asked))
            return tape.gradient(outputs, sources, output_gradients=given[inputs:])

        return compiled.at_level(pulled, "xla")

    return Taped(compiled.at_level(function, "xla"), pull_back, contextlib.nullcontext)


@pytest.fixture
def w() -> tf.Variable:
    return tf.Variable([0.5, -1.0, 2.0])


@pytest.fixture
def z() -> tf.Tensor:
    return tf.constant([[0.1, 0.2, 0.3], [0.4, -0.5, 0.6]])


def same(ours: Any, theirs: Any) -> None:
    tf.nest.assert_same_structure(ours, theirs)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)


def test_outputs_of_any_structure_and_kind(w: tf.Variable, z: tf.Tensor) -> None:
    unused = tf.Variable(3.0)

    def function(z: tf.Tensor) -> Any:
        amplitude = tf.complex(tf.sin(z * w), z)
        return {"n": tf.argmax(z, 1), "a": (amplitude, None), "own": unused * 1.0}

    def gradients(call: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(z)
            found = call(z)
            loss = tf.reduce_sum(
                tf.abs(found["a"][0]) ** 2 * tf.cast(found["n"], tf.float32)[:, None]
            )
        return found, tape.gradient(loss, [z, w])

    same(gradients(taped(function)), gradients(function))


def test_what_nothing_depends_on_has_no_gradient(w: tf.Variable, z: tf.Tensor) -> None:
    other = tf.Variable(1.0)

    def function(z: tf.Tensor) -> Any:
        return z * w, tf.stop_gradient(other) * 2.0

    call = taped(function)
    with tf.GradientTape() as tape:
        found = call(z)[0]
    assert tape.gradient(found, [z, other]) == [None, None]  # z is not watched


def test_where_nothing_is_watched_nothing_is_recorded(w: tf.Variable, z: tf.Tensor) -> None:
    asked = []
    forward = compiled.at_level(lambda z: z * w, "xla")
    call = Taped(forward, lambda _: asked.append(1), contextlib.nullcontext)  # type: ignore[arg-type, func-returns-value]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        other = tf.constant(1.0)
        tape.watch(other)
        found = call(z)
    assert tape.gradient(found, other) is None
    same(found, z * w)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_gradient_is_that_of_the_values_at_the_call(
    w: tf.Variable, z: tf.Tensor, persistent: bool
) -> None:
    call = taped(lambda z: tf.reduce_sum(z * w**2))
    with tf.GradientTape(persistent) as tape:
        loss = call(z)
    before = w.numpy()
    w.assign(10 * w)
    for _ in range(1 + persistent):
        same(tape.gradient(loss, w), 2 * before * tf.reduce_sum(z, 0))
        same(w.numpy(), 10 * before)


@pytest.mark.parametrize("assigned", [False, True])
def test_within_a_graph_too_it_is_that_of_the_values_at_the_call(
    w: tf.Variable, z: tf.Tensor, assigned: bool
) -> None:
    call, before = taped(lambda z: z * w**2), w.numpy()

    def recorded() -> Any:
        w.assign(before)
        with tf.GradientTape() as tape:
            found = call(z)
        if assigned:
            w.assign(10 * w)
        return tape, found

    tape, found = recorded()
    same(tape.jacobian(found, w), np.stack([np.diag(2 * before * row) for row in z.numpy()]))
    tape, found = recorded()
    graph = tf.function(lambda: tape.gradient(found, w))
    for _ in range(2):
        same(graph(), 2 * before * tf.reduce_sum(z, 0))
    same(w.numpy(), (10 if assigned else 1) * before)


def test_a_graph_has_the_values_of_several_calls(w: tf.Variable, z: tf.Tensor) -> None:
    call, tapes, before = taped(lambda z: z * w**2), [], []
    for _ in range(2):
        with tf.GradientTape() as tape:
            found = call(z)
        tapes.append((tape, found))
        before.append(w.numpy())
        w.assign(10 * w)
    graph = tf.function(lambda: [tape.gradient(found, w) for tape, found in tapes])
    for _ in range(2):
        same(graph(), [2 * then * tf.reduce_sum(z, 0) for then in before])


@pytest.mark.parametrize("eagerly", [True, False])
@pytest.mark.parametrize("assigned", [True, False])
def test_derivatives_of_a_gradient_of_then(
    w: tf.Variable, z: tf.Tensor, eagerly: bool, assigned: bool
) -> None:
    before = w.numpy()

    def derivatives(call: Any) -> Any:
        w.assign(before)
        with tf.GradientTape() as outer:
            outer.watch(z)
            with tf.GradientTape(persistent=True) as inner:
                inner.watch(z)
                found = call(z)
            if assigned:
                w.assign(10 * w)
            slopes = inner.gradient(found, w) if eagerly else inner.jacobian(found, [z, w])
            total = tf.add_n([tf.reduce_sum(x**2) for x in tf.nest.flatten(slopes)])
        return slopes, outer.gradient(total, [z, w]), w.numpy()

    same(
        derivatives(taped(lambda z: tf.sin(z * w) * w**3)),
        derivatives(lambda z: tf.sin(z * w) * w**3),
    )


@pytest.mark.parametrize("assigned", [True, False])
def test_a_tape_that_listens_later_knows_the_cotangents_alone(
    w: tf.Variable, z: tf.Tensor, assigned: bool
) -> None:
    before = w.numpy()

    def derivatives(call: Any) -> Any:
        w.assign(before)
        cotangents = tf.ones([2, 3])
        with tf.GradientTape() as tape:
            found = call(z)
        if assigned:
            w.assign(10 * w)
        with tf.GradientTape(persistent=True) as later:
            later.watch(cotangents)
            slope = tape.gradient(found, w, output_gradients=cotangents)
            total = tf.reduce_sum(slope**2)
        w.assign(before - 1)
        found = [later.gradient(total, x) for x in (cotangents, w)]
        return slope, found

    same(derivatives(taped(lambda z: z * w**2)), derivatives(lambda z: z * w**2))


def test_what_others_do_to_the_variables_meanwhile_stays(w: tf.Variable, z: tf.Tensor) -> None:
    call = taped(lambda z: z * w)
    with tf.GradientTape() as tape:
        found = call(z)
    w.assign_add(tf.ones(3))
    seen = [w.numpy()]
    assigned = resource_variable_ops.BaseResourceVariable.assign

    def noting(variable: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(variable)
        return assigned(variable, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for kind in (resource_variable_ops.BaseResourceVariable, type(w)):
            patch.setattr(kind, "assign", noting)
        same(tape.gradient(found, w), tf.reduce_sum(z, 0))
    assert len(seen) == 1
    same(w.numpy(), seen[0])


def test_a_cotangent_for_all_numbers(w: tf.Variable, z: tf.Tensor) -> None:
    call = taped(lambda z: z * w)
    with tf.GradientTape() as tape:
        found = call(z)
    same(tape.gradient(found, w, output_gradients=tf.constant(2.0)), 2 * tf.reduce_sum(z, 0))


def test_a_gradient_that_fails_leaves_the_variables(w: tf.Variable, z: tf.Tensor) -> None:
    call = taped(lambda z: z * w)
    with tf.GradientTape() as tape:
        found = call(z)
    w.assign(10 * w)
    now = w.numpy()
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        tape.gradient(found, w, output_gradients=tf.ones([3, 5]))
    same(w.numpy(), now)


def test_derivatives_of_second_order(w: tf.Variable, z: tf.Tensor) -> None:
    def function(z: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.sin(z * w) * w**3, 1)

    def derivatives(call: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(z)
            with tf.GradientTape() as inner:
                inner.watch(z)
                found = call(z)
            first = inner.gradient(found, [z, w])
            total = tf.reduce_sum(first[0] ** 2) + tf.reduce_sum(first[1] ** 2)
        return outer.gradient(total, [z, w])

    same(derivatives(taped(function)), derivatives(function))


def test_forward_mode_alone_and_over_a_tape(w: tf.Variable, z: tf.Tensor) -> None:
    def function(z: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.sin(z * w) * w**3, 1)

    def derivatives(call: Any) -> Any:
        with tf.autodiff.ForwardAccumulator(w, tf.ones_like(w)) as forward:
            alone = call(z)
        with (
            tf.autodiff.ForwardAccumulator(w, tf.ones_like(w)) as over,
            tf.GradientTape() as tape,
        ):
            found = call(z)
            gradient = tape.gradient(found, w)
        return forward.jvp(alone), over.jvp(found), over.jvp(gradient)

    same(derivatives(taped(function)), derivatives(function))


def test_a_variable_that_is_not_trained_and_is_watched(z: tf.Tensor) -> None:
    scale = tf.Variable([1.0, 2.0, 3.0], trainable=False)
    call = taped(lambda z: z * scale)
    with tf.GradientTape() as tape:
        tape.watch(scale)
        found = call(z)
    same(tape.gradient(found, scale), tf.reduce_sum(z, 0))
    with tf.GradientTape() as tape:
        found = call(z)
    assert tape.gradient(found, scale) is None


def test_cotangents_that_are_slices(w: tf.Variable, z: tf.Tensor) -> None:
    call = taped(lambda z: z * w)
    with tf.GradientTape() as tape:
        rows = tf.gather(call(z), [1, 1])
    same(tape.gradient(rows, w), 2 * z[1])


def test_within_a_graph(w: tf.Variable, z: tf.Tensor) -> None:
    call = taped(lambda z: z * w**2)

    @tf.function
    def gradient(z: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            found = call(z)
        return tape.gradient(found, w)

    same(gradient(z), 2 * w * tf.reduce_sum(z, 0))


def test_what_the_function_is_by_then_is_of_no_matter(w: tf.Variable, z: tf.Tensor) -> None:
    scale = [2.0]
    call = taped(lambda z: z * w * scale[0])
    with tf.GradientTape() as tape:
        found = call(z)
    scale[0] = 100.0
    same(tape.gradient(found, w), 2 * tf.reduce_sum(z, 0))


def test_what_only_outputs_that_nobody_asks_for_depend_on_has_no_gradient(w) -> None:
    v = tf.Variable([1.0, 3.0])

    def function(z):
        return {"x": z * w, "y": tf.reduce_sum(v**2), "n": tf.constant([1, 2]), "z": 0.0 * v}

    call, z = taped(function), tf.ones([3])
    for loss in (
        lambda found: tf.reduce_sum(found["x"] ** 2),
        lambda found: found["y"] ** 2,
        lambda found: found["y"] + tf.reduce_sum(found["x"]),
        lambda found: tf.reduce_sum(found["z"]),
        lambda found: 0.0 * tf.reduce_sum(found["x"]),
    ):
        gradients = []
        for f in (call, function, call):
            with tf.GradientTape() as tape:
                tape.watch(z)
                value = loss(f(z))
            gradients.append(tape.gradient(value, [z, w, v]))
        for ours, stock, again in zip(*gradients, strict=True):
            assert (ours is None) == (stock is None) == (again is None)
            if stock is not None:
                np.testing.assert_allclose(ours, stock)
                np.testing.assert_allclose(again, stock)
