"""Latent draws: normal ones, cut where they are amplitudes of displacements; by a seed."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from qpool.errors import ConfigurationError
from qpool.models import QuantumSFDiscriminator, QuantumSFGenerator
from qpool.training import sampling
from qpool.training.gan import QuantumGAN

DISTRIBUTIONS = {
    "normal": stats.norm(),
    "truncated_normal": stats.truncnorm(-2.0, 2.0),
}


class Echo:
    """What it is given."""

    latent_dim = 2
    trainable_variables = ()

    def __init__(self, distribution: str | None = None) -> None:
        if distribution:
            self.latent_distribution = distribution

    def __call__(self, z: tf.Tensor) -> tf.Tensor:
        return z


@pytest.mark.parametrize("name", [None, *DISTRIBUTIONS])
def test_draws_of_a_distribution(name: str | None) -> None:
    generator = Echo(name)
    found = sampling.samples(generator, 1000, 128, seed=3)
    assert found.shape == (1000, 2)
    expected = DISTRIBUTIONS[name or "normal"]
    assert stats.kstest(found.ravel(), expected.cdf).pvalue > 0.01
    np.testing.assert_array_equal(found, sampling.samples(generator, 1000, 128, seed=3))
    assert np.abs(found - sampling.samples(generator, 1000, 128, seed=4)).max() > 0.1


@pytest.mark.parametrize(
    ("encoding", "width", "name"),
    [
        ("coherent_state", 4, "normal"),
        ("angle_encoding", 2, "normal"),
        ("classical_neural", 3, "normal"),
        ("direct_displacement", 2, "truncated_normal"),
        ("sparse_parameter", 4, "truncated_normal"),
    ],
)
def test_training_draws_what_sampling_does(encoding: str, width: int, name: str) -> None:
    generator = QuantumSFGenerator(
        latent_dim=width, cutoff_dim=3, layers=2, encoding_strategy=encoding, seed=1
    )
    assert sampling.distribution(generator) == name
    gan = QuantumGAN(generator, QuantumSFDiscriminator(cutoff_dim=3, layers=1, input_dim=2), seed=2)
    draws = np.asarray(gan.latent(500))
    assert draws.shape == (500, width)
    assert stats.kstest(draws.ravel(), DISTRIBUTIONS[name].cdf).pvalue > 0.01


def test_a_distribution_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="expected 'normal' or 'truncated_normal'"):
        sampling.samples(Echo("uniform"), 4, 4, seed=0)
