"""One worker process as the coordinator sees it, and the two ways to start one.

Owns processes and channels: start, kill, collect. What is said over a channel is the pool's
business. Neither way re-imports the user's ``__main__`` (models travel by value), so a script
needs no ``if __name__ == "__main__"``.

- ``forkserver`` (Linux): forks of the pool's own nursery, which has TensorFlow loaded.
- ``spawn`` (everywhere): a fresh interpreter each.

Workers get a session of their own: Ctrl-C in the terminal reaches the coordinator alone.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from qpool.executors.processes.condition import (
    STOPPED_TIMEOUT,
    describe_exit,
    is_stopped,
)
from workers.compiling import compile_cache
from workers.errors import (
    ConfigurationError,
    PoolError,
    QPoolError,
    StartupError,
    nearest,
)
from workers.exchange import protocol
from workers.process import affinity

_WINDOWS = sys.platform == "win32"

#: The nursery answers in milliseconds; one that does not is stopped or gone, and replaced. A step
#: that has lost a worker waits for the exit code (which is told, and not relied on).
_FORK_TIMEOUT = 5.0
_REAP_TIMEOUT = 0.5

#: Seconds in which a worker must have taken up a message that is larger than the channel.
_SEND_TIMEOUT = 60

#: Seconds for a process that has been let go to end by itself.
_CLOSING_TIMEOUT = 2.0

#: A killed process ends in milliseconds, or some seconds later if it is written to disk (a core
#: dump).
_END_TIMEOUT = 60.0

#: Importing TensorFlow and Strawberry Fields takes 5 s warm, and has taken 60 s on a cold disk.
_IMPORT_TIMEOUT = 300.0

#: The folder that holds the ``workers`` package, for interpreters that start from nothing.
_ROOT = str(Path(__file__).resolve().parents[3])


class WorkerProcess:
    """A running worker: its number, its channel and its process.

    ``log`` is where a fatal signal leaves the worker's traceback.
    """

    def __init__(
        self, number: int, pid: int, channel: Connection, log: IO[bytes], launcher: Launcher
    ) -> None:
        _bound_sending(channel)
        self.number = number
        self.pid = pid
        self.channel = channel
        self._log = log
        self._launcher = launcher
        #: Stands for this very process, also when its number has been given to another (Linux).
        self.handle: int | None = None
        with contextlib.suppress(OSError, AttributeError):
            self.handle = os.pidfd_open(pid)
            self._end = select.poll()
            self._end.register(self.handle, select.POLLIN)
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
        #: The traceback that it sent before it ended.
        self.last_words = ""

    def send(self, message: Any) -> None:
        """Send one message; OSError if the worker is gone."""
        self.channel.send_bytes(protocol.encode(message))

    def receive(self) -> Any:
        """The next reply; EOFError or OSError if the worker is gone."""
        if self._ended(0) and not self.channel.poll(0):
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

    def cpu_use(self) -> float:
        """CPU seconds over wall seconds since it said Hello: 1 is one core, all of the time."""
        since, before = self.greeted
        return (self.cpu_seconds() - before) / (time.monotonic() - since)

    def note_last_words(self, reply: Any) -> bool:
        """Keep the traceback of a worker that says it is ending; whether it said so."""
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
        """Wait for the end of a killed or dying worker and say how it ended.

        When this returns the process is gone, and can write to the arena no more: the system says
        so of the process itself (Linux), or closes its channel, which it does after taking its
        memory away. The first line tells the end, those after it are the worker's own traceback.
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
                    f"worker {self.number} (pid {self.pid}) was killed and is still there after "
                    f"{_END_TIMEOUT:.0f} s (an unresponsive disk?). While it may write to the "
                    "shared segment no result can be trusted: close the pool and make a new one"
                )
        self.channel.close()
        code = self._launcher.reap(self.pid)
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
        if not self._log.closed:
            self._log.seek(0)
            self.last_words += self._log.read().decode(errors="replace")
            self._log.close()
        end = "ran out of memory" if "MemoryError" in self.last_words else describe_exit(code)
        return "\n".join([end, *self.last_words.strip().splitlines()])


