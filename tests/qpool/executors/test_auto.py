"""``auto``: what it measures, what it keeps to, what it remembers and what it leaves alone."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import qpool
from qpool.executors import Options
from qpool.executors.auto import autotuner, choices, course, executor, guess
from qpool.executors.auto.choices import Candidate
from qpool.executors.base import Executor
from qpool.executors.topology import Budget
from workers.errors import ConfigurationError, InputError


class Scaled(tf.Module):
    """A model without Strawberry Fields, so that compiling it is quick."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.w = tf.Variable(tf.ones(width))
        self.trainable = width

    def __call__(self, z):
        return tf.sin(self.w * z)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No pool is started, turns are short, and nothing is remembered from another test."""
    monkeypatch.setattr(executor, "_POOL_SECONDS", 1e9)
    monkeypatch.setattr(autotuner, "_TURN_SECONDS", 0.001)
    monkeypatch.setenv("QPOOL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def eager_to_try(monkeypatch):
    """Whatever a trial takes, it is within the share."""
    monkeypatch.setattr(course, "SHARE", 1e9)
    monkeypatch.setattr(course, "_FIRST_CALLS", 0)


def choice_of(generator) -> dict:
    (choice,) = generator.stats()["auto"]["choices"]
    return choice


def test_it_begins_at_once_with_a_guess_and_says_from_what() -> None:
    model = Scaled()
    z = tf.random.stateless_normal((8, 2), (1, 2))
    with qpool.parallelize(model) as generator:
        assert generator.stats()["auto"]["choices"] == []
        for _ in range(4):
            np.testing.assert_allclose(generator(z), model(z), atol=1e-6)
        choice = choice_of(generator)
    assert (choice["chosen"], choice["milliseconds"]) == ("cpu_batch", {})
    assert "0 circuits" in choice["why"]
    assert not choice["complete"]


def test_others_are_tried_between_calls_and_the_fastest_goes_on(eager_to_try) -> None:
    model = Scaled()
    z = tf.random.stateless_normal((8, 2), (1, 2))
    with qpool.parallelize(model) as generator:
        for _ in range(6):
            np.testing.assert_allclose(generator(z), model(z), atol=1e-6)
        choice = choice_of(generator)
        assert choice["batch"] == 8
        assert choice["chosen"] in choice["milliseconds"]
        assert set(choice["milliseconds"]) > {"cpu_batch", "threads workers=1 tile=8"}
        assert "less than a pool's messages" in choice["not_measured"]["processes"]
        assert choice["complete"]
        bits = generator(z).numpy().tobytes()
        for rows in (8, 7, 5):  # the same size, in powers of two
            generator(z[:rows])
        assert generator(z).numpy().tobytes() == bits
        assert len(generator.stats()["auto"]["choices"]) == 1
        generator(z[:2])
        assert [c["batch"] for c in generator.stats()["auto"]["choices"]] == [8, 2]


def test_what_was_given_up_pulls_back_what_it_computed(eager_to_try, monkeypatch) -> None:
    """A tape that spans the exchange of executors needs both of them."""
    monkeypatch.setattr(autotuner, "_WORTH", 0.0)  # whatever comes later is taken
    monkeypatch.setattr(
        autotuner.Autotuner, "leader", property(lambda self: list(self._seconds)[-1])
    )
    model = Scaled()
    z = tf.random.stateless_normal((8, 2), (1, 2))
    with qpool.parallelize(model) as generator:
        generator(z)
        chosen = set()
        with tf.GradientTape() as tape:
            total = 0.0
            for _ in range(5):
                total += tf.reduce_sum(generator(z))
                chosen.add(choice_of(generator)["chosen"])
        expected = 5 * tf.reduce_sum(z * tf.cos(z), 0)
        np.testing.assert_allclose(tape.gradient(total, model.w), expected, rtol=1e-5)
        for _ in range(executor._CALLS_LEFT + 1):
            generator(z)
        assert len(generator._qpool.executor()._executors) == 1


def test_a_comparison_that_fails_is_not_the_callers_business(eager_to_try, monkeypatch) -> None:
    def fails(self, *_):
        raise OSError("no more of them")

    monkeypatch.setattr(autotuner.Autotuner, "enter", fails)
    with qpool.parallelize(Scaled()) as generator:
        for _ in range(3):
            np.testing.assert_allclose(generator(tf.zeros((4, 2))), 0.0)
        assert choice_of(generator)["chosen"] == "cpu_batch"


def test_a_trial_waits_until_its_share_is_due() -> None:
    now = course.Course(
        choices.Choice.guessed(Candidate("cpu_batch"), 8, "", ()), choices.Memory(""), True
    )
    for _ in range(course._FIRST_CALLS):
        now.note(1e6)  # compiling
    assert not now.is_due(1.0)
    now.note(1.0 / course.SHARE / course._STEP)
    assert now.is_due(1.0)
    assert not now.is_due(1.01)
    now.settle()
    assert not now.is_due(0.0)


@given(
    step=st.floats(0.0, 10.0),
    workers=st.integers(1, 256),
    batch=st.integers(1, 4096),
    rows=st.sampled_from([0, 0, 8]),
    draws=st.booleans(),
    engine=st.sampled_from(["traced", "stock"]),
)
def test_a_guess_is_followed_by_what_is_there_when_it_cannot_be(
    step, workers, batch, rows, draws, engine
) -> None:
    cores = Budget(tuple(range(workers)), workers, None, tuple((n,) for n in range(workers)))
    work = guess.Work(1, step * guess._PRODUCTS_PER_SECOND / 3, step)
    order = guess.in_order(work, batch, cores, Options(engine=engine), rows, draws=draws)
    assert len(order) == len(set(order)) >= 1
    names = [candidate.strategy for candidate in order]
    assert ("cpu_batch" in names) == (engine == "traced" and not draws and rows in (0, batch))
    assert all((candidate.workers or 1) <= min(workers, batch) for candidate in order)
    if step * (1 - 1 / workers) > 1 and engine == "traced" and not rows and batch > 1:
        assert order[0].workers == min(workers, batch)


def test_it_remembers_the_same_model_and_no_other(eager_to_try, caplog) -> None:
    z = tf.ones((4, 2))
    with qpool.parallelize(Scaled()) as generator:
        for _ in range(6):
            generator(z)
        first = choice_of(generator)
    assert not first["remembered"]
    with qpool.parallelize(Scaled()) as generator, caplog.at_level(logging.INFO, "qpool"):
        generator(z)
        assert choice_of(generator) == {**first, "remembered": True}
    assert "as was measured on" in caplog.text
    assert [choice.batch for choice in choices.remembered()] == [4]
    with qpool.parallelize(Scaled(width=3)) as generator:
        generator(tf.ones((4, 3)))
        assert not choice_of(generator)["remembered"]


def test_a_remembered_choice_is_made_in_a_graph_too(monkeypatch) -> None:
    """Executors pickle variables, which have no values in a graph."""
    chosen = Candidate("threads", 2)
    known = choices.Choice(chosen, 4, {str(chosen): 1.0}, {}, 1.0, "today", True)
    monkeypatch.setattr(choices.Memory, "read", lambda self: known)
    model = Scaled()
    with qpool.parallelize(model) as generator:
        z = tf.ones((4, 2))
        np.testing.assert_allclose(tf.function(lambda z: generator(z))(z), model(z), atol=1e-6)
        assert generator.stats()["strategy"] == "threads"


class Watched(Scaled):
    """Notes whether a tape of the autotuner's own sees its calls: where no trial is taken back."""

    gradients: ClassVar[list[int]] = []

    def __call__(self, z):
        @tf.custom_gradient
        def call(z):
            def pull_back(cotangent):
                self.gradients.append(1)
                return cotangent

            return tf.sin(z), pull_back

        return call(self.w * z) + np.random.normal(0.0, 0.0)


