"""A model as one process holds it: load weights, compute a tile, pull cotangents back.

Owns the TensorFlow side of a worker: what is called with which rows, what is kept between a
forward and its backward pass, and how random draws are seeded. It reads and writes arrays over
the arena's buffer at places it is told, and knows nothing of processes or messages' order.

Bits: a tile is computed alone, from its own rows, with its own seed. What a replica computed
before, and which replica it is, leaves no trace in the result.
"""

from __future__ import annotations

import gc
import pickle
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from workers import recipes
from workers.errors import GradientError, InputError, StatefulCallError
from workers.layout import ArraySpec, Placed, tile_rows
from workers.protocol import Build, Frame, Plan, Sharded, Survey, Surveyed

#: Forward calls whose tapes are kept for a backward pass that may come. A GAN step keeps at most
#: three at once (generator, critic on real, critic on generated); older ones are recomputed.
KEPT_CALLS = 8

#: Two counts of rows for the survey: together they split a call's cost into its parts. Not one
#: row, which Strawberry Fields computes in another way (without a batch axis).
_SURVEY_ROWS = (2, 6)


@dataclass(frozen=True)
class _Method:
    """A plan, ready to be called with rows."""

    plan: Plan
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, inputs: Sequence[Any]) -> Any:
        args = [inputs[a.index] if isinstance(a, Sharded) else a for a in self.args]
        kwargs = {
            name: inputs[a.index] if isinstance(a, Sharded) else a
            for name, a in self.kwargs.items()
        }
        return self.call(*args, **kwargs)


@dataclass(frozen=True)
class _Kept:
    """A tile's forward pass: outputs on their tape, and the tensors it was computed from."""

    tape: tf.GradientTape
    inputs: list[Any]
    outputs: list[Any]


