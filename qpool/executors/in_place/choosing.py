"""What a call in place is compiled to: the best form that gives what the eager call gave.

Owns whether it may be compiled at all: it must do no more than compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from qpool.executors.in_place.compiled_calls import CompiledCall
from qpool.executors.in_place.effects import returning
from workers.compiling import compiled, streams
from workers.compiling.streams import Stream
from workers.engine import circuit
from workers.errors import ModelError
from workers.replica import probe
from workers.replica.kept import Kept
from workers.replica.method import Method
from workers.tensors import leaves

#: Operations that do more than compute, or whose checks XLA drops. Reads of variables, and draws
#: from a seed that is an argument, are none of them.
_EFFECTS = re.compile(
    r"Assign|Resource(?!Gather)|Random|Multinomial|(Parameterized)?TruncatedNormal"
    r"|Stateful(?!PartitionedCall)|(Eager)?PyFunc|Assert|CheckNumerics|Print"
)

#: Those of them that are draws, which a stream may take over.
_DRAWS = re.compile(r"Random(StandardNormal|Uniform|UniformInt)$|TruncatedNormal$")


def choose(
    compiled_call: CompiledCall,
    model: Any,
    inputs: list[tf.Tensor],
    result: Any,
    reason: str,
    levels: Sequence[str] = compiled.LEVELS[:-1],
    kept: Sequence[Kept] = (),
    updated: Sequence[tuple[tf.Variable, Any]] = (),
) -> compiled.Choice:
    """Compile, unless for a ``reason``, to what gives the ``result`` of the eager call.

    If that ran as many circuits as it had rows, it is vectorised over them, if it can be. ``kept``:
    where it has left tensors, which what is compiled leaves too; or, where that cannot be, says
    that it does not. ``updated``: variables to which it gave these values, and which have those of
    before now; what is compiled updates them, and no row stands for all.
    """
    may = [each for each in kept if each.may_be_left]
    rest = [each for each in kept if not each.may_be_left]
    find = functools.partial(_chosen, compiled_call, model, inputs, result, reason, levels)
    choice = find(may, rest, updated)
    if choice.level != "eager" or not may or reason:
        return choice
    anew = [each.replaced() for each in may]
    ways: list[tuple[Sequence[Kept], Sequence[Kept]]] = [((), kept)]
    if any(each.is_listed for each in may):
        ways.insert(0, (anew, rest))
    for left, not_left in ways:
        other = find(left, not_left, updated)
        if other.level != "eager":
            return other
    return choice


def _chosen(
    compiled_call: CompiledCall,
    model: Any,
    inputs: list[tf.Tensor],
    result: Any,
    reason: str,
    levels: Sequence[str],
    kept: Sequence[Kept],
    lost: Sequence[Kept],
    updated: Sequence[tf.Variable],
) -> compiled.Choice:
    circuits = compiled_call.ran.runs
    rows = int(inputs[0].shape[0]) if any(compiled_call.sharded) and inputs[0].shape.rank else 0
    compiled_call.rows = rows
    looped = not updated and rows > 1 and probe.loops((rows, circuits), (rows, circuits))
    _have_returned(
        compiled_call,
        model,
        () if reason else kept,
        () if reason else lost,
        () if reason else [variable for variable, _ in updated],
    )
    if compiled_call.kept:
        result = result, [each.tensors() for each in kept]
    if compiled_call.updates:
        result = result, [tf.convert_to_tensor(value) for _, value in updated]
    outputs = leaves(result)
    if not reason and not (outputs and all(map(tf.is_tensor, outputs))):
        reason = "it returns NumPy arrays"
    if reason:
        return compiled.Choice("eager", reason, 0.0)
    if looped and (wider := _wider(compiled_call, inputs, outputs)) is not None:
        compiled_call.wider, compiled_call.method = wider, wider.method
        assert wider.choice is not None
        return dataclasses.replace(wider.choice, seconds=0.0)
    effects: set[str] = set()
    find = functools.partial(_choose, compiled_call, inputs, outputs, looped, levels, effects)
    choice = compiled.Choice("eager", "the model draws random numbers", 0.0)
    if not compiled_call.drew or compiled_call.method.stream is not None:
        choice = find()
        if choice.level != "eager" or not _only_draws(effects):
            return choice
    original = compiled_call.method
    compiled_call.method = dataclasses.replace(original, stream=Stream(), seen={})
    found = find()
    if found.level == "eager":
        compiled_call.method = original
        return found if compiled_call.drew else choice
    return found


def _have_returned(
    compiled_call: CompiledCall,
    model: Any,
    kept: Sequence[Kept],
    lost: Sequence[Kept],
    updated: Sequence[tf.Variable],
) -> None:
    """Have what will be compiled return what it leaves in these places, and variables' values, with
    its result."""
    method = compiled_call.method.plan.method
    call = returning(compiled_call.method.call, model, method, kept, lost, updated)
    compiled_call.kept, compiled_call.lost, compiled_call.updates = kept, lost, updated
    compiled_call.method = dataclasses.replace(compiled_call.method, call=call, seen={})


def _choose(
    compiled_call: CompiledCall,
    inputs: list[tf.Tensor],
    outputs: list[Any],
    looped: bool,
    levels: Sequence[str],
    effects: set[str],
) -> compiled.Choice:
    """``effects`` takes what it was found to do more than compute."""
    original = compiled_call.method
    stream, rows = original.stream, compiled_call.rows or 0
    circuits = compiled_call.ran.runs
    choice: compiled.Choice | None = None
    for form in probe.forms(original.plan, outputs, looped=looped, circuits=circuits):
        if form.by_rows:
            form = dataclasses.replace(form, by_rows=compiled_call.sharded)
        trial = dataclasses.replace(original, plan=dataclasses.replace(original.plan, form=form))

        def use(function: Any, level: str, trial: Method = trial) -> None:
            plan = dataclasses.replace(trial.plan, level=level)
            compiled_call.method = dataclasses.replace(trial, plan=plan)
            compiled_call.method.__dict__["compiled"] = function

        alike = streams.constant if stream and form.by_rows else contextlib.nullcontext
        if stream is not None:
            stream.seed(0)
            with circuit.untraced(), alike():
                outputs = leaves(trial(*inputs))
                if form.by_rows and not _draws_row_by_row(trial, inputs, rows):
                    continue
        found = compiled.choose(
            _computing(trial, effects),
            inputs,
            outputs,
            use,
            before=lambda: stream.seed(0) if stream is not None else None,
            draws=stream is not None or compiled_call.seeded,
            failed=bool(compiled_call.ran.failures),
            alike=alike,
            levels=levels,
        )
        instead = probe.instead_of_rows(form) if looped and found.level != "eager" else ""
        choice = found.after(choice, instead) if choice and instead else found
        if choice.level != "eager" or (stream is None and _only_draws(effects)):
            break
    assert choice is not None
    return choice


def _wider(
    compiled_call: CompiledCall, inputs: Sequence[tf.Tensor], outputs: list[Any]
) -> CompiledCall | None:
    """The one of those that are alike, with up to four times the rows, that gives these outputs, so
    that none is compiled for the last rows of an epoch, or for each length of an episode."""
    rows = compiled_call.rows or 0
    fit = [
        other
        for other in compiled_call.alike
        if rows < (other.rows or 0) <= 4 * rows and other.wider is None and other.compiles
        if any(other.method.plan.form.by_rows) and other.method.stream is None
        if [kept.name for kept in other.kept] == [kept.name for kept in compiled_call.kept]
    ]
    for other in sorted(fit, key=lambda other: other.rows or 0):
        compiled_call.wider = other
        with record.stop_recording():
            found = leaves(compiled_call.widened(inputs, other.method.compiled))
        if not compiled.first_difference(found, outputs):
            return other
    compiled_call.wider = None
    return None


def _draws_row_by_row(method: Method, inputs: list[tf.Tensor], rows: int) -> bool:
    """Whether a call that has just been made with so many rows drew as many times what it draws for
    one. What it draws once, for all rows, must not become a draw for each."""
    stream, over = method.stream, method.plan.form.by_rows
    assert stream is not None
    drawn = stream.numbers
    stream.seed(0)
    method(*(x[:1] if flag else x for x, flag in zip(inputs, over, strict=True)))
    return drawn == rows * stream.numbers


def _only_draws(effects: set[str]) -> bool:
    return bool(effects) and all(map(_DRAWS.match, effects))


def _computing(method: Method, noticed: set[str]) -> Callable[..., Any]:
    """The call, for a tape that is outside of what is compiled; it must do no more than compute.
    What it does is ``noticed``."""

    def call(*inputs: tf.Tensor) -> Any:
        with circuit.checkpointing():
            found = method(*inputs)
        if not tf.executing_eagerly():
            definition = tf.compat.v1.get_default_graph().as_graph_def()
            inner = (node for function in definition.library.function for node in function.node_def)
            effects = {n.op for n in (*definition.node, *inner) if _EFFECTS.match(n.op)}
            noticed.update(effects)
            if effects:
                raise ModelError(f"it does more than compute: {', '.join(sorted(effects))}")
        return found

    return call
