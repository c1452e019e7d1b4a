"""Wait on channels with little latency.

Owns the trade between latency and an idle core. A core that sleeps 0.2 ms wakes cold: on the
machine where this was measured the next TensorFlow call then takes 46 us in place of 6. So a
waiter first polls for a short while, offering its core to others each time round, and only then
sleeps. Where there is no ``poll`` (Windows) it just sleeps.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any

#: Seconds to poll before sleeping: as long as the answer to a small batch takes, and far below
#: what a batch of any weight takes, so that a busy machine loses next to nothing to it.
SPIN_SECONDS = 200e-6


_offer_core = getattr(os, "sched_yield", lambda: None)


class Waiter:
    """Waits on a changing set of channels."""

    def __init__(self) -> None:
        self._poll = select.poll() if hasattr(select, "poll") else None
        self._channels: dict[int, Connection] = {}

    def add(self, channel: Connection, process: int | None = None) -> None:
        """Wait on a channel, and for the end of the process that ``process`` is a descriptor of."""
        for handle in (channel.fileno(), process):
            if handle is not None and (self._poll is not None or handle != process):
                self._channels[handle] = channel
                if self._poll is not None:
                    self._poll.register(handle, select.POLLIN)

    def remove(self, channel: Connection) -> None:
        """Stop waiting on a channel, if it is one of those waited on."""
        for handle in [handle for handle, known in self._channels.items() if known is channel]:
            del self._channels[handle]
            if self._poll is not None:
                self._poll.unregister(handle)

    def wait(self, seconds: float | None) -> Sequence[Connection]:
        """Channels with something to read, or at their end; empty after ``seconds``.

        A channel whose process has ended may have neither: somebody else holds its other end.
        """
        if self._poll is None:
            return wait_for_any(list(self._channels.values()), seconds)  # type: ignore[return-value]
        poll = self._poll.poll
        ready = poll(0)
        if not ready:
            until = time.perf_counter() + SPIN_SECONDS
            while not ready and time.perf_counter() < until:
                _offer_core()
                ready = poll(0)
            if not ready:
                ready = poll(None if seconds is None else max(0, int(seconds * 1000)))
        return list(dict.fromkeys(self._channels[handle] for handle, _ in ready))
