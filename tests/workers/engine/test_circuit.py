"""A circuit's gradient with and without checkpointing, and its loops; what it computes is
``test_engine``'s."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import tensorflow as tf

from workers.engine import circuit
from workers.engine.plan import KINDS, Circuit, Gate

GATES = (
    Gate("displacement", (0,), (0, 1)),
    Gate("beamsplitter", (0, 1), (2, 3)),
    Gate("kerr", (0,), (4,)),
)
#: The displacement differs from sample to sample.
BATCHED = (True, True, False, False, False)

Context = Callable[[], AbstractContextManager[None]]


def parameters(batched: tuple[bool, ...]) -> list[tf.Tensor]:
    angles, shifts = [0.3, 0.8, 0.9, 0.1, 0.15], np.linspace(0.0, 0.3, 3)
    return [
        tf.constant(a + shifts if flag else a, tf.float64)
        for a, flag in zip(angles, batched, strict=True)
    ]


@pytest.mark.parametrize(("batched", "prepared"), [(BATCHED, False), ((False,) * 5, True)])
def test_checkpointing_changes_no_derivative(batched: tuple[bool, ...], prepared: bool) -> None:
    what = Circuit(2, 3, "complex128", GATES, batched, prepared)
    draws = np.random.default_rng(0).normal(size=(2, 3, 3))
    state = tf.constant(0.2 * (draws[0] + 1j * draws[1])) if prepared else None

    def derivatives(context: Context) -> list[tf.Tensor]:
        @tf.function(autograph=False)
        def value(values: list[tf.Tensor], state: tf.Tensor | None) -> tf.Tensor:
            with context():
                ket = circuit.run(what, values, state)
            return tf.reduce_sum(tf.abs(ket) ** 2 * tf.range(3, dtype=tf.float64), -1)

        values = parameters(batched)
        watched = values if state is None else [*values, state]
        with tf.GradientTape() as outer:
            outer.watch(watched)
            with tf.GradientTape() as inner:
                inner.watch(watched)
                total = tf.reduce_sum(value(values, state) ** 2)
            slopes = inner.gradient(total, watched)
            again = tf.add_n([tf.reduce_sum(tf.abs(slope) ** 2) for slope in slopes])
        return [total, *slopes, *outer.gradient(again, watched)]

    plain, checkpointed = derivatives(nullcontext), derivatives(circuit.checkpointing)
    for ours, theirs in zip(checkpointed, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert all(np.any(np.abs(plain[n]) > 1e-6) for n in (1, 3))  # r, theta


@pytest.mark.parametrize("batched", [BATCHED, (False,) * 5])
def test_operation_by_operation_nothing_is_traced_and_the_numbers_are_the_same(batched) -> None:
    what = Circuit(2, 3, "complex128", GATES, batched)
    values = parameters(batched)

    def ket_and_slopes() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(values)
            ket = circuit.run(what, values, None)
            total = tf.reduce_sum(tf.abs(ket) ** 2 * tf.range(3, dtype=tf.float64))
        return [ket, *tape.gradient(total, values)]

    def traced() -> int:
        return circuit._compiled(what).experimental_get_tracing_count()

    before = traced()
    with circuit.untraced():
        step_by_step = ket_and_slopes()
    assert traced() == before
    at_once = ket_and_slopes()
    assert traced() > before
    for ours, theirs in zip(step_by_step, at_once, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


def test_little_leaves_what_is_compiled_for_a_checkpointed_gradient() -> None:
    what = Circuit(2, 3, "complex128", GATES, BATCHED)
    values = parameters(BATCHED)

    def kept(context: Context) -> int:
        @tf.function(jit_compile=True, autograph=False)
        def ket(*values: tf.Tensor) -> tf.Tensor:
            with context():
                return circuit.run(what, values, None)

        @tf.function(autograph=False)
        def step(*values: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(values)
                found = ket(*values)
            return tape.gradient(found, values)

        operations = step.get_concrete_function(*values).graph.get_operations()
        return max(len(o.outputs) for o in operations if "PartitionedCall" in o.type)

    assert kept(circuit.checkpointing) < 20 < 40 < kept(nullcontext)


def layers(count: int, modes: int) -> tuple[Circuit, int]:
    """A CV neural network of equal layers, and how many parameters it has."""
    gates: list[Gate] = []
    numbers = itertools.count()

    def add(kind: str, *axes: int) -> None:
        parameters = tuple(next(numbers) for _ in KINDS[kind].parameters)
        gates.append(Gate(kind, axes, parameters))

    for _ in range(count):
        for single in ("squeezing", "displacement"):
            for mode in range(modes - 1):
                add("beamsplitter", mode, mode + 1)
            for mode in range(modes):
                add("rotation", mode)
                add(single, mode)
        for mode in range(modes):
            add("kerr", mode)
    total = next(numbers)
    return Circuit(modes, 4, "complex128", tuple(gates), (False,) * total), total


@pytest.mark.parametrize("modes", [1, 2, 3])
def test_depth_is_a_loop(modes: int) -> None:
    found = {count: circuit.runs_of(layers(count, modes)[0], 10**6, 1)[1] for count in (3, 6, 24)}
    longest = {count: max(runs, key=lambda run: run.size) for count, runs in found.items()}
    assert len({len(runs) for runs in found.values()}) == 1
    assert len({run.period for run in longest.values()}) == 1
    assert longest[24].count - longest[6].count == 6 * (longest[6].count - longest[3].count)


def both_ways(
    what: Circuit, parameters: list[tf.Tensor], state: tf.Tensor | None, monkeypatch
) -> None:
    """The state and its derivatives, in a loop and step by step."""
    size = what.cutoff**what.axes

    def ket_and_slopes() -> list[tf.Tensor]:
        @tf.function(jit_compile=True, autograph=False)
        def compiled(values: list[tf.Tensor]) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(values)
                ket = circuit.run(what, values, state)
                weights = tf.range(size, dtype=tf.float64)
                total = tf.reduce_sum(tf.abs(tf.reshape(ket, [-1, size])) ** 2 * weights)
            return [ket, *tape.gradient(total, values)]

        return compiled(parameters)

    circuit.runs_of.cache_clear()
    looped = ket_and_slopes()
    monkeypatch.setattr(circuit, "_KEPT", 0)
    circuit.runs_of.cache_clear()
    try:
        for ours, theirs in zip(looped, ket_and_slopes(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)
    finally:
        circuit.runs_of.cache_clear()


@pytest.mark.parametrize("modes", [1, 3])
def test_a_loop_gives_what_its_steps_give_one_by_one(modes: int, monkeypatch) -> None:
    what, total = layers(4, modes)
    draws = np.random.default_rng(3).normal(size=total) * 0.2
    both_ways(what, [tf.constant(x, tf.float64) for x in draws], None, monkeypatch)


#: Layers that repeat: gates of samples among those of weights, pairs that keep the sum and the
#: difference of photons, a mixed state with losses, phases alone.
LAYERS = {
    "data again in each layer": (
        ("displacement", (0,), "sw"),
        ("beamsplitter", (0, 1), "ww"),
        ("squeezing", (1,), "ww"),
        ("kerr", (0,), "s"),
    ),
    "sums and differences": (
        ("two_mode_squeezing", (0, 1), "ww"),
        ("beamsplitter", (1, 0), "ww"),
        ("cross_kerr", (0, 1), "s"),
        ("displacement", (0,), "ww"),
    ),
    "a ket and a bra": (
        ("displacement", (0,), "ww"),
        ("displacement", (1,), "ww", True),
        ("loss", (0, 1), "t"),
        ("squeezing", (0,), "ss"),
        ("squeezing", (1,), "ss", True),
        ("cubic_phase", (0,), "w"),
        ("cubic_phase", (1,), "w", True),
    ),
    "phases alone": (
        ("kerr", (0,), "s"),
        ("beamsplitter", (0, 1), "sw"),
        ("rotation", (1,), "s"),
        ("mach_zehnder", (0, 1), "ws"),
    ),
}


@pytest.mark.parametrize(
    ("name", "prepared"), list(zip(LAYERS, (False, False, True, True), strict=True))
)
def test_layers_of_every_kind_in_a_loop(name: str, prepared: bool, monkeypatch) -> None:
    draws = np.random.default_rng(5)
    gates, parameters, flags = [Gate("displacement", (0,), (0, 1))], [0.4, 0.1], [False, False]
    for _ in range(3):
        for kind, axes, of, *conjugate in LAYERS[name]:
            places = tuple(range(len(parameters), len(parameters) + len(of)))
            gates.append(Gate(kind, axes, places, bool(conjugate)))
            flags += [letter == "s" for letter in of]
            for letter in of:
                low, high = (0.7, 0.95) if letter == "t" else (-0.3, 0.3)
                parameters.append(draws.uniform(low, high, 3 if letter == "s" else None))
    what = Circuit(2, 4, "complex128", tuple(gates), tuple(flags), prepared, prepared)
    state = draws.normal(size=(2, 3, 4, 4)) / 4
    ket = tf.constant(state[0] + 1j * state[1]) if prepared else None
    runs = circuit.runs_of(what, len(circuit.plan(what)), 3)[1]
    assert max(run.count for run in runs) > 1, runs
    both_ways(what, [tf.constant(x, tf.float64) for x in parameters], ket, monkeypatch)
