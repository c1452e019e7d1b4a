"""Post-selection through the traced engine: values and gradients are stock Strawberry Fields'."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from workers import sf_compat

sf_compat.install()

import strawberryfields as sf  # noqa: E402
from strawberryfields import ops  # noqa: E402

from workers.engine import TracedEngine  # noqa: E402

BATCH = [0.3, -0.2, 0.5]


def found(engine, measure, x, *, modes=3, named=(), compiled=None, **options):
    """The step, eager or ``compiled`` to "graph" or "xla"."""
    program = sf.Program(modes)
    a = program.params("a")
    others = [program.params(name) for name, _ in named]
    with program.context as q:
        ops.Dgate(a, 0.3) | q[0]
        ops.Sgate(0.4) | q[1]
        ops.BSgate(0.6, 0.2) | (q[0], q[1])
        if modes > 2:
            ops.BSgate(0.4, a) | (q[1], q[2])
        measure(q, *others)
        ops.BSgate(0.3, 0.1) | (q[0], q[modes - 1])
    dtype = options.setdefault("dtype", tf.complex128)
    values = [tf.constant(value, dtype.real_dtype) for value in (x, *(v for _, v in named))]

    def step():
        with tf.GradientTape() as tape:
            tape.watch(values)
            args = dict(zip(["a", *(name for name, _ in named)], values, strict=True))
            made = engine("tf", backend_options={"cutoff_dim": 4, **options})
            result = made.run(program, args=args)
            state = result.state
            total = tf.reduce_sum(
                state.mean_photon(0)[0] + state.fock_prob([1] + [0] * (modes - 1))
            )
        return [total, result.samples, *tape.gradient(total, values)]

    if compiled:
        step = tf.function(step, autograph=False, jit_compile=compiled == "xla")
    return step()


def assert_same(measure, x, *, atol=1e-10, to=(None, "graph"), **options) -> None:
    stock = found(sf.Engine, measure, x, **options)
    for compiled in to:
        ours = found(TracedEngine, measure, x, compiled=compiled, **options)
        for a, b in zip(ours, stock, strict=True):
            if b is not None:
                np.testing.assert_allclose(a, b, atol=atol)


MEASURES = {
    "fock": lambda q: ops.MeasureFock(select=1) | q[1],
    "fock 0": lambda q: ops.MeasureFock(select=0) | q[0],
    "x": lambda q: ops.MeasureHomodyne(0.0, select=0.3) | q[1],
    "p": lambda q: ops.MeasureHomodyne(np.pi / 2, select=-0.2) | q[2],
    "angle": lambda q: ops.MeasureHomodyne(0.7, select=0) | q[0],
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"pure": False}], ids=str)
def test_as_in_strawberry_fields(measure: str, options) -> None:
    xla = measure in ("fock", "angle") and not options  # which takes seconds to compile each
    to = (None, "xla" if xla else "graph")
    assert_same(MEASURES[measure], BATCH if options.get("batch_size") else 0.4, to=to, **options)


@pytest.mark.parametrize("measure", ["fock", "x"])
def test_in_single_precision_and_at_cutoff_two(measure: str) -> None:
    assert_same(MEASURES[measure], 0.4, dtype=tf.complex64, atol=1e-5)
    assert_same(MEASURES[measure], 0.4, cutoff_dim=2)


def test_several_modes_and_a_number_for_each_sample() -> None:
    """Strawberry Fields projects several at once onto those of other modes; not one by one."""

    def together(q):
        ops.MeasureFock(select=[1, 0]) | (q[0], q[2])

    def one_by_one(q):
        ops.MeasureFock(select=1) | q[0]
        ops.MeasureFock(select=0) | q[2]

    for x, options in ((0.4, {}), (BATCH, {"batch_size": 3}), (0.4, {"pure": False})):
        ours = found(TracedEngine, together, x, compiled="graph", **options)
        stock = found(sf.Engine, one_by_one, x, **options)
        for a, b in zip(ours, stock, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_a_parameter_or_a_tensor_says_what_is_selected_of_each_sample() -> None:
    """Strawberry Fields has the first sample's number for all of them; not one by one."""
    numbers = [1, 0, 2]
    alone = [
        found(sf.Engine, lambda q, n=n: ops.MeasureFock(select=n) | q[1], x)
        for x, n in zip(BATCH, numbers, strict=True)
    ]
    rows = [[n] for n in numbers]
    for select in (rows, tf.constant(rows), tf.constant(numbers), np.array(rows)):
        ours = found(
            TracedEngine,
            lambda q, s=select: ops.MeasureFock(select=s) | q[1],
            BATCH,
            compiled="graph",
            batch_size=3,
        )
        np.testing.assert_allclose(ours[0], sum(one[0] for one in alone), atol=1e-9)
        np.testing.assert_allclose(ours[2], [one[2] for one in alone], atol=1e-9)

    def measure(q, v):
        ops.MeasureHomodyne(0.4, select=v) | q[1]

    values = [0.1, -0.3, 0.6]
    ours = found(TracedEngine, measure, BATCH, named=[("v", values)], compiled="graph")
    alone = [
        found(sf.Engine, lambda q, v=v: ops.MeasureHomodyne(0.4, select=v) | q[1], x)
        for x, v in zip(BATCH, values, strict=True)
    ]
    np.testing.assert_allclose(ours[0], sum(one[0] for one in alone), atol=1e-9)
    np.testing.assert_allclose(ours[2], [one[2] for one in alone], atol=1e-9)
    step = 1e-5
    for n in range(3):  # of what was selected, too: by finite differences
        moved = [
            found(TracedEngine, measure, BATCH, named=[("v", [*values[:n], v, *values[n + 1 :]])])
            for v in (values[n] - step, values[n] + step)
        ]
        numeric = (moved[1][0] - moved[0][0]) / (2 * step)
        np.testing.assert_allclose(ours[3][n], numeric, atol=1e-7)


def test_all_modes_measured_and_an_outcome_that_feeds_a_gate() -> None:
    def everything(q):
        ops.MeasureFock(select=[0, 1]) | (q[0], q[1])

    ours = found(TracedEngine, everything, BATCH, modes=2, compiled="graph", batch_size=3)
    assert float(ours[0]) == 0.0

    def fed(q):
        ops.MeasureHomodyne(0.0, select=0.3) | q[1]
        ops.Dgate(q[1].par) | q[0]

    assert_same(fed, 0.4)


def test_a_selection_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="photon number for each of"):
        found(TracedEngine, lambda q: ops.MeasureFock(select=[1, 2]) | q[1], 0.4)
    with pytest.raises(ValueError, match="batch size so far"):
        found(TracedEngine, lambda q: ops.MeasureFock(select=[[1], [2]]) | q[1], BATCH)
