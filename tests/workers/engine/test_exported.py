"""Functions as modules: the numbers and derivatives of the function, traced by one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
import tensorflow as tf

from workers import cache
from workers.engine import exported
from workers.engine.exported import Exportable, Modules

TABLE = tf.constant(np.linspace(0.1, 1.0, 64).reshape(8, 8), tf.float32)
X = tf.constant([0.3, -0.7], tf.float32)
W = tf.constant(np.linspace(-1.0, 1.0, 8), tf.float32)


class Counted:
    """A function of two tensors, which counts how often it is traced."""

    def __init__(self, captured: tf.Tensor = TABLE) -> None:
        self.traces = 0
        self._captured = captured

    def __call__(self, x: tf.Tensor, w: tf.Tensor) -> list[tf.Tensor]:
        self.traces += 1
        product = tf.linalg.matvec(self._captured, tf.sin(w))
        return [tf.exp(x)[:, None] * product, tf.reduce_sum(x) * tf.reduce_prod(tf.cos(w))]


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(exported, "_held", type(exported._held)())
    monkeypatch.setenv("TF_XLA_FLAGS", f"{cache._FLAG}{tmp_path}")
    return tmp_path


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return tf.function(lambda *args: function(*args), jit_compile=True, autograph=False)


def total(outputs: list[tf.Tensor]) -> tf.Tensor:
    return tf.reduce_sum(outputs[0] ** 2) + outputs[1]


def derivatives(call: Callable[..., list[tf.Tensor]]) -> list[Any]:
    """The outputs, their first and their second derivatives, each compiled alone and on tapes
    within and without."""

    def first(x: tf.Tensor, w: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            value = total(call(x, w))
        return tape.gradient(value, [x, w])

    def second(x: tf.Tensor, w: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            gradients = first(x, w)
            norm = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
        return tape.gradient(norm, [x, w])

    with tf.GradientTape(persistent=True) as outer:
        outer.watch([X, W])
        with tf.GradientTape() as inner:
            inner.watch([X, W])
            value = total(compiled(call)(X, W))
        outside = inner.gradient(value, [X, W])
        norm = tf.add_n([tf.reduce_sum(g**2) for g in outside])
    twice_outside = outer.gradient(norm, [X, W])
    found = [compiled(call)(X, W), compiled(first)(X, W), compiled(second)(X, W)]
    return tf.nest.flatten([found, outside, twice_outside])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_values_and_derivatives_are_the_functions(checkpointed: bool) -> None:
    function = Counted()
    exportable = Exportable("counted", function, (TABLE,))

    def call(x: tf.Tensor, w: tf.Tensor) -> list[tf.Tensor]:
        return exportable(x, w, checkpointed=checkpointed)

    expected = derivatives(function)
    function.traces = 0
    for came, there in zip(derivatives(call), expected, strict=True):
        np.testing.assert_allclose(came, there, rtol=2e-6, atol=1e-6)
    traces = function.traces
    derivatives(call)
    assert function.traces == traces, "the second time, nothing is traced"
    with exported.written_out():
        compiled(call)(X, W)
    assert function.traces == traces + 1


def test_what_is_not_known_to_all_processes_is_written_out(nothing_held: Path) -> None:
    function = Counted()
    found = compiled(Exportable("of its own", function))(X, W)
    np.testing.assert_allclose(found[0], function(X, W)[0], rtol=1e-6)
    assert not list(nothing_held.glob("kept-*"))


def test_a_graph_that_is_not_for_xla_and_unknown_shapes_are_written_out() -> None:
    function = Counted()
    exportable = Exportable("counted", function, (TABLE,))
    tf.function(lambda x, w: exportable(x, w), autograph=False)(X, W)
    unknown = [tf.TensorSpec([None]), tf.TensorSpec([8])]
    tf.function(lambda x, w: exportable(x, w), unknown, jit_compile=True, autograph=False)(X, W)
    assert len(exported._held) == 0
    compiled(exportable)(X, W)
    assert len(exported._held) == 1


def test_loops_over_it_are_vectorised() -> None:
    exportable = Exportable("counted", Counted(), (TABLE,))
    stack = tf.stack([X, 2 * X, X - 1])

    def gradient(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = total(exportable(x, W))
        return tape.gradient(value, x)

    def jacobian(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = exportable(x, W)[0]
        return tape.jacobian(value, x, experimental_use_pfor=True)

    def values(x: tf.Tensor) -> tf.Tensor:
        return exportable(x, W)[0]

    for function in (values, gradient):
        found = compiled(lambda rows, f=function: tf.vectorized_map(f, rows, False))(stack)
        for row, x in zip(found, stack, strict=True):
            np.testing.assert_allclose(row, compiled(function)(x), rtol=2e-6)
    with exported.written_out():
        expected = compiled(jacobian)(X)
    np.testing.assert_allclose(compiled(jacobian)(X), expected, rtol=2e-6)


@pytest.mark.parametrize("damage", ["torn", "another version", "not ours"])
def test_a_damaged_file_is_made_anew(nothing_held: Path, damage: str, caplog) -> None:
    function = Counted()
    exportable = Exportable("counted", function, (TABLE,))
    expected = compiled(exportable)(X, W)
    (file,) = nothing_held.glob("kept-*")
    whole = file.read_bytes()
    if damage == "torn":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "another version":
        cache._write(file, b"{}\n")
    else:
        file.write_bytes(b"")
    exported._held.clear()
    assert function.traces == 1
    found = compiled(exportable)(X, W)
    assert function.traces == 2
    assert caplog.text.count("made anew") == 1
    exported._held.clear()
    compiled(exportable)(X, W)
    assert function.traces == 2
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_where_nothing_can_be_written_it_works_without(nothing_held: Path, monkeypatch) -> None:
    monkeypatch.setenv("TF_XLA_FLAGS", f"{cache._FLAG}{nothing_held / 'no such folder'}")
    compiled(Exportable("counted", Counted(), (TABLE,)))(X, W)
    assert not (nothing_held / "no such folder").exists()


def test_modules_as_bytes() -> None:
    exportable = Exportable("counted", Counted(), (TABLE,))
    with exported._apart("counted"):
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in (X, W)]
        modules = exported._Traced(exportable, specs).modules()
    assert modules.outputs == 2
    assert modules.pull_back is not None
    assert Modules.from_bytes(modules.to_bytes()) == modules


CIRCUIT = """
    import hashlib, os
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3")
    from workers import cache
    os.environ.update(cache.environment(1))
    import tensorflow as tf
    from workers.engine import circuit, plan
    from workers.compiling import compiled

    traced = []
    run = circuit._run
    circuit._run = lambda *a, **k: traced.append(1) or run(*a, **k)
    gates = (
        plan.Gate("displacement", (0,), (0, 1)),
        plan.Gate("squeezing", (1,), (2, 3)),
        plan.Gate("beamsplitter", (0, 1), (4, 5)),
    )
    what = plan.Circuit(2, 4, "complex64", gates, (True, True, False, False, False, False))

    def gradients(z, w):
        with tf.GradientTape() as tape:
            tape.watch(w)
            ket = circuit.run(what, [*tf.unstack(z), *tf.unstack(w)], None)
            value = tf.reduce_sum(tf.math.real(ket[:, 1, 0]))
        return value, tape.gradient(value, w)

    call = compiled.at_level(gradients, "xla", "gradients")
    found = call(tf.ones([2, 3]) / 3, tf.linspace(0.1, 0.4, 4))
    told = b"".join(x.numpy().tobytes() for x in found)
    print(len(traced), hashlib.sha256(told).hexdigest())
"""


def test_another_process_traces_no_circuit(tmp_path: Path) -> None:
    def run() -> list[str]:
        return programs.run(CIRCUIT, tmp_path).stdout.split()

    (first, numbers), again = run(), run()
    assert first == "1"
    assert again == ["0", numbers]
    compiled_code = list(tmp_path.glob("*/xla_compile_cache_*"))
    assert run() == again
    assert list(tmp_path.glob("*/xla_compile_cache_*")) == compiled_code
