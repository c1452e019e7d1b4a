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
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import Any, Generic, TypeVar

#: Seconds to poll before sleeping: as long as the answer to a small batch takes, and far below
#: what a batch of any weight takes, so that a busy machine loses next to nothing to it.
SPIN_SECONDS = 200e-6

Who = TypeVar("Who")

_offer_core = getattr(os, "sched_yield", lambda: None)


class Waiter(Generic[Who]):
    """Waits on a changing set of channels, and says whose it is that can be read.

    It polls for ``spin`` seconds before it sleeps. That is for cores that nobody else wants: who is
    woken on a core where another one polls has waited 0.15 ms for it, offered or not.
    """

    def __init__(self, spin: float = SPIN_SECONDS) -> None:
        self._spin = spin
        self._poll = select.poll() if hasattr(select, "poll") else None
        #: By descriptor, or by channel where there is no poll.
        self._known: dict[Any, Who] = {}
        #: Descriptors of processes; and of the last ``wait``, those whose process has ended.
        self._processes: set[int] = set()
        self.ended: set[Who] = set()

    def add(self, who: Who, channel: Connection, process: int | None = None) -> None:
        """Wait on a channel, and for the end of the process that ``process`` is a descriptor of."""
        if self._poll is None:
            self._known[channel] = who
            return
        for handle in (channel.fileno(), process):
            if handle is not None:
                self._known[handle] = who
                self._poll.register(handle, select.POLLIN)
        if process is not None:
            self._processes.add(process)

    def remove(self, who: Who) -> None:
        """Stop waiting on someone, if it is one of those waited on."""
        for key in [key for key, known in self._known.items() if known is who]:
            del self._known[key]
            self._processes.discard(key)
            if self._poll is not None:
                self._poll.unregister(key)

    def wait(self, seconds: float | None) -> list[Who]:
        """Whose channels have something to read, or are at their end; empty after ``seconds``.

        A channel whose process has ended may have neither: somebody else holds its other end.
        """
        if self._poll is None:
            return [self._known[channel] for channel in wait_for_any(list(self._known), seconds)]
        poll = self._poll.poll
        ready = poll(0)
        if not ready and self._spin:
            until = time.perf_counter() + self._spin
            while not ready and time.perf_counter() < until:
                _offer_core()
                ready = poll(0)
        if not ready:
            ready = poll(None if seconds is None else max(0, int(seconds * 1000)))
        self.ended = {self._known[handle] for handle, _ in ready if handle in self._processes}
        return list(dict.fromkeys(self._known[handle] for handle, _ in ready))
