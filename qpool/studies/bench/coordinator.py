"""What a step costs the coordinator, by how many workers there are: with more than any machine has.

Workers are simulated: one program answers for all of them, at once and without computing, over a
channel each. So the coordinator's messages, waiting and arrays are real, and its seconds of CPU are
its own part of a step; a step's time is not measured so. From them, and from what a sample costs
one core, follows the batch at which so many workers pay.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from qpool.children.launchers import WORKER, Launcher, _log_file
from qpool.children.process import WorkerProcess
from workers.exchange import protocol
from workers.layout import ArraySpec

#: Counts of workers, and rows and tiles that each of them gets.
WORKERS = (2, 4, 8, 16, 32, 64, 128, 256)
_TILE, _TILES = 8, 2

#: Calls that are timed at a time, and how often.
_CALLS, _TURNS = 20, 5

#: Modes, layers, cutoff of the circuits whose batches are told.
CIRCUITS = {
    "2 modes, 2 layers, cutoff 8": (2, 2, 8),
    "2 modes, 6 layers, cutoff 12": (2, 6, 12),
    "3 modes, 6 layers, cutoff 12": (3, 6, 12),
}

#: Workers pay where they are at least half as fast as so many times one.
_EFFICIENCY = 0.5


def coordinator() -> dict[str, Any]:
    """CPU microseconds of the coordinator for a forward call, and for a step with its gradient in
    one exchange, by the number of simulated workers; and the batches at which workers pay."""
    calls = {str(workers): _measure(workers) for workers in WORKERS}
    sizes = np.array([[1.0, workers] for workers in WORKERS])
    fixed, each = np.linalg.lstsq(
        sizes, np.array([calls[str(w)]["step_us"] for w in WORKERS]), rcond=None
    )[0]
    circuits = {}
    for name, shape in CIRCUITS.items():
        sample = _sample_seconds(*shape)
        circuits[name] = {
            "sample_us": 1e6 * sample,
            "batches": {
                str(workers): least_batch(workers, calls[str(workers)]["step_us"], 1e6 * sample)
                for workers in WORKERS
            },
        }
    return {
        "case": "coordinator",
        "by_workers": calls,
        "step_us": {"fixed": float(fixed), "each_worker": float(each)},
        "circuits": circuits,
    }


def least_batch(workers: int, step: float, sample: float) -> int:
    """The least batch of which so many workers make at least half as many times more than one
    core would, that has no coordinator: a step costs the coordinator ``step``, and a core
    ``sample`` for each row, in the same unit of time."""
    # batch sample / (step + batch sample / workers) >= efficiency workers
    return int(np.ceil(_EFFICIENCY * workers * step / (sample * (1 - _EFFICIENCY))))


def draw(found: dict[str, Any], picture: Path) -> None:
    """The coordinator's part of a step, and the batches at which workers pay."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    for key, label in (("call_us", "forward call"), ("step_us", "step in one exchange")):
        left.plot(WORKERS, [found["by_workers"][str(w)][key] for w in WORKERS], "o-", label=label)
    left.set_ylabel("coordinator's CPU, microseconds")
    for name, circuit in found["circuits"].items():
        right.plot(WORKERS, [circuit["batches"][str(w)] for w in WORKERS], "o-", label=name)
    right.set_ylabel("least batch for half of the ideal speed-up")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(WORKERS, [str(w) for w in WORKERS])
        panel.set_xlabel("workers")
        panel.legend(frameon=False, fontsize="small")
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _measure(workers: int) -> dict[str, float]:
    import tensorflow as tf

    import qpool

    model = qpool.models.QuantumSFGenerator(n_modes=2, latent_dim=4, layers=2, cutoff_dim=8)
    z = tf.random.stateless_normal((workers * _TILE * _TILES, 4), (1, 2))
    with (
        simulated_pool(workers) as pool,
        qpool.parallelize(model, pool=pool, tile=_TILE) as generator,
    ):
        return {
            "call_us": _cpu_microseconds(lambda: generator(z)),
            "step_us": _cpu_microseconds(lambda: generator.loss_and_gradient(z, _loss)),
        }


