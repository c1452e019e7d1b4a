"""Strategies by name: where tiles are computed, one strategy a file.

sequential   the model in place
cpu_batch    the compiled engine in this process, whole batch at once
threads      the pool's tiles, in threads of this process
processes    a pool of worker processes with shared memory
ray          a pool on each node of a Ray cluster
auto         the fastest of these, measured
"""

from __future__ import annotations

import importlib
import inspect
from importlib import metadata

from qpool.executors.base import Executor, Options
from workers.errors import ConfigurationError, nearest

__all__ = ["Executor", "Options", "executor_class", "register_strategy", "strategies"]

#: Name -> class, or where to import it from: a strategy loads when it is first asked for.
_STRATEGIES: dict[str, type[Executor] | str] = {
    "sequential": "qpool.executors.in_place.sequential:SequentialExecutor",
    "cpu_batch": "qpool.executors.in_place.cpu_batch:CpuBatchExecutor",
    "threads": "qpool.executors.threads:ThreadExecutor",
    "processes": "qpool.executors.processes.executor:ProcessExecutor",
    "ray": "qpool.executors.cluster:RayExecutor",
    "auto": "qpool.executors.auto.executor:AutoExecutor",
}


def strategies() -> tuple[str, ...]:
    """The names that ``strategy=`` takes."""
    return tuple(sorted(_STRATEGIES))


def register_strategy(name: str, executor_class: type[Executor]) -> None:
    """Make ``strategy=name`` use ``executor_class``, a concrete subclass of Executor.

    A package can do the same without being imported, by an entry point of the group
    ``qpool.strategies``.

    Raises:
        ConfigurationError: it is no such class, lacks a method, or one takes other arguments.
    """
    if not (isinstance(executor_class, type) and issubclass(executor_class, Executor)):
        raise ConfigurationError(
            f"a strategy is a subclass of qpool.executors.Executor; came {executor_class!r}"
        )
    missing = sorted(getattr(executor_class, "__abstractmethods__", ()))
    if missing:
        raise ConfigurationError(
            f"{executor_class.__name__} cannot be a strategy: it lacks {', '.join(missing)}"
        )
    for method, wanted in (
        (executor_class.__init__, "(model, options)"),
        (executor_class.call, "(method, args, kwargs)"),
        (executor_class.per_sample_gradients, "(z, cotangent)"),
    ):
        try:
            inspect.signature(method).bind(None, *wanted.split(","))
        except TypeError as error:
            raise ConfigurationError(
                f"{executor_class.__name__} cannot be a strategy: its {method.__name__} must take "
                f"{wanted} ({error})"
            ) from None
    _STRATEGIES[name] = executor_class


def executor_class(name: str) -> type[Executor]:
    """The class behind a strategy's name; ConfigurationError names the nearest known one."""
    try:
        if name not in _STRATEGIES:
            for point in metadata.entry_points(group="qpool.strategies"):
                if point.name == name:
                    register_strategy(name, point.load())
        found = _STRATEGIES[name]
    except (KeyError, TypeError):
        raise ConfigurationError(
            f"unknown strategy {name!r}: {nearest(str(name), strategies())}"
        ) from None
    if isinstance(found, str):
        module, attribute = found.split(":")
        found = getattr(importlib.import_module(module), attribute)
        _STRATEGIES[name] = found
    return found  # type: ignore[return-value]
