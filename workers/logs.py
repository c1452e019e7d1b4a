"""What libraries say again and again, said once; what they say as they load, not at all."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


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


def hush_tensorflow() -> None:
    """Have TensorFlow load ``hushed``, whenever it is imported, if it has not been yet; and
    look for GPUs then, and say once what it says again and again."""
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _Hushing())


class _Hushing(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                with hushed():
                    load(module)
                    module.config.list_physical_devices("GPU")
                module.get_logger().addFilter(Once())

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class Once(logging.Filter):
    """Lets a warning, or less, of the same words through once; errors always; nothing below those
    if ``silent``.

    Made for TensorFlow's logger: stock Strawberry Fields casts a complex tensor to a real one in
    each gate, and TensorFlow warns of it each time. What it says of functions that are traced too
    often is no news where they are ours: one for each size of batch.
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
        ours = "tf.function retracing" in message and "named_lastingly" in message
        new = not self._silent and message not in self._said and not ours
        self._said.add(message)
        return new
