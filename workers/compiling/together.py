"""A call that runs circuits one by one, none of which waits for another, as one circuit of a batch.

    for x, y in zip(data, labels): loss += (engine.run(program, args={"x": x}).state... - y) ** 2

A cost over data, or a batch whose rows share a mean, has no row that stands for all (see ``rows``),
and written out each of its circuits is traced and compiled anew. Here the call is traced more than
once, which is cheap without circuits. First a tensor stands for each state; the parameters that the
circuits would have had are there then, and circuits of one kind are run as one for all of them.
Traced again, the call is given these states, and what waited for one of them is next. What the last
trace returns is the call's; of the others only the parameters are used.

Parameters that are the same for all circuits stay without a batch: they are told by how they are
made (see ``_Origins``), since each circuit of a loop reads its weights anew.

Owns that rewriting. Whether the result is the call's own is for others to check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from workers.engine import circuit
from workers.engine.plan import Circuit
from workers.errors import NotForXLAError, UntraceableError
from workers.tensors import within_xla

#: How often a call is traced: circuits that wait for each other in a longer row are run as they
#: come, each for itself.
_TRACES = 6

#: Circuits of a call that XLA compiles: what is done with each state stays written out. One mode, 3
#: layers, a quadrature of each, 2 cores of a Xeon: of 60 circuits the first two steps take 13.4 s
#: with XLA and 8.3 as a graph, the others 5.3 and 6.8 ms; of 150 32 and 19 s, 14 and 15 ms.
_FOR_XLA = 48

#: Operations that give the same whenever they are run within a call, though they are stateful.
_READS = frozenset(("ReadVariableOp", "VarHandleOp"))


@dataclasses.dataclass(frozen=True)
class _Run:
    """A circuit that a call would run: ``given`` its parameters, then its state if it has one."""

    circuit: Circuit
    given: Sequence[tf.Tensor]

    @property
    def flags(self) -> list[bool]:
        """Of what it is given, what has a batch."""
        what = self.circuit
        return [*what.batched, *([what.batched_state] if what.prepared else [])]

    @property
    def batch(self) -> int:
        """The size of that batch, 0 if there is none."""
        sizes = [x.shape[0] for x, flag in zip(self.given, self.flags, strict=True) if flag]
        if None in sizes:
            raise UntraceableError("the batch of one of its circuits is of no known size")
        return max(sizes, default=0)

    @property
    def shape(self) -> list[int]:
        """The shape of its state."""
        batch = [self.batch] if any(self.flags) else []
        return [*batch, *[self.circuit.cutoff] * self.circuit.axes]


def together(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of tensors that gives what ``call`` gives. For graphs."""

    def at_once(*inputs: Any) -> Any:
        states: dict[int, tf.Tensor] = {}
        alone = 0
        for _ in range(_TRACES):
            outputs, runs, found = _traced(call, inputs, states, _standing_for)
            waiting = [n for n in range(len(runs)) if n not in states]
            if not waiting:
                return outputs
            groups = _ready(runs, waiting, {found[n].op.name for n in waiting})
            states |= {n: state for group in groups for n, state in group.items()}
            alone += all(len(group) == 1 for group in groups)
            if alone > 1:
                break
        return _traced(call, inputs, states, lambda run: _run_one(run.circuit, run.given))[0]

    return at_once


def _traced(
    call: Callable[..., Any],
    inputs: Sequence[Any],
    states: dict[int, tf.Tensor],
    otherwise: Callable[[_Run], tf.Tensor],
) -> tuple[Any, list[_Run], list[tf.Tensor]]:
    """The call's outputs, its circuits, and the states that it was given for them: those that are
    known, by the circuits' places, or what ``otherwise`` makes."""
    graph = tf.compat.v1.get_default_graph()
    runs: list[_Run] = []
    given: list[tf.Tensor] = []

    def compute(
        what: Circuit, parameters: Sequence[tf.Tensor], state: tf.Tensor | None
    ) -> tf.Tensor:
        run = _Run(what, (*parameters, *([] if state is None else [state])))
        with circuit.computed_by(None):
            if tf.compat.v1.get_default_graph() is not graph:  # a branch's, or TensorFlow's loop's
                return _run_one(what, run.given)
            found = states[len(runs)] if len(runs) in states else otherwise(run)
        if within_xla() and len(runs) >= _FOR_XLA:
            raise NotForXLAError("what it does with so many states would take XLA long to compile")
        if found.shape != run.shape or found.dtype != what.dtype:
            raise UntraceableError("its circuits are others when it is traced again")
        runs.append(run)
        given.append(found)
        return found

    with circuit.computed_by(compute):
        outputs = call(*inputs)
    if any(n >= len(runs) for n in states):
        raise UntraceableError("its circuits are others when it is traced again")
    return outputs, runs, given


