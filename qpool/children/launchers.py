"""The two ways to start a child process over a channel, with TensorFlow's threads bounded.

- ``forkserver`` (Linux): forks of a process that has TensorFlow loaded (see ``forkserver``).
- ``spawn`` (everywhere): a fresh interpreter each.

Neither re-imports the user's ``__main__`` (what a child works on travels by value), so a script
needs no ``if __name__ == "__main__"``. Children get a session of their own: Ctrl-C in the terminal
reaches the coordinator alone. Owns the starting; what a child runs is its ``Program``'s.
"""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar

from qpool.children import interpreter
from qpool.children.process import ChildProcess, WorkerProcess
from workers import cache
from workers.errors import ConfigurationError, StartupError, nearest
from workers.process import affinity

if TYPE_CHECKING:
    from qpool.children.forkserver import ForkServer

_WINDOWS = sys.platform == "win32"

#: Seconds for a process that has been let go to end by itself.
_CLOSING_TIMEOUT = 2.0

Child = TypeVar("Child", bound=ChildProcess)


@dataclass(frozen=True)
class Program(Generic[Child]):
    """What a child runs: ``serve(channel, segment, log, forkserver)`` of the module ``entry``.

    ``preload`` are modules that a forkserver imports before it forks any; ``without`` packages that
    are left out when TensorFlow and Keras are loaded, which can do without. ``child`` is what a
    running one is to the coordinator.
    """

    entry: str
    preload: tuple[str, ...]
    child: type[Child]
    without: tuple[str, ...] = ()


#: A worker of a pool.
WORKER = Program(
    "workers.process.main",
    ("workers.process.main", "workers.replica.replica"),
    WorkerProcess,
    ("sklearn", "matplotlib", "pandas"),  # wrappers, pictures and tables: no model is made of them
)


class Launcher(abc.ABC, Generic[Child]):
    """Starts processes of one program. ``threads`` bounds the threads of each."""

    name: str

    def __init__(self, threads: int, program: Program[Child]) -> None:
        self._program = program
        self._environment = os.environ | affinity.environment(threads) | cache.environment(threads)

    def prepare(self) -> None:
        """Begin, in the background, what makes later launches quick."""

    def drop_compiled(self) -> None:
        """Delete the compiled code on disk: workers died one after another, perhaps of it."""
        cache.clear(cache.in_use(self._environment))

    def ready(self, *, wait: bool) -> bool:
        """Whether ``launch`` would return at once; with ``wait``, wait until it would."""
        return True

    @abc.abstractmethod
    def launch(self, number: int, segment_handle: int | str | None = None) -> Child:
        """Start one; it waits for its first message. ``segment_handle`` is of shared memory that
        it is to have."""

    @abc.abstractmethod
    def reap(self, pid: int) -> int | None:
        """Exit code of a worker that is dead or dying; None if it cannot be known."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what the launcher itself runs, and any worker still there."""


class SpawnLauncher(Launcher[Child]):
    """A fresh interpreter for each worker; works on every system."""

    name = "spawn"

    def __init__(self, threads: int, program: Program[Child]) -> None:
        super().__init__(threads, program)
        self._processes: dict[int, subprocess.Popen] = {}

    def launch(self, number: int, segment_handle: int | str | None = None) -> Child:
        ours, theirs = Pipe()
        log = log_file()
        segment = segment_handle if isinstance(segment_handle, int) else None
        said = [theirs.fileno(), segment, None if _WINDOWS else log.fileno()]
        handles = [handle for handle in said if handle is not None]
        try:
            process = interpreter.start(
                "workers.process.entry:spawned",
                [self._program.entry, *said],
                handles,
                self._environment,
            )
        except OSError as error:
            ours.close()
            log.close()
            raise StartupError(f"a worker could not be started: {error}") from error
        finally:
            theirs.close()
        self._processes[process.pid] = process
        return self._program.child(number, process.pid, ours, log, self.reap)

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


class ForkLauncher(Launcher[Child]):
    """Forks of the coordinator's fork server. One that died or hangs is replaced."""

    name = "forkserver"

    def __init__(self, threads: int, program: Program[Child]) -> None:
        super().__init__(threads, program)
        self._server: ForkServer | None = None
        #: Forked and not collected yet, each with the server that is its parent.
        self._children: dict[int, ForkServer] = {}

    @property
    def server(self) -> ForkServer:
        """The fork server, started if there is none."""
        from qpool.children import forkserver  # of systems that can fork

        if self._server is not None and self._server.ended:
            forkserver.leave(self._server)
            self._server = None
        if self._server is None:
            program = self._program
            self._server = forkserver.take(
                program.entry, program.preload, program.without, self._environment
            )
        return self._server

    def prepare(self) -> None:
        _ = self.server

    def ready(self, *, wait: bool) -> bool:
        return self.server.ready(wait=wait)

    def launch(self, number: int, segment_handle: int | str | None = None) -> Child:
        ours, theirs = Pipe()
        log = log_file()
        try:
            handles = [theirs.fileno(), log.fileno()]
            if segment_handle is not None:
                handles.append(int(segment_handle))
            server = self.server
            pid = server.fork(handles, self._environment)
            self._children[pid] = server
            return self._program.child(number, pid, ours, log, self.reap)
        except BaseException:
            ours.close()
            log.close()
            raise
        finally:
            theirs.close()

    def reap(self, pid: int) -> int | None:
        server = self._children.pop(pid, None)
        return None if server is None else server.reap(pid)

    def close(self) -> None:
        for pid, server in list(self._children.items()):
            if not server.ended:  # who has not been collected keeps its number
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.reap(pid)
        if self._server is not None:
            from qpool.children import forkserver

            forkserver.leave(self._server)
            self._server = None


def make_launcher(
    start_method: str | None, threads: int, program: Program[Any] = WORKER
) -> Launcher[Any]:
    """The launcher of that name; None takes the best that this system has."""
    if start_method in (None, "auto"):
        start_method = "forkserver" if _can_fork() else "spawn"
    if start_method == "forkserver":
        if not _can_fork():
            raise ConfigurationError(
                "start_method='forkserver' needs Linux; use 'spawn', or leave it out"
            )
        return ForkLauncher(threads, program)
    if start_method == "spawn":
        return SpawnLauncher(threads, program)
    raise ConfigurationError(
        f"unknown start_method {start_method!r}: "
        f"{nearest(str(start_method), ('forkserver', 'spawn', 'auto'))}"
    )


def _can_fork() -> bool:
    return sys.platform.startswith("linux") and hasattr(socket, "send_fds")


def log_file() -> IO[bytes]:
    """A file without a name, for a worker's last traceback."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("qpool-log", os.MFD_CLOEXEC), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)  # closed by who reads it
