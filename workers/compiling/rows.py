"""A call that runs circuits for one row after another, as one call for all rows.

    for row in z: state = engine.run(program, args={"x": row[0]}).state; ...

A loop over the batch makes as many circuits as there are rows, each too small to fill a core. Here
the call is traced for one row, and that graph is vectorised by TensorFlow (as in
``tf.vectorized_map``); of a circuit in it only the parameters are taken, and the circuit itself is
run once, for the parameters of all rows, as a call that was written for batches would have it. A
draw of a row's (see ``streams``) is one draw for all rows.

Where a row's own numbers decide what is computed there is no one graph of all rows: see ``turns``.

Owns that rewriting. Whether the result is the call's own is for others to check.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.parallel_for.pfor import PFor, wrap

from workers import names
from workers.compiling import branches, dependence, streams
from workers.compiling.turns import in_turn
from workers.context import during
from workers.engine import circuit, plan, symbols
from workers.errors import NotForXLAError, UntraceableError
from workers.tensors import leaves, mapped, within_xla

#: What TensorFlow makes of a ``tf.cond``, a ``tf.while_loop``.
_BRANCHES = frozenset(("If", "StatelessIf", "Case", "StatelessCase", "While", "StatelessWhile"))

#: Rows for which the call's own graph is looked at: as many as it has, up to this.
_LOOKED_AT = 5

#: Whether a call is traced for one row, which stands for all; or to be looked at, for a few.
_one: ContextVar[bool] = ContextVar("one", default=False)
_few: ContextVar[list[Any] | None] = ContextVar("few", default=None)

#: What has been seen of a call's graph, by the shapes and dtypes of what it was given.
Seen = MutableMapping[Any, tuple[Any, bool]]


def by_rows(call: Callable[..., Any], over: tuple[bool, ...], seen: Seen) -> Callable[..., Any]:
    """The call of tensors that gives what ``call`` gives, called with one row at a time.

    ``over`` says which of its arguments are (rows, ...); it is called with all of the others. For
    graphs. A call that cannot be vectorised is an error of whatever kind. What is ``seen`` of it is
    not looked at again where its gradient, or a second derivative, is traced.
    """

    def all_rows(*inputs: tf.Tensor) -> Any:
        rows = next(x.shape[0] for x, flag in zip(inputs, over, strict=True) if flag)
        given = over, *((*x.shape, x.dtype.name) for x in inputs)
        if given not in seen:
            with names.apart("rows"):
                seen[given] = _check_alone(call, inputs, over, rows)
        outputs, branching = seen[given]
        if branching:
            return in_turn(call, inputs, over, rows, outputs)
        if rows == 1:
            with during(_one, True):
                return call(*inputs)
        graph = tf.compat.v1.get_default_graph()
        known = len(graph.get_operations())
        index = tf.compat.v1.placeholder_with_default(0, [])
        row = [
            tf.gather(x, index)[None] if flag else x for x, flag in zip(inputs, over, strict=True)
        ]
        token = tf.reshape(row[over.index(True)], [-1])[:1]
        with (
            during(_one, True),
            circuit.computed_by(functools.partial(_placeholder, token)),
            streams.of_rows(functools.partial(_draw, token)),
        ):
            found = mapped(lambda x: x[0], call(*row))
        made = graph.get_operations()[known:]
        if within_xla() and any(op.type in _BRANCHES for op in made):
            raise NotForXLAError(
                "a loop over rows is not vectorised for XLA where a tf.cond or a tf.while_loop is "
                "in it: its gradient would take shapes from its values"
            )
        # Not tf.vectorized_map: for XLA that makes a function of the whole, whose backward pass
        # takes shapes from its forward pass, so that XLA compiles anew for each value.
        converter = PFor(index, rows, set(made), fallback_to_while_loop=False)
        return mapped(converter.convert, found)

    return all_rows


def of_one() -> bool:
    """Whether a call is traced for one row, of what it leaves in attributes too: that is to have a
    leading axis, of one, as what it returns has."""
    return _one.get()


def looked_at() -> list[Any] | None:
    """Where a call is looked at, what takes what it leaves in attributes: names, tensors, and how
    many of these the whole call leaves."""
    return _few.get()


def _check_alone(
    call: Callable[..., Any], inputs: Sequence[tf.Tensor], over: tuple[bool, ...], rows: int
) -> tuple[Any, bool]:
    """UntraceableError unless, in the graph of the call itself, circuits left out, no row of the
    outputs depends on another row of the inputs, nor does a condition that Python asks for in a
    row's turn. Specs of the outputs of a row, and whether there are such conditions."""
    found, conditions = _looked_at(call, inputs, over, rows, holds=True)
    if conditions:
        _looked_at(call, inputs, over, rows, holds=False)
    return mapped(lambda x: tf.TensorSpec(x.shape[1:], x.dtype), found), bool(conditions)