def _loss(samples: Any) -> Any:
    return samples[:, 0]


def _cpu_microseconds(call: Any) -> float:
    call()
    found = []
    for _ in range(_TURNS):
        began = time.thread_time()
        for _ in range(_CALLS):
            call()
        found.append((time.thread_time() - began) / _CALLS)
    return 1e6 * statistics.median(found)


def _sample_seconds(modes: int, layers: int, cutoff: int) -> float:
    """What a sample's values and gradient cost one core, as workers compute them."""
    import tensorflow as tf

    import qpool
    from qpool.studies.bench.alone import alone_on_a_core

    del tf, qpool
    return float(alone_on_a_core(__name__, modes, layers, cutoff))


# -- simulated workers --------------------------------------------------------------------------


@contextlib.contextmanager
def simulated_pool(workers: int) -> Iterator[Any]:
    """A pool whose workers say that they have computed what they are asked for, and do nothing."""
    import qpool

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*share cores.*")
        pool = qpool.Pool(workers=workers, start_method="spawn", pin=False)
    pool._supervisor.launcher = _Simulated()
    with pool:
        yield pool


class _Simulated(Launcher[WorkerProcess]):
    """Starts simulated workers, all in one program."""

    name = "simulated"

    def __init__(self) -> None:
        super().__init__(1, WORKER)
        ours, theirs = socket.socketpair()
        self._control = ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, "answer", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def launch(self, number: int, segment_handle: int | str | None = None) -> WorkerProcess:
        ours, theirs = Pipe()
        socket.send_fds(self._control, [b"."], [theirs.fileno()])
        theirs.close()
        return WorkerProcess(number, self._process.pid, ours, _log_file(), self.reap)

    def reap(self, pid: int) -> int | None:
        return self._process.wait()

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


def _answer(control: int) -> None:
    """Answer for every worker whose channel comes by ``control``."""
    channels: dict[int, Connection] = {}
    with socket.socket(fileno=control) as incoming, selectors.DefaultSelector() as selector:
        selector.register(incoming, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is incoming:
                    said, handles, *_ = socket.recv_fds(incoming, 1, 1)
                    if not said:
                        return
                    channels[handles[0]] = Connection(handles[0])
                    selector.register(handles[0], selectors.EVENT_READ)
                    continue
                channel = channels[key.fd]
                try:
                    reply = _reply(protocol.decode(channel.recv_bytes()))
                except EOFError:
                    selector.unregister(key.fd)
                    channels.pop(key.fd).close()
                    continue
                if reply is not None:
                    channel.send_bytes(protocol.encode(reply))


def _reply(message: Any) -> Any:
    if isinstance(message, protocol.Start):
        return protocol.Hello(os.getpid(), (), False, {}, {}, 0.0)
    if isinstance(message, protocol.Confirm):
        return protocol.Confirmed(message.ticket, 0)
    if isinstance(message, protocol.Compute):
        moments = tuple(1e-3 * n for n in range(len(message.tiles) + 2))
        return protocol.Computed(message.ticket, 0, moments, 1.0, 1 << 28, 0)
    if isinstance(message, protocol.Probe):
        # Of the generator above: two samples a row, alone or with a row's loss; 28 variables.
        with_loss = bool(message.purpose.wanted)
        samples, loss = ArraySpec((2,), "<f4"), ArraySpec((), "<f4")
        return protocol.Probed(
            message.ticket,
            0,
            pickle.dumps((0, 1) if with_loss else 0),
            (samples, loss) if with_loss else (samples,),
            (True, True) if with_loss else (True,),
            1,
            False,
            True,
            float("inf"),
            (True,) * 64,
            "xla",
            "",
            0.0,
        )
    return None


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        _answer(int(sys.argv[2]))