def _standing_for(run: _Run) -> tf.Tensor:
    """A tensor in the place of a state, which depends on what the state would."""
    found: tf.Tensor = tf.identity_n([*run.given, tf.zeros(run.shape, run.circuit.dtype)])[-1]
    return found


def _ready(
    runs: Sequence[_Run], waiting: Sequence[int], standing: set[str]
) -> list[dict[int, tf.Tensor]]:
    """States of those of the ``waiting`` circuits that wait for no other one, by their places;
    those that are run as one in one dict. ``standing``: operations in the place of circuits."""
    origins = _Origins(standing)
    groups: dict[Any, list[int]] = {}
    for n in waiting:
        if not origins.wait(runs[n].given):
            groups.setdefault((runs[n].circuit, runs[n].batch), []).append(n)
    return [
        dict(zip(places, _run_all([runs[n] for n in places], origins), strict=True))
        for places in groups.values()
    ]


def _run_all(runs: Sequence[_Run], origins: _Origins) -> list[tf.Tensor]:
    """The states of circuits of one kind, all of them run as one."""
    what, batch, count = runs[0].circuit, runs[0].batch, len(runs)
    each = [list(values) for values in zip(*(run.given for run in runs), strict=True)]
    same = [origins.are_one(values) for values in each]
    if all(same):
        return [_run_one(what, runs[0].given)] * count
    values, flags = [], []
    for own, one, flag in zip(each, same, runs[0].flags, strict=True):
        if one and not flag:
            values.append(own[0])
        elif not batch:
            values.append(tf.stack(own))
        else:
            rows = own if flag else [tf.repeat(x[None], batch, axis=0) for x in own]
            values.append(tf.concat(rows, axis=0))
        flags.append(flag or not one)
    parameters = len(what.batched)
    whole = dataclasses.replace(
        what, batched=tuple(flags[:parameters]), batched_state=any(flags[parameters:])
    )
    found = _run_one(whole, values)
    return tf.split(found, count) if batch else tf.unstack(found, num=count)


def _run_one(what: Circuit, given: Sequence[tf.Tensor]) -> tf.Tensor:
    count = len(what.batched)
    return circuit.run(what, given[:count], given[count] if what.prepared else None)


class _Origins:
    """How tensors of a graph are made: which of them are one, and which wait for circuits.

    ``waiting``: names of the operations that stand for circuits.
    """

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting
        self._numbers: dict[Any, int] = {}
        self._known: dict[str, tuple[int, bool]] = {}

    def are_one(self, tensors: Sequence[tf.Tensor]) -> bool:
        """Whether all are made alike, from the same tensors."""
        first, *others = ((self._of(x.op)[0], x.value_index) for x in tensors)
        return all(other == first for other in others)

    def wait(self, tensors: Sequence[tf.Tensor]) -> bool:
        return any(self._of(x.op)[1] for x in tensors)

    def _of(self, op: tf.Operation) -> tuple[int, bool]:
        """Its number, which operations that give the same share, and whether it waits; without
        recursion, for graphs are deep."""
        stack = [op]
        while stack:
            top = stack[-1]
            if top.name not in self._known:
                ahead = [x.op for x in top.inputs if x.op.name not in self._known]
                if ahead:
                    stack += ahead
                    continue
                self._known[top.name] = self._number(top)
            stack.pop()
        return self._known[op.name]

    def _number(self, op: tf.Operation) -> tuple[int, bool]:
        found = [(*self._known[x.op.name], x.value_index) for x in op.inputs]
        waits = op.name in self._waiting or any(wait for _, wait, _ in found)
        if op.type == "Placeholder" or (op.op_def.is_stateful and op.type not in _READS):
            key: Any = op.name
        else:
            node = op.node_def
            attributes = sorted((name, node.attr[name].SerializeToString()) for name in node.attr)
            key = op.type, tuple(attributes), tuple((number, n) for number, _, n in found)
        return self._numbers.setdefault(key, len(self._numbers)), waits
