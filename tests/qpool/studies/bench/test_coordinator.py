"""Simulated workers take part as others do; and how many samples they are worth."""

import socket

import numpy as np
import pytest
import tensorflow as tf

import qpool
from qpool.studies.bench import coordinator
from qpool.studies.bench.simulated import simulated_pool


@pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="channels cannot be handed over here")
def test_simulated_workers_are_asked_as_others_are() -> None:
    model = qpool.models.QuantumSFGenerator(n_modes=2, latent_dim=4, layers=1, cutoff_dim=3)
    with (
        simulated_pool(5) as pool,
        qpool.parallelize(model, pool=pool, tile=2) as generator,
    ):
        z = tf.zeros((20, 4))
        assert generator(z).shape == (20, 2)
        step = generator.loss_and_gradient(z, lambda samples: samples[:, 0])
        assert [g.shape for g in step.gradient] == [v.shape for v in model.trainable_variables]
        assert pool.stats()["tiles"] == 20
        assert {w["pid"] for w in pool.stats()["workers"]} == {pool.stats()["workers"][0]["pid"]}


def test_the_least_batch_is_the_one_at_which_workers_are_half_as_fast_as_they_could_be() -> None:
    step, sample = 500.0, 10.0
    for workers in (2, 16, 256):
        batch = coordinator.least_batch(workers, step, sample)
        speed_up = batch * sample / (step + batch * sample / workers)
        assert np.isclose(speed_up, workers / 2, rtol=0.01)
    assert coordinator.least_batch(64, step, 1e9) == 64 * 16  # a tile for each
