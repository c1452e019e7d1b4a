"""The monitor's figures are differences of counters; the callback writes them where it is told."""

from __future__ import annotations

import json

import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from pooling import parallelize

import qpool
from qpool import errors
from qpool.measure import monitor


class Scripted:
    """A generator whose counters are what the test says."""

    def __init__(self, *readings) -> None:
        self._readings = list(readings)

    def stats(self):
        return self._readings.pop(0)


def reading(samples, pid, cpu, compute, wait, slowest, mean):
    worker = {
        "worker": 0,
        "pid": pid,
        "cores": (3, 4),
        "pinned": True,
        "cpu_seconds": cpu,
        "compute_seconds": compute,
        "memory_bytes": 2**20,
    }
    pool = {
        "workers": [worker],
        "seconds": {"wait": wait},
        "slowest_shard_seconds": slowest,
        "mean_shard_seconds": mean,
        "replaced_workers": 0,
    }
    return {"samples": samples, "pool": pool}


def test_figures_are_differences(monkeypatch) -> None:
    clock = iter([100.0, 102.0, 103.0])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
    generator = Scripted(
        reading(10, 7, 1.0, 0.5, 0.1, 1.0, 1.0),
        reading(50, 7, 4.0, 2.0, 0.5, 2.2, 2.0),
        reading(50, 8, 0.1, 2.0, 0.5, 2.2, 2.0),  # another process
    )
    watch = monitor.Monitor(generator)
    sample = watch.sample()
    assert (sample.seconds, sample.samples, sample.samples_per_second) == (2.0, 40, 20.0)
    (worker,) = sample.workers
    assert worker.cpu_use == pytest.approx(3.0 / (2.0 * 2))  # of two cores
    assert (worker.compute, worker.wait) == (pytest.approx(0.75), pytest.approx(0.25))
    assert worker.memory_mib == 1.0
    assert sample.coordinator == {"wait": pytest.approx(0.2)}
    assert sample.slowest_shard == pytest.approx(1.2)
    assert sample.figures()["worker 0/cpu_use"] == worker.cpu_use
    later = watch.sample()
    assert later.workers == ()
    assert later.slowest_shard == 1.0


def test_a_pool_at_work(pool) -> None:
    model = models.Displaced(tf.complex64, cutoff=4)
    z = tf.constant(np.random.default_rng(0).normal(size=(8, 2)) * 0.3, tf.float32)
    with parallelize(model, pool=pool) as generator:
        generator(z)
        watch = qpool.Monitor(generator)
        for _ in range(3):
            generator(z)
        sample = watch.sample()
    assert sample.samples == 24
    assert len(sample.workers) == 2
    for worker in sample.workers:
        assert 0 < worker.compute <= 1
        assert worker.memory_mib > 10
    assert sample.slowest_shard >= 1
    assert 0 < sum(sample.coordinator.values()) <= 1.01


def test_the_callback_writes_lines_and_events(pool, tmp_path) -> None:
    model = models.Displaced(tf.complex64, cutoff=4)
    with parallelize(model, pool=pool) as generator:

        class Trained(keras.Model):
            def __init__(self) -> None:
                super().__init__()
                self.w = self.add_weight(shape=(), initializer="ones")

            def train_step(self, data):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(generator(data) ** 2) * self.w
                self.optimizer.apply([tape.gradient(loss, self.w.value)], [self.w])
                return {"loss": loss}

        trained = Trained()
        trained.compile("sgd", run_eagerly=True)
        watch = qpool.MonitorCallback(
            generator, every=0.0, tensorboard=tmp_path / "board", jsonl=tmp_path / "monitor.jsonl"
        )
        data = tf.data.Dataset.from_tensors(tf.zeros((4, 2))).repeat(3)
        trained.fit(data, verbose=0, shuffle=False, callbacks=[watch])
    lines = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert all(line["samples"] == 4 for line in lines[:3])
    assert {worker["worker"] for worker in lines[0]["workers"]} == {0, 1}
    assert len(watch.samples) == 4
    assert list((tmp_path / "board").iterdir())


@pytest.mark.parametrize("watch", [monitor.Monitor, monitor.MonitorCallback])
def test_what_is_not_pooled_is_not_watched(watch) -> None:
    with pytest.raises(
        errors.ConfigurationError, match=r"object is not pooled.*qpool\.parallelize"
    ):
        watch(object())