class Replica:
    """One model in one worker."""

    def __init__(self, build: Build, buffer: memoryview) -> None:
        shipped: recipes.Shipped = pickle.loads(build.shipment)
        self._model = shipped.model
        self._variables = shipped.variables
        self._trainable = [shipped.variables[index] for index in shipped.trainable]
        self._draws = shipped.draws
        self._seed = build.seed
        self._plans: dict[int, _Method] = {}
        self._kept: OrderedDict[int, dict[int, _Kept]] = OrderedDict()
        self.recomputed = 0
        seeds = {id(v) for source in self._draws for v in recipes.state_variables(source)}
        #: Places of variables that a call must leave alone.
        self._fixed = [
            index
            for index, variable in enumerate(self._variables)
            if index not in shipped.trainable and id(variable) not in seeds
        ]
        self._version = 0
        self.place(build.weights, buffer)

    # -- being told ------------------------------------------------------------------------

    def place(self, weights: tuple[Placed, ...], buffer: memoryview) -> None:
        """Learn where the values of the variables lie."""
        expected = [(tuple(v.shape), v.dtype.as_numpy_dtype) for v in self._variables]
        told = [(p.spec.shape, np.dtype(p.spec.dtype).type) for p in weights]
        if expected != told:
            raise InputError(
                "the replica's variables differ from the coordinator's: expected shapes and "
                f"dtypes {told}, came {expected}; a factory must make the same model every time"
            )
        self._places = weights

    def add_plan(self, plan: Plan) -> None:
        args, kwargs = pickle.loads(plan.arguments)
        call = self._model if plan.method == "__call__" else getattr(self._model, plan.method)
        self._plans[plan.plan] = _Method(plan, call, args, kwargs)

    def load(self, version: int, buffer: memoryview) -> None:
        """Take over the weights in the arena, if they are not the ones held already."""
        if version == self._version:
            return
        for variable, placed in zip(self._variables, self._places, strict=True):
            variable.assign(placed.view(buffer))
        self._version = version

    def forget(self, calls: Sequence[int]) -> None:
        """Free what is kept for the backward passes of these calls."""
        for call in calls:
            self._kept.pop(call, None)

    # -- computing -------------------------------------------------------------------------

    def survey(self, request: Survey, frame: Frame, finished: int, buffer: memoryview) -> Surveyed:
        """Run the first rows and learn what comes out, what it costs and what depends on what."""
        started = time.perf_counter()
        method = self._plans[request.plan]
        self.load(request.weights_version, buffer)
        few, many = (method.plan.rows,) * 2 if method.plan.rows else _SURVEY_ROWS

        first = self._run(method, self._first_rows(frame, few, buffer), buffer)
        structure, outputs = _flatten(first, few)
        calls_few, second = _interpreter_calls(
            lambda: self._run(method, self._first_rows(frame, few, buffer), buffer)
        )
        draws = _bits(outputs) != _bits(tf.nest.flatten(second))
        third = self._run(method, self._first_rows(frame, many, buffer), buffer)
        calls_many, _ = _interpreter_calls(
            lambda: self._run(method, self._first_rows(frame, many, buffer), buffer)
        )
        specs = [_row_spec(output) for output in outputs]
        if specs != [_row_spec(output) for output in _flatten(third, many)[1]]:
            raise InputError(
                "the outputs' shapes or dtypes depend on the number of rows: expected the same "
                f"for {few} and {many} rows, came {specs} first"
            )
        reproducible = True
        if draws:
            again = []
            for _ in range(2):
                self._reseed(0, 0)
                rows = self._first_rows(frame, few, buffer)
                again.append(_bits(tf.nest.flatten(self._run(method, rows, buffer))))
            reproducible = again[0] == again[1]
        connected: tuple[bool, ...] = ()
        if request.gradient:
            kept = self._record(method, self._first_rows(frame, few, buffer), buffer)
            connected = tuple(g is not None for g in self._gradients(kept, None))
        per_row = max(calls_many - calls_few, 0) / max(many - few, 1)
        fixed = max(calls_few - per_row * few, 0.0)
        return Surveyed(
            request.ticket,
            finished,
            pickle.dumps(structure),
            tuple(specs),
            tuple(isinstance(output, tf.Tensor) for output in outputs),
            draws,
            reproducible,
            fixed / per_row if per_row else float("inf"),
            connected,
            time.perf_counter() - started,
        )

    def forward(
        self, plan: int, frame: Frame, call: int, index: int, keep: bool, buffer: memoryview
    ) -> None:
        """Compute one tile and write its outputs; with ``keep``, hold on to its tape."""
        method = self._plans[plan]
        start, stop = tile_rows(index, frame.tile, frame.batch)
        rows = method.plan.rows or stop - start
        if method.plan.draws:
            self._reseed(call, index)
        arrays = _take(frame.inputs, start, stop, rows, buffer)
        if keep:
            kept = self._record(method, arrays, buffer)
            outputs = kept.outputs
            self._kept.setdefault(call, {})[index] = kept
            while len(self._kept) > KEPT_CALLS:
                self._kept.popitem(last=False)
        else:
            outputs = tf.nest.flatten(self._run(method, arrays, buffer))
        if len(outputs) != len(frame.outputs):
            raise InputError(
                f"the model returned {len(outputs)} arrays; its first call returned "
                f"{len(frame.outputs)}. A pooled method returns the same structure every time"
            )
        for output, placed in zip(outputs, frame.outputs, strict=True):
            value = np.asarray(output)
            if value.shape != (rows, *placed.spec.shape[1:]) or value.dtype != placed.spec.dtype:
                raise InputError(
                    f"the model returned shape {value.shape}, dtype {value.dtype} for {rows} "
                    f"rows; expected {(rows, *placed.spec.shape[1:])}, {placed.spec.dtype} "
                    "as in its first call"
                )
            placed.view(buffer)[start:stop] = value[: stop - start]

    def backward(self, plan: int, frame: Frame, call: int, index: int, buffer: memoryview) -> None:
        """Pull one tile's cotangents back and write its gradients."""
        method = self._plans[plan]
        start, stop = tile_rows(index, frame.tile, frame.batch)
        rows = method.plan.rows or stop - start
        kept = self._kept.get(call, {}).pop(index, None)
        if kept is None:
            kept = self._recompute(method, frame, call, index, buffer)
        cotangents = [
            None if placed is None else _pad(placed.view(buffer)[start:stop], rows, repeat=False)
            for placed in frame.cotangents
        ]
        gradients = self._gradients(kept, cotangents)
        written = set()
        for source, placed in frame.input_gradients:
            written.add(source)
            view = placed.view(buffer)[start:stop]
            gradient = gradients[source]
            view[...] = 0 if gradient is None else np.asarray(gradient)[: stop - start]
        for source, placed in frame.weight_gradients:
            written.add(source)
            gradient = gradients[source]
            placed.view(buffer)[index] = 0 if gradient is None else np.asarray(gradient)
        lost = [s for s, g in enumerate(gradients) if g is not None and s not in written]
        if lost:
            names = [self._source_name(source, len(kept.inputs)) for source in lost]
            raise GradientError(
                f"the gradient for {', '.join(names)} appeared only now: expected none, as on "
                "the first rows of the first call. Which sources an output depends on must not "
                "depend on the data"
            )

    # -- within ----------------------------------------------------------------------------

    @staticmethod
    def _first_rows(frame: Frame, rows: int, buffer: memoryview) -> list[np.ndarray]:
        return _take(frame.inputs, 0, min(rows, frame.batch), rows, buffer)

    def _run(self, method: _Method, arrays: list[np.ndarray], buffer: memoryview) -> Any:
        outputs = method(_as_the_model_wants(method.plan, arrays))
        self._check_fixed(buffer)
        return outputs

    def _record(self, method: _Method, arrays: list[np.ndarray], buffer: memoryview) -> _Kept:
        inputs = _as_the_model_wants(method.plan, arrays)
        with tf.GradientTape() as tape:
            tape.watch([x for x in inputs if _differentiable(x)])
            tape.watch(self._trainable)
            outputs = tf.nest.flatten(method(inputs))
        self._check_fixed(buffer)
        return _Kept(tape, inputs, outputs)

    def _recompute(
        self,
        method: _Method,
        frame: Frame,
        call: int,
        index: int,
        buffer: memoryview,
    ) -> _Kept:
        if method.plan.draws and not method.plan.reproducible:
            raise GradientError(
                "the forward pass of this result is no longer kept, and it cannot be computed "
                "again: the model draws random numbers from a source that cannot be seeded. Take "
                "gradients before further calls, and once; or draw from TensorFlow, Keras or "
                "NumPy"
            )
        if method.plan.draws:
            self._reseed(call, index)
        self.recomputed += 1
        start, stop = tile_rows(index, frame.tile, frame.batch)
        rows = method.plan.rows or stop - start
        return self._record(method, _take(frame.inputs, start, stop, rows, buffer), buffer)

    def _gradients(self, kept: _Kept, cotangents: list[np.ndarray | None] | None) -> list[Any]:
        """Gradients for each input, then each trainable variable; None where nothing depends."""
        targets, seeds = [], []
        for position, output in enumerate(kept.outputs):
            if not _differentiable(output):
                continue
            if cotangents is None:
                seed = tf.ones_like(output)
            elif (cotangent := cotangents[position]) is not None:
                seed = tf.constant(cotangent)
            else:
                continue
            targets.append(output)
            seeds.append(seed)
        sources = [x for x in kept.inputs if _differentiable(x)]
        if not targets:
            return [None] * (len(kept.inputs) + len(self._trainable))
        found = kept.tape.gradient(targets, [*sources, *self._trainable], output_gradients=seeds)
        dense = iter([None if g is None else tf.convert_to_tensor(g) for g in found])
        of_inputs = [next(dense) if _differentiable(x) else None for x in kept.inputs]
        return [*of_inputs, *dense]

    def _source_name(self, source: int, inputs: int) -> str:
        if source < inputs:
            return f"input {source}"
        return f"variable {self._trainable[source - inputs].name!r}"

    def _check_fixed(self, buffer: memoryview) -> None:
        for index in self._fixed:
            variable = self._variables[index]
            told = self._places[index].view(buffer)
            if variable.numpy().tobytes() != told.tobytes():
                self._version = 0  # reload: this replica's variables are no longer the model's
                raise StatefulCallError(
                    f"calling the model changed its variable {variable.name!r}, which the pool "
                    "cannot hand back (each worker would change its own). Call it with "
                    "training=False, or keep that statistic out of the pooled call"
                )

    def _reseed(self, call: int, index: int) -> None:
        sequence = np.random.SeedSequence([self._seed, call, index])
        seed = int(sequence.generate_state(1)[0]) & 0x7FFFFFFF
        tf.random.set_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the model may draw from NumPy's global source
        random.seed(seed)
        for source in self._draws:
            recipes.reseed(source, seed)


