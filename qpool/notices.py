"""What is said to a person: that a method stays slow and what to write instead; a summary.

Owns the wording. Knows nothing of how it was found out.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from workers.errors import AttributeNotSetWarning, CircuitFailedWarning, NotCompiledWarning


class Compiled(Protocol):
    """What a method was compiled to, and why not to better."""

    @property
    def level(self) -> str: ...
    @property
    def reason(self) -> str: ...


#: What stopped a trace, and what to write instead; the first that is found in the reason.
_ADVICE = (
    (
        r"returns NumPy",
        "return tensors, and call .numpy() on what comes back",
    ),
    (
        r"numpy|__array__|EagerTensor|float\(\)|astype|item",
        "compute with TensorFlow throughout: no .numpy(), float(...) or np. functions on tensors",
    ),
    (
        r"as a Python `?bool|__bool__|not allowed in Graph",
        "decide by tf.where, or by what does not depend on the inputs' values",
    ),
    (
        r"custom_gradient decorator",
        "have an engine run a program (sf.Engine, sf.Program): what is asked of a backend itself, "
        "Strawberry Fields computes as it always does",
    ),
    (
        r"has left in self\.",
        "keep it in a tf.Variable(..., trainable=False) that the call assigns to, or return it",
    ),
    (r"earlier call|engine\.reset", "call engine.reset() before each engine.run(...)"),
    (
        r"Measure",
        "post-select the outcome (select=...), or read the state's expectation values instead",
    ),
    (
        r"random numbers|seeded",
        "draw outside of the call, or from a keras.random.SeedGenerator or tf.random.Generator "
        "that the model holds",
    ),
    (
        r"does more than compute: Assign",
        "let what the call makes and fills be a tensor (tf.zeros, tf.tensor_scatter_nd_update) and "
        "not a tf.Variable, and assign to variables in the caller",
    ),
    (r"is a list of numbers", "hand over an array or a tensor"),
    (
        r"changes its variable|adds losses",
        "return what is to be kept, and assign it, or add it, in the caller",
    ),
)


def advice(reason: str) -> str:
    """What to write instead; empty if nothing is known."""
    return next((text for pattern, text in _ADVICE if re.search(pattern, reason)), "")


def not_compiled(model: Any, method: str, choice: Compiled, circuits: int, options: Any) -> None:
    """Warn of one that computes circuits and is not compiled."""
    asked_for = options is not None and options.engine == "stock"
    if choice.level != "eager" or not circuits or asked_for:
        return
    instead = advice(choice.reason)
    _warn(
        f"{_called(model, method)} is not compiled, and computes circuits as slowly as before. "
        f"What stopped it: {choice.reason or 'not known'}."
        + (f" Instead: {instead}." if instead else ""),
        NotCompiledWarning,
        method,
        options,
    )


def restless(model: Any, names: Sequence[str], options: Any) -> None:
    """Warn of what is compiled as a constant, and is another one again and again."""
    _warn(
        f"{name_of(model)} looks at {', '.join(names)} in its call, which changes between calls "
        "again and again: it is computed as it is from now on, as slowly as before. Instead: make "
        "it a tf.Variable(..., trainable=False), or an argument that is a tf.Variable",
        NotCompiledWarning,
        "",
        options,
    )


def caught(model: Any, method: str, failure: str, options: Any) -> None:
    """Warn of one that catches what its circuits raise."""
    if not failure:
        return
    _warn(
        f"a circuit of {_called(model, method)} failed, and the model caught that: what it gave "
        f"does not come of the circuit. What Strawberry Fields said: {failure}. Let it be raised "
        "(no try around engine.run), and mend that",
        CircuitFailedWarning,
        method,
        options,
    )


def not_set(model: Any, method: str, attributes: Sequence[str], options: Any) -> None:
    """Warn of attributes that a call sets, and not where it is called."""
    if not attributes:
        return
    _warn(
        f"{_called(model, method)} sets {', '.join(attributes)} in its call. "
        "Computed by workers it leaves them as they were; in place they cannot be read after a "
        "compiled call. Instead: return what is to be read afterwards",
        AttributeNotSetWarning,
        method,
        options,
    )


def _warn(text: str, category: type[Warning], method: str, options: Any) -> None:
    """Once for each category, model and method."""
    warned = options.warned if options is not None else set()
    if (category, method) not in warned:
        warned.add((category, method))
        warnings.warn(text, category, stacklevel=_stacklevel())


def name_of(model: Any) -> str:
    """A function's own, or that of the model's class."""
    return getattr(model, "__name__", None) or type(model).__name__


def _called(model: Any, method: str) -> str:
    name = name_of(model)
    return name if method == "__call__" else f"{name}.{method}"


def _stacklevel() -> int:
    """How many frames up from the caller the first one is that is neither ours nor a library's."""
    ours = os.path.dirname(os.path.abspath(__file__))
    workers = os.path.join(os.path.dirname(ours), "workers")
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if not (file.startswith((ours, workers, "<")) or "site-packages" in file):
            return level
        frame, level = frame.f_back, level + 1
    return 2


def summary(
    name: str,
    stats: dict[str, Any],
    unpooled: Sequence[dict[str, Any]],
    left_alone: Iterable[str],
) -> str:
    """A few lines on a pooled model: how it is computed, and which method at which level.

    Args:
        name: of the model's class.
        stats: its executor's.
        unpooled: as ``stats["compiled"]``, of methods that were called without being pooled.
        left_alone: engines of other backends, as text.
    """
    pool = stats.get("pool", {})
    count = pool.get("workers") if isinstance(pool, dict) else None
    count = len(count) if isinstance(count, list | dict) else count
    parts = [stats.get("strategy", "not called yet")]
    if count is not None:
        parts.append(f"{count} workers")
    elif isinstance(pool, dict) and pool.get("threads"):
        parts.append(f"{pool['threads']} threads")
    if stats.get("tiles_by_batch"):
        tiles = sorted(set(stats["tiles_by_batch"].values()))
        parts.append(f"tiles of {', '.join(map(str, tiles))} rows")
    if stats.get("samples_per_second"):
        parts.append(f"{stats['samples_per_second']:,.0f} samples/s")
    lines = [f"{name}, pooled: {', '.join(parts)}"]
    for found, note in ((stats.get("compiled", ()), ""), (unpooled, " (not pooled)")):
        for way in found:
            lines.append(f"  {way['method']}{note}: {_level(way)}")
    lines += [f"  left as it is: {engine}" for engine in left_alone]
    return "\n".join(lines)


def _level(way: dict[str, Any]) -> str:
    if way["level"] == "eager":
        reason = way["why_not_better"]
        instead = advice(reason)
        return f"not compiled: {reason}" + (f". Instead: {instead}" if instead else "")
    level = {"xla": "compiled by XLA", "graph": "a graph"}[way["level"]]
    if "loop is unrolled" in way["why_not_better"]:
        return f"{level}; {way['why_not_better']}"
    if way.get("together"):
        return f"{level}, circuits that do not wait for each other as one"
    return level + (", its loop over rows traced once" if way.get("by_rows") else "")
