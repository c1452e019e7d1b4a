"""The search for a batch, over scripted machines, and once over a real generator."""

from __future__ import annotations

import models
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from pooling import parallelize

import qpool
from qpool.measure.batch_size import Measured, search
from workers.errors import ConfigurationError, InputError


def machine(fixed: float, each: float, bytes_each: int = 0):
    """Steps that take ``fixed + each * batch`` seconds."""
    return lambda batch: Measured(batch, fixed + each * batch, bytes_each * batch)


def test_it_stops_where_more_does_not_pay() -> None:
    found = search(machine(1.0, 0.1), 1, 1 << 14)
    rates = {m.batch: m.samples_per_second for m in found.measured}
    assert found == 128  # 9.28 a second; 256 make 9.62, and 512 9.81
    assert rates[256] / rates[128] < 1.05 < rates[128] / rates[64]
    assert "make" in found.why


@given(st.integers(1, 10**6), st.integers(0, 10**9), st.integers(1, 4096))
def test_it_never_goes_beyond_the_budget_or_the_limit(size: int, budget: int, limit: int) -> None:
    found = search(machine(1.0, 0.0, size), budget, limit)
    assert 1 <= found <= limit
    for measured in found.measured[1:]:
        assert measured.memory_bytes <= budget


def test_a_real_generator(pool) -> None:
    model = models.Displaced(tf.complex64, cutoff=4)
    with parallelize(model, pool=pool) as generator:
        found = qpool.suggest_batch(generator, np.zeros((1, 2), np.float32), largest=8)
        assert found in (1, 2, 4, 8)
        assert found.measured[0].batch == 1
        assert all(m.seconds > 0 for m in found.measured)
        with pytest.raises(InputError, match="latent_dim"):
            qpool.suggest_batch(generator)
        with pytest.raises(ConfigurationError, match="positive"):
            qpool.suggest_batch(generator, np.zeros((1, 2)), memory_bytes=0)