def _as_the_model_wants(plan: Plan, arrays: list[np.ndarray]) -> list[Any]:
    """Copies, either way: a model may keep what it is given."""
    return [
        tf.constant(array) if as_tensor else array.copy()
        for array, as_tensor in zip(arrays, plan.as_tensor, strict=True)
    ]


def _differentiable(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and (value.dtype.is_floating or value.dtype.is_complex)


def _take(
    inputs: tuple[Placed, ...], start: int, stop: int, rows: int, buffer: memoryview
) -> list[np.ndarray]:
    return [_pad(placed.view(buffer)[start:stop], rows, repeat=True) for placed in inputs]


def _pad(array: np.ndarray, rows: int, *, repeat: bool) -> np.ndarray:
    """``rows`` rows: the last one repeated (inputs), or zeros (cotangents), where some lack."""
    missing = rows - len(array)
    if missing == 0:
        return array
    filler = array[-1:] if repeat else np.zeros_like(array[-1:])
    return np.concatenate([array, np.repeat(filler, missing, axis=0)])


def _flatten(outputs: Any, rows: int) -> tuple[Any, list[Any]]:
    """The nest with a number in each leaf's place, and the leaves, each with ``rows`` rows."""
    leaves = tf.nest.flatten(outputs)
    for leaf in leaves:
        shape = np.shape(leaf)
        if not isinstance(leaf, tf.Tensor | np.ndarray) or shape[:1] != (rows,):
            raise InputError(
                "every output of a pooled method needs a leading batch axis: expected "
                f"{rows} rows, came {type(leaf).__name__} of shape {shape}. Keep per-sample "
                "values in the pooled method and reduce them in the caller"
            )
    return tf.nest.pack_sequence_as(outputs, list(range(len(leaves)))), leaves


def _row_spec(output: Any) -> ArraySpec:
    value = np.asarray(output)
    return ArraySpec(value.shape[1:], value.dtype.str)


def _bits(outputs: Sequence[Any]) -> list[bytes]:
    return [np.asarray(output).tobytes() for output in outputs]


def _interpreter_calls(function: Callable[[], Any]) -> tuple[int, Any]:
    """Call ``function`` and count the Python and C functions that it enters.

    Unlike seconds, the count is the same on every machine and in every run, so a choice made
    from it (the tile size) is too. Eager Strawberry Fields spends its time under the
    interpreter, which makes the count a fair measure of cost. Call it once before, so that what
    a first call alone does is not counted; the collector waits, for it comes when it likes.
    """
    count = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    former, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        result = function()
    finally:
        sys.setprofile(former)
        if collecting:
            gc.enable()
    return count, result
