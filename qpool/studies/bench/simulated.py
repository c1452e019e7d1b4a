"""A pool of workers that compute nothing: more of them than any machine has cores.

One program answers for all of them, at once, over a channel each. So the coordinator's messages,
waiting and arrays are real; what it gets are the numbers that lay in the arena.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

from qpool.children.launchers import WORKER, Launcher, log_file
from qpool.children.process import WorkerProcess
from workers.errors import ConfigurationError
from workers.exchange import protocol
from workers.exchange.waiting import Waiter
from workers.layout import ArraySpec


@contextlib.contextmanager
def simulated_pool(workers: int) -> Iterator[Any]:
    """A pool whose workers say that they have computed what they are asked for, and do nothing."""
    import qpool

    if not hasattr(socket, "send_fds"):
        raise ConfigurationError(
            "workers are simulated where channels can be handed over: not here"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*share cores.*")
        pool = qpool.Pool(workers=workers, start_method="spawn", pin=False)
    pool._supervisor.launcher = _Simulated()
    pool._supervisor._waiter = Waiter(spin=0.0)  # polling is no work
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
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def launch(self, number: int, segment_handle: int | str | None = None) -> WorkerProcess:
        ours, theirs = Pipe()
        socket.send_fds(self._control, [b"."], [theirs.fileno()])
        theirs.close()
        return WorkerProcess(number, self._process.pid, ours, log_file(), self.reap)

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
                    message = protocol.decode(channel.recv_bytes())
                except EOFError:
                    message = protocol.Stop()
                if isinstance(message, protocol.Stop):
                    selector.unregister(key.fd)
                    channels.pop(key.fd).close()
                    continue
                if (reply := _reply(message)) is not None:
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
        # Of a generator of two modes: two samples a row, alone or with a row's loss.
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
    _answer(int(sys.argv[1]))