def _looked_at(
    call: Callable[..., Any],
    inputs: Sequence[tf.Tensor],
    over: tuple[bool, ...],
    rows: int,
    *,
    holds: bool,
) -> tuple[Any, list[tf.Tensor]]:
    """The outputs, and the conditions that are asked for, if each of them ``holds``, or none."""
    few = min(rows, _LOOKED_AT)
    conditions: list[tf.Tensor] = []

    def decide(condition: tf.Tensor) -> bool:
        conditions.append(condition)
        if len(conditions) > few * branches.DEPTH:
            raise UntraceableError("its Python decides too often by numbers that are not known")
        return holds

    graph = FuncGraph("rows")
    with graph.as_default():
        given = [
            tf.compat.v1.placeholder(x.dtype, [few if flag else x.shape[0], *x.shape[1:]])
            if flag
            else x
            for x, flag in zip(inputs, over, strict=True)
        ]
        with (
            during(_few, []) as kept,
            circuit.computed_by(functools.partial(_placeholder, tf.zeros([1]))),
            streams.of_rows(lambda shape, dtype, _: tf.zeros(shape, dtype)),
            symbols.deciding(decide),
        ):
            found = mapped(tf.convert_to_tensor, call(*given))
        custom = any("_gradient_op_type" in op.node_def.attr for op in graph.get_operations())
        if custom and not conditions:
            raise UntraceableError(  # vectorised, it would have the gradient of its operations
                "a loop over rows is not vectorised where a tf.custom_gradient is in it"
            )
        sharded = [x for x, flag in zip(given, over, strict=True) if flag]
        for name, tensors, count in kept or ():
            if rows > 1 and not _left_by_row(sharded, tensors, count, few, rows):
                raise UntraceableError(f"{name} is of other rows than the last one")
        each, left = divmod(len(conditions), few)
        asked = [tf.stack(conditions[n::each]) for n in range(each)]
        outputs = [*leaves(found), *asked]
        if left or (rows > 1 and not dependence.rows_are_alone(sharded, outputs, few)):
            raise UntraceableError(
                "a row of its outputs may depend on other rows of its inputs (or on arguments that "
                "are not named in sharded=), so that its loop cannot be vectorised"
            )
    return found, conditions


def _left_by_row(
    inputs: Sequence[tf.Tensor], tensors: Sequence[tf.Tensor], count: int, few: int, rows: int
) -> bool:
    """Whether what a call of ``few`` rows leaves in a place, where that of all ``rows`` leaves so
    many tensors, is of the last row, has that of each row in turn, or is one thing more for each.
    """
    behind = dependence.rows_behind(inputs, tensors)
    if len(tensors) == count:
        return all(
            (isinstance(found, list) and _in_turn(found, few)) or _any(found) <= {few - 1}
            for found in behind
        )
    each, rest = divmod(len(tensors), few)
    return not rest and count == rows * each and _in_turn([_any(x) for x in behind], few)


def _in_turn(found: Sequence[Any], few: int) -> bool:
    """Whether these come of a row each, or as many of each, one after the other."""
    each, rest = divmod(len(found), few)
    return not rest and all(rows <= {n // each} for n, rows in enumerate(found))


def _any(found: Any) -> frozenset[int]:
    return frozenset().union(*found) if isinstance(found, list) else found


def _placeholder(
    token: tf.Tensor,
    what: plan.Circuit,
    parameters: Sequence[tf.Tensor],
    state: tf.Tensor | None,
) -> tf.Tensor:
    """A tensor in the place of a row's state. Its operation knows how to be vectorised, and is,
    since it depends on the row: on ``token``, if on nothing else."""
    with_axis = any(what.batched) or what.batched_state
    if any(value.shape.rank and value.shape[0] != 1 for value in parameters):
        raise UntraceableError("a loop over rows runs circuits that have a batch of their own")
    shape = [*([1] if with_axis else []), *[what.cutoff] * what.axes]
    nothing = tf.zeros(shape, what.dtype)
    given = [*parameters, *([] if state is None else [state]), token, nothing]
    found: tf.Tensor = tf.identity_n(given)[-1]
    found.op.pfor_converter = functools.partial(_all_states, what, shape)
    return found


def _draw(
    token: tf.Tensor, shape: list[int], dtype: Any, made: Callable[..., tf.Tensor]
) -> tf.Tensor:
    """A tensor in the place of a row's draw, vectorised to one draw for all rows."""
    found: tf.Tensor = tf.identity_n([token, tf.zeros(shape, dtype)])[-1]
    found.op.pfor_converter = functools.partial(_all_draws, shape, made)
    return found


def _all_draws(shape: list[int], made: Callable[..., tf.Tensor], given: Any) -> list[Any]:
    token, _ = given.inputs
    return [token, wrap(made([token.t.shape[0], *shape]), True)]


def _all_states(what: plan.Circuit, shape: list[int], given: Any) -> list[Any]:
    """Run a circuit for the parameters of all rows, each of them stacked or the same for all."""
    *values, token, _ = given.inputs
    flags = tuple(value.is_stacked for value in values)
    count = len(what.batched)
    axes = [what.cutoff] * what.axes
    parameters = [
        tf.reshape(value.t, [-1] if flag else [])
        for value, flag in zip(values[:count], flags, strict=False)
    ]
    state = None
    if what.prepared:
        state = tf.reshape(values[-1].t, [-1, *axes] if flags[-1] else axes)
    for_all = dataclasses.replace(
        what, batched=flags[:count], batched_state=what.prepared and flags[-1]
    )
    found = circuit.run(for_all, parameters, state)
    stacked = any(flags)
    found = tf.reshape(found, [-1, *shape] if stacked else shape)
    return [*values, token, wrap(found, stacked)]
