"""What is asked of a model's first rows: what comes out, what it costs, what depends on what.

Owns the questions, each a function; the replica asks them in its probe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from workers.engine import circuit
from workers.errors import BatchAxisError, InputError, StatefulCallError
from workers.exchange.protocol import Form, Plan
from workers.layout import ArraySpec
from workers.tensors import leaves, mapped

#: How far, relative to the largest output and absolutely, a row may move. When other rows join it,
#: it is computed in another order: far above rounding in single precision, a mean of a symmetric
#: state being 0 but for that. When as many others are in their places, its bits should be the same.
MEANS = 1e-2, 1e-5
BITS = 1e-5, 1e-6


def losses(model: Any) -> int:
    """How many losses a Keras layer holds: those of its weights, and those its last call added."""
    import keras

    return len(model.losses) if isinstance(model, keras.Layer) else 0


@contextlib.contextmanager
def no_new_variables() -> Iterator[None]:
    """Refuse a call that makes variables and keeps them: every replica would have its own."""
    made: list[weakref.ref] = []

    def creator(next_creator: Callable[..., Any], **kwargs: Any) -> Any:
        variable = next_creator(**kwargs)
        made.append(weakref.ref(variable))
        return variable

    with tf.variable_creator_scope(creator):
        yield
    kept = [variable.name for ref in made if (variable := ref()) is not None]
    if kept:
        raise StatefulCallError(
            f"the first call made variables {kept}, which the coordinator's model does not have; "
            "call the model once on a batch before qpool.parallelize"
        )


def check_rows_are_alike(few: Sequence[Any], many: Sequence[Any], rows: int, more: int) -> None:
    """Refuse a model whose outputs are of another kind where there are other counts of rows."""
    of_few, of_many = [row_spec(x) for x in few], [row_spec(x) for x in many]
    if of_few != of_many:
        raise InputError(
            "the outputs' shapes or dtypes depend on the number of rows: expected the same for "
            f"{rows} and {more} rows, came {of_few} and {of_many}"
        )


def check_rows_are_alone(
    those: Sequence[Any], these: Sequence[Any], rows: int, when: str, near: tuple[float, float]
) -> None:
    """Refuse a model whose samples depend on each other: a tile would not be what it is. The first
    rows of two calls are compared, beside other ones; ``near``: see ``BITS``."""
    relative, absolute = near
    for a, b in zip(those, these, strict=True):
        alone, together = np.asarray(a)[:rows], np.asarray(b)[:rows]
        if alone.dtype.kind not in "fc":
            continue
        finite = np.isfinite(alone) & np.isfinite(together)
        if not finite.any():
            continue
        apart = np.abs(alone - together)[finite].max()
        if apart > relative * np.abs(alone[finite]).max() + absolute:
            raise InputError(
                f"a sample's output depends on the other samples of its batch (it changed by "
                f"{apart:.2g} when {when}): expected one row of output for one row of "
                "input. Batch statistics belong in the caller, or in strategy='cpu_batch', which "
                "computes whole batches"
            )


def flatten(outputs: Any, rows: int) -> tuple[Any, list[Any]]:
    """The nest with a number in each leaf's place, and the leaves, each with ``rows`` rows. What is
    None stays None."""
    found = leaves(outputs)
    for leaf in found or [None]:
        shape = np.shape(leaf)
        if not isinstance(leaf, tf.Tensor | np.ndarray) or shape[:1] != (rows,):
            raise BatchAxisError(
                "every output of a pooled method needs a leading batch axis: expected "
                f"{rows} rows, came {type(leaf).__name__} of shape {shape}. Keep per-sample "
                "values in the pooled method and reduce them in the caller"
            )
    numbers = itertools.count()
    return mapped(lambda _: next(numbers), outputs), found


def row_spec(output: Any) -> ArraySpec:
    value = np.asarray(output)
    return ArraySpec(value.shape[1:], value.dtype.str)


def bits(outputs: Sequence[Any]) -> list[bytes]:
    return [np.asarray(output).tobytes() for output in outputs]


def interpreter_calls(function: Callable[[], Any]) -> tuple[int, Any]:
    """Call ``function`` and count the Python and C functions that it enters.

    Unlike seconds, the count is the same on every machine and in every run, so a choice made
    from it (the tile size) is too. Eager Strawberry Fields spends its time under the
    interpreter, which makes the count a fair measure of cost. Call it once before, so that what
    a first call alone does is not counted; the collector waits, for it comes when it likes, and no
    circuit is traced.
    """
    count = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    former: Any = sys.getprofile()
    collecting = gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        with circuit.untraced(first=math.inf):
            result = function()
    finally:
        sys.setprofile(None)
        if hasattr(former, "enable"):  # cProfile's, which is not a function
            former.enable()
        else:
            sys.setprofile(former)
        if collecting:
            gc.enable()
    return count, result


def least_rows(run: Callable[[int], Any]) -> int:
    """How few rows the model can be called with: one, or else two."""
    try:
        flatten(run(1), 1)
    except Exception:  # whatever it is: two rows work, as the probe has seen
        return 2
    return 1


def why_eager(outputs: Sequence[Any], *, traced: bool, seedable: bool) -> str:
    """Why compiling is not even tried; empty if it is."""
    if not traced:
        return "engine='stock'"
    if not seedable:
        return (
            "the model draws random numbers from a source that a compiled call cannot have "
            "seeded for each tile (NumPy's, say); tf.random.normal and uniform, a "
            "keras.random.SeedGenerator or a tf.random.Generator can be"
        )
    if not all(map(tf.is_tensor, outputs)):
        return "it returns NumPy arrays"
    return ""


def forms(plan: Plan, outputs: Sequence[Any], *, looped: bool, circuits: int) -> Iterator[Form]:
    """The forms in which the plan may be compiled, the best one first.

    ``looped``: it runs circuits for one row after another. ``circuits``: how many in a call.
    """
    wide = not all(plan.as_tensor) and all(
        np.asarray(x).dtype not in (np.float64, np.complex128) for x in outputs
    )
    found = [Form(by_rows=(True,) * len(plan.as_tensor))] * looped
    found += [Form(together=True)] * (circuits > 1) + [Form()]
    for form in found:
        for narrowed in [False] + [True] * wide:
            yield dataclasses.replace(form, narrowed=narrowed)


def instead_of_rows(form: Form) -> str:
    """What becomes of a loop over rows in this form; empty where it is vectorised."""
    if form.by_rows:
        return ""
    return "its rows are not vectorised" if form.together else "its loop is unrolled"


def loops(few: tuple[int, int], many: tuple[int, int]) -> bool:
    """Whether a call runs circuits for one row after another: of two calls, (rows, circuits)."""
    each = [divmod(runs, rows) for rows, runs in (few, many)]
    if few[0] == many[0]:  # one count of rows is all that can be asked for
        return few[0] > 1 and each[0][0] > 0 and each[0][1] == 0
    return each[0] == each[1] and each[0][0] > 0 and each[0][1] == 0
