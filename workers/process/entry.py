"""How a child process begins and how it ends with its coordinator.

Owns the entry of a fresh interpreter, and the watch over the coordinator's life. What a child then
does is its program's: a module with ``serve(channel, segment, log, forkserver=None)``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import select
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection


def spawned(program: str, handle: int, segment: int | None, log: int | None) -> None:
    """Run ``program`` in this fresh interpreter; ``handle`` is its channel."""
    if sys.platform == "win32":
        from multiprocessing.connection import PipeConnection

        channel = PipeConnection(handle)
    else:
        channel = Connection(handle)
    importlib.import_module(program).serve(channel, segment, log)


def die_with(coordinator: int, forkserver: int | None) -> threading.Thread:
    """End this process when the coordinator ends, even in the middle of a computation.

    Between messages the end of file on the channel says it. In a long tile nobody reads the
    channel, so a thread watches too: on a pidfd where there is one, by asking once a second
    elsewhere. The forkserver ends too: if it is stopped, it cannot do so by itself.
    """
    watch = functools.partial(_watch, coordinator, forkserver)
    thread = threading.Thread(target=watch, name="qpool-watch", daemon=True)
    thread.start()
    return thread


def _watch(coordinator: int, forkserver: int | None) -> None:
    try:
        watched = select.poll()
        watched.register(os.pidfd_open(coordinator), select.POLLIN)
        watched.poll()
    except ProcessLookupError:
        pass  # gone already
    except (OSError, AttributeError):  # no pidfd on this system
        import psutil

        while psutil.pid_exists(coordinator):
            time.sleep(1.0)
    if forkserver is not None:
        with contextlib.suppress(OSError):
            _end_forkserver(forkserver)
    os._exit(0)


def _end_forkserver(forkserver: int) -> None:
    """Have it end all that it forked, stopped ones too, which it does when it sees the end of its
    own channel; and end it if it does not."""
    for _ in range(10):
        if os.getppid() != forkserver:
            return
        os.kill(forkserver, signal.SIGCONT)
        time.sleep(0.1)
    os.kill(forkserver, signal.SIGKILL)