@pytest.mark.parametrize("recording", [False, True])
def test_what_is_measured_has_a_gradient(eager_to_try, recording: bool) -> None:
    """Also where the caller records on a tape of its own, which sees its own call alone."""
    model = Watched()
    model.gradients.clear()
    z = tf.ones((4, 2))
    with qpool.parallelize(model, engine="stock") as generator, tf.GradientTape() as tape:
        with tape.stop_recording():
            generator(z)
        with contextlib.nullcontext() if recording else tape.stop_recording():
            loss = tf.reduce_sum(generator(z))
        measured = len(model.gradients)
        assert measured > 2
        if recording:
            assert tape.gradient(loss, model.w) is not None
            assert len(model.gradients) == measured + 1


class Gridded(Scaled):
    def __call__(self, z, shift):
        return super().__call__(z) + shift


def test_a_tensor_of_the_graph_beside_the_batch_is_for_the_model_in_place() -> None:
    model = Gridded()
    z = tf.ones((4, 2))
    with qpool.parallelize(model) as generator:
        found = tf.function(lambda z, shift: generator(z, shift))(z, tf.constant(2.0))
        np.testing.assert_allclose(found, model(z, 2.0), atol=1e-6)
        assert generator.stats()["strategy"] == "cpu_batch"


def test_inputs_that_nothing_can_be_measured_for() -> None:
    with qpool.parallelize(Scaled()) as generator:
        with pytest.raises(InputError, match="no rows"):
            generator(tf.ones((0, 2)))
        shapeless = tf.function(
            lambda z: generator(z), input_signature=[tf.TensorSpec(None, tf.float32)]
        )
        with pytest.raises(InputError, match="set its shape"):
            shapeless(tf.ones((2, 2)))


