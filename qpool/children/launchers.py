"""The two ways to start a child process over a channel, with TensorFlow's threads bounded.

- ``forkserver`` (Linux): forks of the launcher's own nursery, which has TensorFlow loaded.
- ``spawn`` (everywhere): a fresh interpreter each.

Neither re-imports the user's ``__main__`` (what a child works on travels by value), so a script
needs no ``if __name__ == "__main__"``. Children get a session of their own: Ctrl-C in the terminal
reaches the coordinator alone. Owns the starting; what a child runs is its ``Program``'s.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from qpool.children.condition import STOPPED_TIMEOUT, is_stopped
from qpool.children.process import ChildProcess, WorkerProcess
from workers.compiling import compile_cache
from workers.errors import ConfigurationError, StartupError, nearest
from workers.process import affinity

_WINDOWS = sys.platform == "win32"

#: The nursery answers in milliseconds; one that does not is stopped or gone, and replaced. A step
#: that has lost a worker waits for the exit code (which is told, and not relied on).
_FORK_TIMEOUT = 5.0
_REAP_TIMEOUT = 0.5

#: Seconds for a process that has been let go to end by itself.
_CLOSING_TIMEOUT = 2.0

#: Importing TensorFlow and Strawberry Fields takes 5 s warm, and has taken 60 s on a cold disk.
_IMPORT_TIMEOUT = 300.0

#: The folder that holds the ``workers`` package, for interpreters that start from nothing.
_ROOT = str(Path(__file__).resolve().parents[2])

Child = TypeVar("Child", bound=ChildProcess)


@dataclass(frozen=True)
class Program(Generic[Child]):
    """What a child runs: ``serve(channel, segment, log, nursery)`` of the module ``entry``.

    ``preload`` are modules that a nursery imports before it forks any; ``without`` packages that
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
        self._environment = (
            os.environ | affinity.environment(threads) | compile_cache.environment(threads)
        )

    def prepare(self) -> None:
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
    def launch(self, number: int, segment_handle: int | str | None = None) -> Child:
        """Start one; it waits for its first message. ``segment_handle`` is of shared memory that
        it is to have."""

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


class SpawnLauncher(Launcher[Child]):
    """A fresh interpreter for each worker; works on every system."""

    name = "spawn"

    def __init__(self, threads: int, program: Program[Child]) -> None:
        super().__init__(threads, program)
        self._processes: dict[int, subprocess.Popen] = {}

    def launch(self, number: int, segment_handle: int | str | None = None) -> Child:
        ours, theirs = Pipe()
        log = _log_file()
        segment = segment_handle if isinstance(segment_handle, int) else None
        said = [theirs.fileno(), segment, None if _WINDOWS else log.fileno()]
        handles = [handle for handle in said if handle is not None]
        try:
            process = self._popen(
                "workers.process.entry:spawned", [self._program.entry, *said], handles
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
    """Forks of the pool's own nursery. A nursery that died or hangs is replaced."""

    name = "forkserver"

    def __init__(self, threads: int, program: Program[Child]) -> None:
        super().__init__(threads, program)
        self._nursery: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._ready = False
        self._requests = 0

    def prepare(self) -> None:
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._nursery = self._popen(
                    "workers.process.nursery:main",
                    [
                        theirs.fileno(),
                        self._program.entry,
                        self._program.preload,
                        self._program.without,
                    ],
                    [theirs.fileno()],
                )
            self._control = ours

    def launch(self, number: int, segment_handle: int | str | None = None) -> Child:
        from workers.process import nursery

        ours, theirs = Pipe()
        log = _log_file()
        try:
            control = self._connected()
            handles = [theirs.fileno(), log.fileno()]
            if segment_handle is not None:
                handles.append(int(segment_handle))
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
            return self._program.child(number, forked.pid, ours, log, self.reap)
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


def _log_file() -> IO[bytes]:
    """A file without a name, for a worker's last traceback."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("qpool-log", os.MFD_CLOEXEC), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)  # closed by who reads it
