"""One child process as the coordinator sees it: its channel, its end, and why it ended.

Owns what is said to and heard of one process, and how it is killed and collected. What is said over
a channel is the business of who started it; how one is started, ``launchers``'.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Hashable
from multiprocessing.connection import Connection
from typing import IO, Any

from qpool.children.condition import describe_exit
from workers.errors import PoolError, QPoolError
from workers.exchange import protocol

#: Seconds in which a process must have taken up a message that is larger than the channel.
_SEND_TIMEOUT = 60

#: A killed process ends in milliseconds, or some seconds later if it is written to disk (a core
#: dump).
_END_TIMEOUT = 60.0


class ChildProcess:
    """A running child: its number, its channel and its process.

    ``log`` is where a fatal signal leaves its traceback; ``reap`` gives the exit code of a pid.
    """

    #: What it is called in messages.
    word = "process"

    def __init__(
        self,
        number: int,
        pid: int,
        channel: Connection,
        log: IO[bytes],
        reap: Callable[[int], int | None],
    ) -> None:
        _bound_sending(channel)
        self.number = number
        self.pid = pid
        self.channel = channel
        self._log = log
        self._reap = reap
        #: Stands for this very process, also when its number has been given to another (Linux).
        self.handle: int | None = None
        with contextlib.suppress(OSError, AttributeError):
            self.handle = os.pidfd_open(pid)
            self._end = select.poll()
            self._end.register(self.handle, select.POLLIN)
        #: The traceback that it sent before it ended.
        self.last_words = ""

    def send(self, message: Any) -> None:
        """Send one message; OSError if it is gone."""
        self.channel.send_bytes(protocol.encode(message))

    def receive(self, *, ended: bool | None = None) -> Any:
        """The next reply; EOFError or OSError if it is gone. ``ended``: whether its process has
        ended, where that is known."""
        if (self._ended(0) if ended is None else ended) and not self.channel.poll(0):
            raise EOFError("its process ended")  # and a child of it holds its end of the channel
        return protocol.decode(self.channel.recv_bytes())

    def _ended(self, seconds: float) -> bool:
        """Whether its process has ended, after waiting for that; False if the system cannot say."""
        if self.handle is None:
            return False
        return bool(self._end.poll(int(seconds * 1000)))

    def cpu_seconds(self) -> float:
        """CPU time it has used, as the system counts it; 0 if it is gone."""
        import psutil

        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def note_last_words(self, reply: Any) -> bool:
        """Keep the traceback of one that says it is ending; whether it said so."""
        if isinstance(reply, protocol.Crashed):
            self.last_words = reply.traceback
            return True
        return False

    def kill(self) -> None:
        """End it now, stopped or not."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.handle is not None:
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            else:
                os.kill(self.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def collect(self) -> str:
        """Wait for the end of a killed or dying process and say how it ended.

        When this returns the process is gone, and can write to the arena no more: the system says
        so of the process itself (Linux), or closes its channel, which it does after taking its
        memory away. The first line tells the end, those after it are its own traceback.
        """
        deadline = time.monotonic() + _END_TIMEOUT
        ended = self._ended(_END_TIMEOUT)
        with contextlib.suppress(EOFError, OSError):
            while self.channel.poll(0.0 if ended else max(0.0, deadline - time.monotonic())):
                data = self.channel.recv_bytes()
                with contextlib.suppress(Exception):  # half a message, if a read was interrupted
                    self.note_last_words(protocol.decode(data))
            if not ended:
                raise PoolError(
                    f"{self.word} {self.number} (pid {self.pid}) was killed and is still there "
                    f"after {_END_TIMEOUT:.0f} s (an unresponsive disk?). While it may write to "
                    "what it shares no result can be trusted: close the pool and make a new one"
                )
        self.channel.close()
        code = self._reap(self.pid)
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
        if not self._log.closed:
            self._log.seek(0)
            self.last_words += self._log.read().decode(errors="replace")
            self._log.close()
        end = "ran out of memory" if "MemoryError" in self.last_words else describe_exit(code)
        return "\n".join([end, *self.last_words.strip().splitlines()])


class WorkerProcess(ChildProcess):
    """A worker of a pool, with what the pool knows of it."""

    word = "worker"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        #: What it has been told: ids and the very objects, so that a change is told again.
        self.told: dict[Any, Any] = {}
        self.hello: protocol.Hello | None = None
        #: When it said Hello, and its CPU seconds then.
        self.greeted = (0.0, 0.0)
        #: Its progress counter when it last answered: tiles beyond that are of unanswered messages.
        self.answered = 0
        #: Why a definition (model, plan) failed; the next failed message is due to it.
        self.failure: QPoolError | None = None
        #: Tickets of the messages it has not answered, with the kind of each tile asked for.
        self.owed: dict[int, tuple[Hashable, ...]] = {}
        #: Kinds of tiles that it has computed.
        self.seen: set[Hashable] = set()
        #: Seconds in which nothing was heard of it, and its progress counter then.
        self.silent = (0.0, 0)
        #: Its own bytes of memory, as last reported; the most it had while it warmed up; and when
        #: it last computed a tile of a kind that was new to it.
        self.memory = 0
        self.warm_memory = 0
        self.new_until = 0.0

    def cpu_use(self) -> float:
        """CPU seconds over wall seconds since it said Hello: 1 is one core, all of the time."""
        since, before = self.greeted
        return (self.cpu_seconds() - before) / (time.monotonic() - since)


def _bound_sending(channel: Connection) -> None:
    """Have a send fail that the other side does not take up: it is stopped, or hangs."""
    if sys.platform != "win32":
        with socket.socket(fileno=os.dup(channel.fileno())) as same:
            seconds = struct.pack("ll", _SEND_TIMEOUT, 0)
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