class Drawing(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.source = np.random.default_rng(4)

    def __call__(self, z):
        return super().__call__(z) + self.source.normal()


def test_what_a_model_draws_does_not_depend_on_how_long_was_measured() -> None:
    z = tf.zeros((4, 2))
    found = []
    for _ in range(2):
        with qpool.parallelize(Drawing(), seed=9) as generator:
            found.append(generator(z).numpy().tobytes())
            assert choice_of(generator)["strategy"] != "cpu_batch"
    assert found[0] == found[1]


def test_the_samples_are_counted_whoever_computes_them() -> None:
    with qpool.parallelize(Scaled()) as generator:
        for _ in range(3):
            generator(tf.ones((4, 2)))
        stats = generator.stats()
        assert stats["samples"] >= 12
        assert stats["samples_per_second"] > 0


def test_what_a_graph_was_traced_with_stays(eager_to_try) -> None:
    model = Scaled()
    with qpool.parallelize(model) as generator:

        @tf.function
        def gradient(z):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(generator(z))
            return tape.gradient(loss, model.w)

        z = tf.random.stateless_normal((6, 2), (3, 4))
        expected = tf.reduce_sum(z * tf.cos(z), 0)
        np.testing.assert_allclose(gradient(z), expected, atol=1e-5)
        gradient(z)
        assert choice_of(generator)["milliseconds"] == {}
        generator(z)  # and eagerly: another thing to choose
        assert len(generator.stats()["auto"]["choices"]) == 2


class Counting(Scaled):
    """Its call changes a variable, which only the model in place may do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = tf.Variable(0.0, trainable=False)

    def __call__(self, z):
        self.calls.assign_add(1.0)
        return super().__call__(z) + np.random.normal()


def test_measuring_leaves_the_model_and_the_users_draws_as_they_were(eager_to_try) -> None:
    model = Counting()
    np.random.seed(3)
    expected = np.random.normal()
    np.random.seed(3)
    with qpool.parallelize(model) as generator:
        assert float(tf.reduce_mean(generator(tf.zeros((4, 2))))) == pytest.approx(expected)
        assert float(model.calls) == 1.0
        generator(tf.zeros((4, 2)))
        assert float(model.calls) == 2.0
        assert choice_of(generator)["strategy"] == "cpu_batch"
        assert (
            "StatefulCallError" in choice_of(generator)["not_measured"]["threads workers=1 tile=4"]
        )


def test_workers_that_were_asked_for_are_had(pool) -> None:
    with qpool.parallelize(Scaled(), pool=pool) as generator:
        generator(tf.ones((4, 2)))
        stats = generator.stats()
    assert stats["strategy"] == "processes"
    assert "was given" in stats["auto"]["why"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Executor):
    """Takes as many seconds as its candidate has workers."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def call(self, method, args, kwargs):
        self.clock.now += self.seconds
        return args[0]

    def per_sample_gradients(self, z, cotangent):
        raise NotImplementedError


def race(monkeypatch, seconds: dict[Candidate, float]) -> autotuner.Autotuner:
    clock = Clock()
    monkeypatch.setattr(autotuner.time, "perf_counter", clock)
    made = autotuner.Autotuner(
        Scaled(), lambda c: Slow(clock, seconds[c]), "__call__", (tf.ones((4, 2)),), {}, "nothing"
    )
    for candidate in seconds:
        made.enter(candidate)
    return made


def test_the_fastest_wins_and_the_simpler_of_two_that_are_as_good(monkeypatch) -> None:
    slow, quick_one, as_quick = (Candidate("threads", n) for n in (3, 2, 1))
    seconds = {slow: 0.3, quick_one: 0.101, as_quick: 0.1}
    choice = race(monkeypatch, seconds).decide(4, seconds)
    assert choice.candidate == quick_one  # within a twentieth, and earlier
    assert choice.milliseconds[str(slow)] == pytest.approx(300)
    seconds[quick_one] = 0.11
    choice = race(monkeypatch, seconds).decide(4, seconds)
    assert choice.candidate == as_quick


def test_a_spent_budget_ends_the_measuring(monkeypatch) -> None:
    first, second = Candidate("sequential"), Candidate("threads", 2)
    seconds = {first: autotuner.BUDGET, second: 1.0}
    choice = race(monkeypatch, seconds).decide(4, seconds)
    assert choice.candidate == first
    assert "was spent" in choice.not_measured[str(second)]


def test_what_no_strategy_can_take_is_the_models_own_error() -> None:
    class Broken(Scaled):
        def __call__(self, z):
            raise LookupError("no such sample")

    with qpool.parallelize(Broken()) as generator, pytest.raises(LookupError, match="no such"):
        generator(tf.ones((2, 2)))


def test_custom_strategies_are_checked_when_they_are_registered() -> None:
    class NoModel(Executor):
        def __init__(self) -> None:
            pass

        def call(self, method, args, kwargs):
            return args[0]

        def per_sample_gradients(self, z, cotangent):
            return []

    class FewArguments(Executor):
        def call(self, z):
            return z

        def per_sample_gradients(self, z, cotangent):
            return []

    with pytest.raises(ConfigurationError, match=r"\(model, options\)"):
        qpool.register_strategy("mine", NoModel)
    with pytest.raises(ConfigurationError, match=r"\(method, args, kwargs\)"):
        qpool.register_strategy("mine", FewArguments)


class Laborious(Scaled):
    """Takes a known time for each row, whoever computes it."""

    def __call__(self, z):
        time.sleep(0.015 * len(z))  # so long that what a busy machine adds decides nothing
        return super().__call__(z)


def test_a_pool_is_measured_and_kept_where_it_wins(eager_to_try, monkeypatch) -> None:
    monkeypatch.setattr(executor, "_POOL_SECONDS", 0.0)
    monkeypatch.setattr(executor.topology, "budget", lambda: Budget((0, 1), 2, None, ((0, 1),)))
    model = Laborious()
    with qpool.parallelize(model, engine="stock", pin=False) as generator:
        z = tf.ones((8, 2))
        for _ in range(6):
            np.testing.assert_allclose(generator(z), tf.sin(z), atol=1e-6)
        choice = choice_of(generator)
        assert (choice["strategy"], choice["workers"]) == ("processes", 2)
        assert choice["milliseconds"]["sequential"] > choice["milliseconds"][choice["chosen"]]
        assert len(choice["milliseconds"]) >= 3  # another tile was tried too
        assert len(generator.stats()["pool"]["workers"]) == 2
        bits = generator(z).numpy().tobytes()
        assert generator(z).numpy().tobytes() == bits
