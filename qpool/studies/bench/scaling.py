"""The scaling model against this machine, beyond its cores: tiles of a known cost.

A tile that sleeps needs no core, so many workers can be at work at once on few cores. What the pool
itself costs is as with any other tile. Owns the sleeping model, the validation, and the simulation
of dispatch with more workers than any machine has.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import tensorflow as tf

import qpool
from qpool import tiles
from qpool.executors.processes.dispatch import Complete, Finished, Send, Step
from qpool.studies import scaling
from workers.exchange import protocol
from workers.exchange.protocol import Kind

#: Counts of workers that the constants come from, and those they are tried on.
_FITTED, _TRIED = (1, 2, 4), (8, 16, 24)

#: Seconds that a tile sleeps, tiles of a batch, and steps that are timed.
_SLEEP, _TILES, _STEPS = 0.005, 96, 20


class Sleeper(tf.Module):
    """A model whose call takes a known time and no core: z (batch, 1) -> w z."""

    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(1.0)

    def __call__(self, z: Any) -> Any:
        time.sleep(_SLEEP)
        return self.w * z


def scaling_model() -> dict[str, Any]:
    """Prediction and measurement of a forward call, apart; and a coordinator of 1,000 workers."""
    measured = {workers: _measure(workers) for workers in (*_FITTED, *_TRIED)}
    constants = scaling.fit([measured[workers] for workers in _FITTED])
    law = scaling.fit_law(_FITTED, [_TILES / measured[w].seconds for w in _FITTED])
    found = {
        str(workers): {
            "measured_ms": 1e3 * step.seconds,
            "predicted_ms": 1e3 * constants.step(workers, _TILES),
            "speed_up": measured[1].seconds / step.seconds,
            "predicted_speed_up": constants.speed_up(workers, _TILES),
            "law_speed_up": law.rate_of(workers) / law.rate,
            "fitted": workers in _FITTED,
        }
        for workers, step in measured.items()
    }
    return {
        "case": "scaling",
        "tile_ms": 1e3 * constants.tile,
        "serial_us": 1e6 * constants.serial,
        "dispatch_us_per_worker": 1e6 * constants.dispatch,
        "contention": constants.contention,
        "by_workers": found,
        "simulation": {str(workers): simulate(workers) for workers in (10, 100, 1000)},
    }


def _measure(workers: int) -> scaling.Step:
    """A step of all tiles, and what a tile took in the workers."""
    z = tf.zeros((_TILES, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*share cores.*")
        made = qpool.parallelize(Sleeper(), workers, "processes", tile=1, engine="stock")
    with made as generator:
        generator(z)
        before = _compute_seconds(generator)
        seconds = []
        for _ in range(_STEPS):
            began = time.perf_counter()
            generator(z)
            seconds.append(time.perf_counter() - began)
        tile = (_compute_seconds(generator) - before) / (_STEPS * _TILES)
    return scaling.Step(workers, _TILES, statistics.median(seconds), tile)


def _compute_seconds(generator: Any) -> float:
    return sum(w["compute_seconds"] for w in generator.stats()["pool"]["workers"])


def simulate(workers: int) -> dict[str, float]:
    """The coordinator's own work for a step of two tiles a worker: deciding, and making messages.

    What a pipe and a wake-up cost is not in it; ``dispatch_us_per_worker`` has that.
    """
    steps = 20
    number = 2 * workers
    deciding, packing = [], []
    answer = protocol.encode(protocol.Computed(1, 1, (0.0, 0.0, 0.1, 0.2), 1.0, 1 << 28, 0))
    for _ in range(steps):
        began = time.perf_counter()
        step = Step(number, range(workers), 1)
        sends = [made for made in step.begin() if isinstance(made, Send)]
        decided = time.perf_counter() - began
        began = time.perf_counter()
        for send in sends:
            message = protocol.Compute(send.ticket, 1, 1, 1, 1, send.tiles, Kind.FORWARD)
            protocol.encode(message)
        for _send in sends:
            protocol.decode(answer)
        packing.append(time.perf_counter() - began)
        began = time.perf_counter()
        last: Any = None
        for send in sends:
            last = step.on(Finished(send.worker, send.ticket))
        deciding.append(decided + time.perf_counter() - began)
        assert last == [Complete()]
    assert tiles.count(number, 1) == number
    total = statistics.median(deciding) + statistics.median(packing)
    return {
        "deciding_us": 1e6 * statistics.median(deciding),
        "messages_us": 1e6 * statistics.median(packing),
        "us_per_worker": 1e6 * total / workers,
    }
