"""The fork server as the coordinator sees it: one process, which all pools alike share.

It loads TensorFlow once, which takes seconds, and then forks a worker in milliseconds (what it
runs: ``workers.process.forkserver_main``). Who is the last to let go of it leaves it for a while,
so that a pool made after another starts at once; then it ends by itself. It ends with the
coordinator in any case.

Owns the process, what is asked of it, and who shares it. Workers live on when it dies: they watch
the coordinator.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qpool.children import interpreter
from qpool.children.condition import STOPPED_TIMEOUT, is_stopped
from workers.errors import StartupError
from workers.process import affinity, forkserver_main

#: It answers in milliseconds; one that does not is stopped or gone, and replaced. A step that has
#: lost a worker waits for the exit code (which is told, and not relied on).
_FORK_TIMEOUT = 5.0
_REAP_TIMEOUT = 0.5

#: Importing TensorFlow and Strawberry Fields takes 3 s warm, and has taken 60 s on a cold disk.
_IMPORT_TIMEOUT = 300.0

#: Seconds that one which nobody uses is left for the next pool.
KEPT_SECONDS = 60.0

#: Beginnings of the variables that libraries read while they are loaded. Where these differ, a
#: server is not shared; the others are as the pool's maker had them in each worker.
_READ_WHILE_LOADING = (
    *("TF_", "XLA_", "CUDA_", "ROCR_", "HIP_", "KERAS_", "NVIDIA_", "ABSL_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "VECLIB_", "NUMEXPR_", "NUMBA_", "NPY_"),
    *("PYTHON", "LD_", "DYLD_", "MALLOC_", "GLIBC_", "QPOOL_", "HOME", "PATH", "LANG", "LC_"),
)


class ForkServer:
    """A running fork server of one program (see ``launchers.Program``)."""

    def __init__(
        self,
        entry: str,
        preload: Sequence[str],
        without: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = interpreter.start(
                "workers.process.forkserver_main:main",
                [theirs.fileno(), entry, list(preload), list(without)],
                [theirs.fileno()],
                environment,
            )
        self._control = ours
        self._environment = dict(environment)
        self._ready = False
        self._requests = 0
        self._lock = threading.RLock()
        self.users = 0
        self._finalizer = weakref.finalize(self, _end, self._process, ours, os.getpid())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has been dropped, or has ended by itself."""
        return not self._finalizer.alive or self._process.poll() is not None

    def changes(self, environment: Mapping[str, str]) -> dict[str, str | None]:
        """What has to be set, and with None to be deleted, in a worker of this environment."""
        wanted: dict[str, str | None] = dict.fromkeys(self._environment.keys() - environment.keys())
        for name, value in environment.items():
            if self._environment.get(name) != value:
                wanted[name] = value
        return wanted

    def ready(self, *, wait: bool) -> bool:
        """Whether it has loaded what it loads; with ``wait``, wait until it has."""
        if not self._lock.acquire(blocking=wait):
            return False
        try:
            if not self._ready:
                if not wait and not select.select([self._control], [], [], 0)[0]:
                    return False
                try:
                    self._await_imports()
                    self._answer(lambda answer: isinstance(answer, forkserver_main.Ready))
                except (OSError, EOFError) as error:
                    self.drop()
                    raise StartupError(
                        "the process that forks workers ended, or was stopped, while it imported "
                        f"TensorFlow and Strawberry Fields ({error}); its own output is above"
                    ) from error
                self._ready = True
            return True
        finally:
            self._lock.release()

    def fork(self, handles: Sequence[int], environment: Mapping[str, str]) -> int:
        """The pid of a new worker with these descriptors: its channel, its log, and the shared
        segment if it is to have one. Its output goes where this process's goes now."""
        with self._lock, _output() as output:
            self.ready(wait=True)
            # Numbered: the answer to a request that Ctrl-C interrupted names another process.
            self._requests += 1
            request = forkserver_main.Fork(self._requests, self.changes(environment), os.getcwd())
            channel, log, *segment = handles
            try:
                forked = self._ask(
                    request,
                    lambda a: (
                        isinstance(a, forkserver_main.Forked) and a.request == request.request
                    ),
                    _FORK_TIMEOUT,
                    [channel, log, *output, *segment],
                )
            except (OSError, EOFError) as error:
                raise StartupError(
                    f"the process that forks workers did not answer: {error}. Another one is "
                    "started; start_method='spawn' does without it"
                ) from error
            return int(forked.pid)

    def reap(self, pid: int) -> int | None:
        """The exit code of a worker that is dead or dying; None if it cannot be known."""
        with self._lock:
            if self.ended or not self._ready:
                return None
            with contextlib.suppress(OSError, EOFError):
                code: int | None = self._ask(
                    forkserver_main.Reap(pid),
                    lambda a: isinstance(a, forkserver_main.Reaped) and a.pid == pid,
                    _REAP_TIMEOUT,
                ).code
                return code
            return None

    def keep(self, seconds: float | None) -> bool:
        """Have it end after so many seconds without work, None: never; whether it heard that.

        One that has not loaded everything hears nothing.
        """
        with self._lock:
            if self.ended or not self._ready:
                return False
            with contextlib.suppress(OSError, EOFError):
                self._ask(
                    forkserver_main.Keep(seconds),
                    lambda a: isinstance(a, forkserver_main.Keep) and a.seconds == seconds,
                    _FORK_TIMEOUT,
                )
                return True
            return False

    def drop(self) -> None:
        """End it. Those that share it start another one."""
        self._finalizer()

    def _await_imports(self) -> None:
        """Wait until it has something to say; OSError if it hangs or was stopped."""
        deadline, stopped = time.monotonic() + _IMPORT_TIMEOUT, 0
        while not select.select([self._control], [], [], STOPPED_TIMEOUT / 5)[0]:
            stopped = stopped + 1 if is_stopped(self.pid) else 0
            if stopped > 5 or time.monotonic() > deadline:
                raise OSError("it was stopped" if stopped else "it took too long")
        self._control.settimeout(_REAP_TIMEOUT)

    def _ask(
        self,
        request: Any,
        wanted: Callable[[Any], bool],
        seconds: float,
        handles: Sequence[int] = (),
    ) -> Any:
        """The answer to a request; OSError or EOFError, and the server is dropped, without one."""
        try:
            self._control.settimeout(seconds)
            socket.send_fds(self._control, [pickle.dumps(request)], list(handles))
            return self._answer(wanted)
        except (OSError, EOFError):
            self.drop()
            raise

    def _answer(self, wanted: Callable[[Any], bool]) -> Any:
        """The answer that is ``wanted``; ones that an interrupted request left are dropped.

        An exit code taken for a pid would have the wrong process killed.
        """
        while data := self._control.recv(4096):
            answer = pickle.loads(data)
            if wanted(answer):
                return answer
        raise EOFError("it closed its socket")


