"""Methods that are not pooled: when they are compiled. With real circuits: ``test_idioms``."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

import qpool
from qpool.executors.in_place import unpooled
from workers import sf_compat

sf_compat.install()

import strawberryfields as sf  # noqa: E402
from strawberryfields import ops  # noqa: E402


class Model(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(0.3)
        self.engine = sf.Engine("tf", backend_options={"cutoff_dim": 3})
        self.program = sf.Program(1)
        with self.program.context as q:
            ops.Dgate(self.program.params("x")) | q[0]

    def photons(self, scale, power=1):
        if self.engine.run_progs:
            self.engine.reset()
        args = {"x": scale * self.w}
        return self.engine.run(self.program, args=args).state.mean_photon(0)[0] ** power

    def array(self, scale):
        return self.photons(scale).numpy()

    def __call__(self, z):
        return z * self.w


def levels(generator) -> list[tuple[str, str]]:
    return [(way["method"], way["level"]) for way in generator.stats()["unpooled"]]


def test_a_graph_with_the_second_call_and_xla_when_it_has_paid(monkeypatch) -> None:
    model = Model()
    x = tf.constant(0.5)
    expected = [float(model.photons(x, power)) for power in (1, 2)]
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        generator.photons(x)
        assert levels(generator) == []
        monkeypatch.setattr(unpooled, "_COMPILING", 1e9)
        for _ in range(3):
            np.testing.assert_allclose(generator.photons(x), expected[0], rtol=1e-5)
            assert levels(generator) == [("photons", "graph")]
        monkeypatch.setattr(unpooled, "_COMPILING", 0.0)
        for _ in range(2):
            np.testing.assert_allclose(generator.photons(x), expected[0], rtol=1e-5)
            assert levels(generator) == [("photons", "xla")]
        np.testing.assert_allclose(generator.photons(x, power=2), expected[1], rtol=1e-5)
        np.testing.assert_allclose(generator.photons(tf.constant([0.5, 0.5]))[0], expected[0], 1e-5)


def test_what_returns_arrays_runs_on_the_traced_engine_and_within_a_graph_all_does() -> None:
    model = Model()
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for _ in range(3):
            assert isinstance(generator.array(0.5), np.float32)
        assert levels(generator) == [("array", "eager")]
        compiled = tf.function(lambda x: generator.photons(x), jit_compile=True)
        np.testing.assert_allclose(compiled(tf.constant(0.5)), model.photons(0.5), rtol=1e-5)


def test_sequential_and_stock_leave_methods_to_the_model() -> None:
    model = Model()
    for options in ({"strategy": "sequential"}, {"strategy": "threads", "engine": "stock"}):
        with qpool.parallelize(model, **options) as generator:
            for _ in range(3):
                generator.photons(0.5)
            assert levels(generator) == []
