"""The pool's own fork server: imports TensorFlow and Strawberry Fields once, then forks workers.

Linux only. A fork takes milliseconds and shares the imported pages; a fresh interpreter takes
seconds and its own copy. This process never runs TensorFlow (forking after that is unsafe) and
never starts a thread. It belongs to one coordinator, whose pools share it: the end of file on its
control socket ends it, and its children with it, and so does a time without work if it is told so.

    coordinator -> forkserver   Fork + [channel, log, output, errors, segment]   Reap     Keep
    forkserver -> coordinator   Ready, then Forked                               Reaped   Keep
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import pickle
import select
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from workers import collector
from workers.logs import hushed

#: Bytes of a request.
LIMIT = 1 << 16

#: A fork's descriptors.
_HANDLES = 5


@dataclass(frozen=True)
class Ready:
    """The imports are done."""

    seconds: float


@dataclass(frozen=True)
class Fork:
    """Start a worker with the descriptors that come with this message: its channel, its log, its
    output and error output, and the shared segment, if it is to have one.

    ``environment`` are variables that are other than the forkserver's, None for one that is not
    there; ``folder`` is the working directory.
    """

    request: int
    environment: dict[str, str | None]
    folder: str


@dataclass(frozen=True)
class Reap:
    """Collect the exit code of a child that is dead or dying."""

    pid: int


@dataclass(frozen=True)
class Keep:
    """End after so many seconds without a request, None: never. Answered by itself."""

    seconds: float | None


@dataclass(frozen=True)
class Forked:
    """Answers the Fork of that request."""

    request: int
    pid: int


@dataclass(frozen=True)
class Reaped:
    """Answers Reap: the exit code as ``subprocess`` gives it, None if it is not known."""

    pid: int
    code: int | None


def serve(control: socket.socket, entry: str, preload: list[str], without: list[str]) -> None:
    """Answer requests until the coordinator closes its end, then kill what is left."""
    import time

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began = time.perf_counter()
    with _ended_by(control), hushed(), collector.loading():
        _preload(preload, without)
    control.send(pickle.dumps(Ready(time.perf_counter() - began)))
    children: set[int] = set()
    waiter = select.poll()
    waiter.register(control, select.POLLIN)
    coordinator = os.pidfd_open(os.getppid())
    waiter.register(coordinator, select.POLLIN)  # a fork of it may hold the other socket
    patience: float | None = None
    while ready := waiter.poll(None if patience is None else patience * 1000):
        if any(handle == coordinator for handle, _ in ready):
            break
        data, handles, _flags, _address = socket.recv_fds(control, LIMIT, _HANDLES)
        if not data:
            break
        request = pickle.loads(data)
        answer: Forked | Reaped | Keep
        if isinstance(request, Fork):
            pid = os.fork()
            if pid == 0:
                control.close()
                _become_worker(entry, request, *handles)
            for handle in handles:
                os.close(handle)
            children.add(pid)
            answer = Forked(request.request, pid)
        elif isinstance(request, Keep):
            answer, patience = request, request.seconds
        else:
            answer = Reaped(request.pid, _reap(request.pid))
            children.discard(request.pid)
        try:
            control.send(pickle.dumps(answer))
        except ConnectionError:
            break
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in children:
        _reap(pid)


@contextlib.contextmanager
def _ended_by(control: socket.socket) -> Iterator[None]:
    """End this process when the coordinator goes while nobody reads the socket.

    A thread that watches would be in the way of forking; a signal is not. The coordinator says
    nothing before Ready, so what makes the socket ready is its closing.
    """
    fcntl.fcntl(control, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(control, fcntl.F_GETFL)
    fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC)  # SIGIO, which ends a process
    if select.select([control], [], [], 0)[0]:
        os._exit(0)  # it went before it could be signalled
    try:
        yield
    finally:
        fcntl.fcntl(control, fcntl.F_SETFL, flags)


def _reap(pid: int) -> int | None:
    """Exit code as ``subprocess`` gives it: negative for a signal; None if it is not known."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def _become_worker(
    entry: str,
    request: Fork,
    channel: int,
    log: int,
    output: int,
    errors: int,
    segment: int | None = None,
) -> None:
    """Never returns: a forked child must not run its parent's clean-up."""
    code = 1
    try:
        for handle, standard in ((output, 1), (errors, 2)):
            os.dup2(handle, standard)
            os.close(handle)
        for name, value in request.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        with contextlib.suppress(OSError):  # it is no more: then where the forkserver was started
            os.chdir(request.folder)
        program = importlib.import_module(entry)
        program.serve(Connection(channel), segment, log, forkserver=os.getppid())
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _preload(modules: list[str], without: list[str]) -> None:
    from workers import sf_compat

    sf_compat.install()
    with _absent(without):
        import tensorflow as tf  # and Keras
    import strawberryfields
    import strawberryfields.backends.tfbackend

    for module in modules:
        importlib.import_module(module)
    # TensorFlow and Keras load parts of themselves on first use: better once than per worker.
    _ = (tf.GradientTape, tf.nest, tf.random, tf.keras, strawberryfields.ops)


@contextlib.contextmanager
def _absent(packages: list[str]) -> Iterator[None]:
    """As if these were not installed: what could do with them does without from then on. Those that
    import them later find them."""
    absent = [name for name in packages if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def main(control: int, entry: str, preload: list[str], without: list[str]) -> None:
    """Entry point; ``control`` is the descriptor of the control socket, ``entry`` the program that
    children run, ``preload`` the modules that they are forked with, ``without`` the packages that
    TensorFlow and Keras do without."""
    with socket.socket(fileno=control) as connection:
        serve(connection, entry, preload, without)
