"""What libraries say again and again, said once; what they say as they load, not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """While TensorFlow loads: what its libraries write of oneDNN, of GPUs that are not there and of
    processors is for nobody. It goes to the terminal after all if loading fails.

    They write to the descriptor, by no logger and whatever ``TF_CPP_MIN_LOG_LEVEL`` says.
    """
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)


class Once(logging.Filter):
    """Lets a warning, or less, of the same words through once; errors always; nothing below those
    if ``silent``.

    Made for TensorFlow's logger: stock Strawberry Fields casts a complex tensor to a real one in
    each gate, and TensorFlow warns of it each time.
    """

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__()
        self._silent = silent
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is let through."""
        if record.levelno > logging.WARNING:
            return True
        message = record.getMessage()
        new = not self._silent and message not in self._said
        self._said.add(message)
        return new
