"""Samples of a generator, in batches, from latent draws that follow from a seed."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import tensorflow as tf
from scipy.special import ndtr, ndtri

from workers.errors import ConfigurationError


def samples(generator: Any, count: int, batch_size: int, seed: int) -> np.ndarray:
    """(count, width) samples, of draws as training makes them."""
    if hasattr(generator, "with_norm"):  # what training has had compiled
        return samples_and_norms(generator, count, batch_size, seed)[0]
    made = [np.asarray(generator(z)) for z in _latent(generator, count, batch_size, seed)]
    return np.concatenate(made)[:count]


def samples_and_norms(
    generator: Any, count: int, batch_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same, and (count,) norms of their states within the cutoff, of one that tells them."""
    made = [generator.with_norm(z) for z in _latent(generator, count, batch_size, seed)]
    found, norms = (np.concatenate([np.asarray(pair[n]) for pair in made]) for n in (0, 1))
    return found[:count], norms[:count]


def distribution(generator: Any) -> str:
    """``normal``, or the generator's ``latent_distribution``: ``truncated_normal``, cut at two."""
    found = getattr(generator, "latent_distribution", "normal")
    if found not in ("normal", "truncated_normal"):
        raise ConfigurationError(
            f"latent_distribution={found!r} of {type(generator).__name__}: expected 'normal' or "
            "'truncated_normal'"
        )
    return found


def _latent(generator: Any, count: int, batch_size: int, seed: int) -> list[Any]:
    """Whole batches, so that no further shape is compiled."""
    chunks = -(-count // batch_size)
    random = np.random.default_rng(seed)
    shape = chunks * batch_size, generator.latent_dim
    if distribution(generator) == "normal":
        draws = random.standard_normal(shape)
    else:
        draws = ndtri(random.uniform(ndtr(-2.0), ndtr(2.0), shape))  # by the inverse CDF
    return tf.split(tf.constant(draws.astype(np.float32)), chunks)


def check(generator: Any) -> None:
    """ConfigurationError for what is no generator of samples."""
    name = type(generator).__name__
    if not callable(generator):
        raise ConfigurationError(f"{name} cannot be called: define __call__(z) -> samples")
    if not isinstance(getattr(generator, "latent_dim", None), numbers.Integral):
        raise ConfigurationError(
            f"{name} has no latent_dim, the number of columns of its z: set it "
            "(generator.latent_dim = 4)"
        )