class Launcher(abc.ABC):
    """Starts workers. ``threads`` bounds the threads of each."""

    name: str

    def __init__(self, threads: int) -> None:
        self._environment = (
            os.environ | affinity.environment(threads) | compile_cache.environment(threads)
        )

    def prepare(self) -> None:  # noqa: B027 - optional: there may be nothing to prepare
        """Begin, in the background, what makes later launches quick."""

    @property
    def keeps_compiled(self) -> bool:
        """Whether a worker finds on disk what another one has compiled."""
        return compile_cache.in_use(self._environment) is not None

    def drop_compiled(self) -> None:
        """Delete the compiled code on disk: workers died one after another, perhaps of it."""
        compile_cache.clear(compile_cache.in_use(self._environment))

    def ready(self, *, wait: bool) -> bool:
        """Whether ``launch`` would return at once; with ``wait``, wait until it would."""
        return True

    @abc.abstractmethod
    def launch(self, number: int, segment_handle: int | str) -> WorkerProcess:
        """Start one worker; it waits for its Start message."""

    @abc.abstractmethod
    def reap(self, pid: int) -> int | None:
        """Exit code of a worker that is dead or dying; None if it cannot be known."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what the launcher itself runs, and any worker still there."""

    def _popen(self, entry: str, arguments: list[Any], handles: list[int]) -> subprocess.Popen:
        """A fresh interpreter that runs ``entry(*arguments)`` with ``handles`` open."""
        module, function = entry.split(":")
        code = (
            f"import sys, json; sys.path.insert(0, {_ROOT!r}); "
            f"from {module} import {function}; {function}(*json.loads(sys.argv[1]))"
        )
        options: dict[str, Any] = {"env": self._environment, "stdin": subprocess.DEVNULL}
        if _WINDOWS:
            startup = subprocess.STARTUPINFO()  # type: ignore[attr-defined]
            startup.lpAttributeList = {"handle_list": handles}
            for handle in handles:
                os.set_handle_inheritable(handle, True)  # type: ignore[attr-defined]
            options |= {
                "startupinfo": startup,
                "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP,  # type: ignore[attr-defined]
            }
        else:
            options |= {"pass_fds": handles, "start_new_session": True}
        return subprocess.Popen([sys.executable, "-c", code, json.dumps(arguments)], **options)