def _end(process: subprocess.Popen, control: socket.socket, owner: int) -> None:
    if os.getpid() != owner:  # a forked copy
        return
    with contextlib.suppress(OSError):  # a fork of this process may hold the socket too
        control.shutdown(socket.SHUT_RDWR)
    control.close()
    process.kill()
    process.wait()


@contextlib.contextmanager
def _output() -> Any:
    """Descriptors of this process's output and error output; the null device for one that is
    closed."""
    with contextlib.ExitStack() as stack:
        handles = []
        for handle in (1, 2):
            try:
                os.fstat(handle)
            except OSError:
                handle = os.open(os.devnull, os.O_WRONLY)
                stack.callback(os.close, handle)
            handles.append(handle)
        yield handles


# -- who shares them ---------------------------------------------------------------------------

_registry = threading.RLock()
_servers: dict[Any, ForkServer] = {}


def _forked() -> None:
    global _registry
    _registry = threading.RLock()  # whoever held it is not in this copy


os.register_at_fork(after_in_child=_forked)


def take(
    entry: str, preload: Sequence[str], without: Sequence[str], environment: Mapping[str, str]
) -> ForkServer:
    """A fork server for workers of this program and environment, which may be in use already."""
    loading = {k: v for k, v in environment.items() if k.startswith(_READ_WHILE_LOADING)}
    key = (os.getpid(), entry, affinity.current_cores(), frozenset(loading.items()))
    with _registry:
        server = _servers.get(key)
        fits = (
            server is not None
            and not server.ended
            and len(pickle.dumps(server.changes(environment))) < forkserver_main.LIMIT // 2
            and (server.users > 0 or server.keep(None))
        )
        if server is None or not fits:
            server = _servers[key] = ForkServer(entry, preload, without, environment)
        server.users += 1
        return server


def leave(server: ForkServer) -> None:
    """Let go of one: if nobody else has it, it is kept for a while, in place of any other."""
    with _registry:
        server.users -= 1
        if not server.users:
            end_unused(but=server)
            if not server.keep(KEPT_SECONDS):
                server.drop()


def end_unused(*, but: ForkServer | None = None) -> None:
    """End those that are kept for pools that are still to come, but for one of them."""
    with _registry:
        for key, server in list(_servers.items()):
            if server.ended or not (server.users or server is but):
                server.drop()
                del _servers[key]
