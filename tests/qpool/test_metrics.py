"""Keras metrics of kets, in a fit."""

from __future__ import annotations

import logging

import keras
import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from strawberryfields import ops

import qpool
from qpool import metrics
from qpool.errors import InputError


def circuit(cutoff: int = 6) -> qpool.CircuitLayer:
    program = sf.Program(2)
    x, r, theta = program.params("x", "r", "theta")
    with program.context as q:
        ops.Dgate(x) | q[0]
        ops.Sgate(r) | q[1]
        ops.BSgate(theta) | (q[0], q[1])
    initial = {"r": 0.1, "theta": 0.2}
    return qpool.CircuitLayer(
        program, inputs=("x",), readout="ket", cutoff_dim=cutoff, initial=initial
    )


def infidelity(y_true, y_pred):
    overlap = tf.reduce_sum(tf.math.conj(y_true) * y_pred, axis=(1, 2))
    return 1 - tf.abs(overlap) ** 2


def test_metrics_are_the_means_of_the_measures() -> None:
    layer = circuit()
    x = np.float32([[0.1], [0.5]])
    kets, state = layer(x), layer.state(x)
    target = circuit()(x + 0.1)
    for metric, expected in (
        (metrics.KetNorm(), qpool.states.ket_norm(state)),
        (metrics.Fidelity(), qpool.states.fidelity(state, target)),
        (metrics.Purity(mode=1), qpool.states.purity(state, 1)),
    ):
        metric.update_state(target, kets)
        assert float(metric.result()) == pytest.approx(float(np.mean(expected)), abs=1e-6)
        again = type(metric).from_config(metric.get_config())
        assert again.get_config() == metric.get_config()


def test_in_a_fit_and_a_warning_where_states_leave_the_cutoff(caplog) -> None:
    inputs = keras.Input((1,))
    model = keras.Model(inputs, circuit(cutoff=4)(inputs))
    model.compile("sgd", infidelity, metrics=[metrics.KetNorm(), metrics.Fidelity()])
    x = np.float32([[1.5], [1.6]])
    target = np.zeros((2, 4, 4), np.complex64)
    target[:, 1, 0] = 1
    with caplog.at_level(logging.WARNING, "qpool"):
        logs = model.fit(
            x, target, epochs=2, verbose=0, callbacks=[metrics.LeakageWarning()]
        ).history
    assert logs["ket_norm"][0] < 0.99
    assert logs["fidelity"][1] > logs["fidelity"][0]
    assert "raise cutoff_dim" in caplog.text


def test_what_is_no_ket() -> None:
    with pytest.raises(InputError, match="readout='ket'"):
        metrics.KetNorm().update_state(None, tf.zeros((2, 3)))
    with pytest.raises(InputError, match="KetNorm"):
        metrics.LeakageWarning().on_epoch_end(0, {"loss": 1.0})