class SpawnLauncher(Launcher):
    """A fresh interpreter for each worker; works on every system."""

    name = "spawn"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._processes: dict[int, subprocess.Popen] = {}

    def launch(self, number: int, segment_handle: int | str) -> WorkerProcess:
        ours, theirs = Pipe()
        log = _log_file()
        handles = [theirs.fileno()]
        if isinstance(segment_handle, int):
            handles += [segment_handle, log.fileno()]
            arguments: list[Any] = list(handles)
        else:
            arguments = [*handles, None, None]
        try:
            process = self._popen("workers.process.main:spawned", arguments, handles)
        except OSError as error:
            ours.close()
            log.close()
            raise StartupError(f"a worker could not be started: {error}") from error
        finally:
            theirs.close()
        self._processes[process.pid] = process
        return WorkerProcess(number, process.pid, ours, log, self)

    def reap(self, pid: int) -> int | None:
        process = self._processes.pop(pid, None)
        if process is None:
            return None
        try:
            return process.wait(_CLOSING_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._processes[pid] = process
            return None

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        for pid in list(self._processes):
            self.reap(pid)


class ForkLauncher(Launcher):
    """Forks of the pool's own nursery. A nursery that died or hangs is replaced."""

    name = "forkserver"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._nursery: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._ready = False
        self._requests = 0

    def prepare(self) -> None:
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._nursery = self._popen(
                    "workers.process.nursery:main", [theirs.fileno()], [theirs.fileno()]
                )
            self._control = ours

    def launch(self, number: int, segment_handle: int | str) -> WorkerProcess:
        from workers.process import nursery

        ours, theirs = Pipe()
        log = _log_file()
        try:
            control = self._connected()
            handles = [theirs.fileno(), int(segment_handle), log.fileno()]
            try:
                control.settimeout(_FORK_TIMEOUT)
                # Numbered: the answer to a request that Ctrl-C interrupted names another process.
                self._requests += 1
                request = nursery.Fork(self._requests)
                socket.send_fds(control, [pickle.dumps(request)], handles)
                forked = self._answer(
                    control,
                    lambda a: isinstance(a, nursery.Forked) and a.request == request.request,
                )
            except (OSError, EOFError) as error:
                self._drop_nursery()
                raise StartupError(
                    f"the process that forks workers did not answer: {error}. Another one is "
                    "started; start_method='spawn' does without it"
                ) from error
            return WorkerProcess(number, forked.pid, ours, log, self)
        except BaseException:
            ours.close()
            log.close()
            raise
        finally:
            theirs.close()

    def reap(self, pid: int) -> int | None:
        from workers.process import nursery

        if self._control is None or not self._ready:
            return None  # its nursery is gone, and with it who could know
        try:
            self._control.settimeout(_REAP_TIMEOUT)
            self._control.send(pickle.dumps(nursery.Reap(pid)))
            wanted = nursery.Reaped
            return self._answer(
                self._control, lambda a: isinstance(a, wanted) and a.pid == pid
            ).code
        except (OSError, EOFError):
            self._drop_nursery()
            return None

    def close(self) -> None:
        if self._nursery is None or self._control is None:
            return
        with contextlib.suppress(OSError):  # a fork of this process may hold the socket too
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        if not self._ready:
            self._nursery.kill()  # it has no children, and reads nothing while it imports
        try:
            self._nursery.wait(_CLOSING_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()
        self._nursery = self._control = None

    def ready(self, *, wait: bool) -> bool:
        from workers.process import nursery

        self.prepare()
        assert self._control is not None
        if not self._ready:
            if not wait and not select.select([self._control], [], [], 0)[0]:
                return False
            try:
                self._await_imports(self._control)
                self._answer(self._control, lambda a: isinstance(a, nursery.Ready))
            except (OSError, EOFError) as error:
                self._drop_nursery()
                raise StartupError(
                    "the process that forks workers ended, or was stopped, while it imported "
                    f"TensorFlow and Strawberry Fields ({error}); its own output is above"
                ) from error
            self._ready = True
        return True

    def _await_imports(self, control: socket.socket) -> None:
        """Wait until the nursery has something to say; OSError if it hangs or was stopped."""
        assert self._nursery is not None
        deadline, stopped = time.monotonic() + _IMPORT_TIMEOUT, 0
        while not select.select([control], [], [], STOPPED_TIMEOUT / 5)[0]:
            stopped = stopped + 1 if is_stopped(self._nursery.pid) else 0
            if stopped > 5 or time.monotonic() > deadline:
                raise OSError("it was stopped" if stopped else "it took too long")
        control.settimeout(_REAP_TIMEOUT)

    def _connected(self) -> socket.socket:
        self.ready(wait=True)
        assert self._control is not None
        return self._control

    @staticmethod
    def _answer(control: socket.socket, wanted: Callable[[Any], bool]) -> Any:
        """The answer that is ``wanted``; ones that an interrupted request left are dropped.

        An exit code taken for a pid would have the wrong process killed.
        """
        while data := control.recv(4096):
            answer = pickle.loads(data)
            if wanted(answer):
                return answer
        raise EOFError("it closed its socket")

    def _drop_nursery(self) -> None:
        """Its workers live on: they watch the coordinator, not the nursery."""
        if self._control is not None:
            self._control.close()
        if self._nursery is not None:
            self._nursery.kill()
            self._nursery.wait()
        self._nursery = self._control = None
        self._ready = False


def make_launcher(start_method: str | None, threads: int) -> Launcher:
    """The launcher of that name; None takes the best that this system has."""
    if start_method in (None, "auto"):
        start_method = "forkserver" if _can_fork() else "spawn"
    if start_method == "forkserver":
        if not _can_fork():
            raise ConfigurationError(
                "start_method='forkserver' needs Linux; use 'spawn', or leave it out"
            )
        return ForkLauncher(threads)
    if start_method == "spawn":
        return SpawnLauncher(threads)
    raise ConfigurationError(
        f"unknown start_method {start_method!r}: "
        f"{nearest(str(start_method), ('forkserver', 'spawn', 'auto'))}"
    )


def _can_fork() -> bool:
    return sys.platform.startswith("linux") and hasattr(socket, "send_fds")


def _bound_sending(channel: Connection) -> None:
    """Have a send fail that the other side does not take up: it is stopped, or hangs."""
    if not _WINDOWS:
        with socket.socket(fileno=os.dup(channel.fileno())) as same:
            seconds = struct.pack("ll", _SEND_TIMEOUT, 0)
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)


def _log_file() -> IO[bytes]:
    """A file without a name, for a worker's last traceback."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("qpool-log", os.MFD_CLOEXEC), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)  # closed by who reads it
