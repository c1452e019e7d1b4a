"""Settings of what runs within a ``with``: context variables that are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

_T = TypeVar("_T")


@contextlib.contextmanager
def during(variable: ContextVar[_T], value: _T) -> Iterator[_T]:
    """Within this the variable has the value, which is handed on."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
