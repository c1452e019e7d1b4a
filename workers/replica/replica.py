"""A model as one process holds it: compute a tile, pull cotangents back.

Owns the TensorFlow side of a worker: what is called with which rows, and what is kept between a
forward and its backward pass. It reads and writes arrays over the arena's buffer at places it is
told, and knows nothing of processes or messages' order.

Bits: a tile is computed alone, from its own rows, with its own seed. What a replica computed
before, and which replica it is, leaves no trace in the result.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from workers.compiling import compiled
from workers.compiling.streams import Stream
from workers.engine.scope import traced_engines
from workers.errors import ConfigurationError, GradientError, InputError
from workers.exchange.protocol import Build, Frame, Kind, Plan, Probe, Probed
from workers.layout import Buffer, tile_rows
from workers.replica import serialization, tile_arrays
from workers.replica.calls import Calls
from workers.replica.classes import Classes
from workers.replica.draws import Draws
from workers.replica.method import Method
from workers.replica.prober import Prober
from workers.replica.recorded import Recorded
from workers.replica.weights import Weights
from workers.tensors import leaves, tensor_of

#: Forward calls whose tapes are kept for a backward pass that may come. A GAN step keeps at most
#: three at once (generator, critic on real, critic on generated); older ones are recomputed.
KEPT_CALLS = 8


class Replica:
    """One model in one worker."""

    def __init__(self, build: Build, in_force: dict[str, Any] | None, alone: bool = True) -> None:
        """``in_force`` are the settings of this process, None if they are free to choose.

        Unless ``alone``, global sources of draws are others', and a call may come from within a
        graph, which holds the threads that another graph needs.
        """
        self._traced = build.engine == "traced"
        #: In the process that the model came from, its classes are the user's own.
        self._loads = pickle.loads if alone else Classes(copies=True).loads
        with traced_engines(self._traced):
            shipped: serialization.Shipped = self._loads(build.shipment)
        if in_force not in (None, shipped.settings):
            raise ConfigurationError(
                f"the models of a pool share their processes' settings: those in force are "
                f"{in_force}, this model needs {shipped.settings}; give it a pool of its own"
            )
        serialization.apply_settings(shipped.settings)
        serialization.apply_constants(shipped.constants)
        self.settings = shipped.settings
        self._model = shipped.model
        self._sources = [shipped.variables[index] for index in shipped.differentiable]
        #: TensorFlow's global generator in the model's calls; of stock engines it is as it is.
        self._stream = Stream() if self._traced else None
        self._draws = Draws(build.seed, shipped.draws, stream=self._stream, alone=alone)
        self._plans: dict[int, Method] = {}
        self._kept: OrderedDict[int, dict[int, Recorded]] = OrderedDict()
        self.recomputed = 0
        states = {id(v) for source in shipped.draws for v in serialization.state_variables(source)}
        #: The model's variables: told and loaded by whoever owns the replica.
        self.weights = Weights(shipped.variables, states)
        self.weights.place(build.weights)
        self._calls = Calls(self.weights, self._sources)
        self._prober = Prober(
            self._model,
            self._plans,
            self._calls,
            self._draws,
            self._stream,
            levels=compiled.LEVELS[:-1] if alone else ("xla",),
            traced=self._traced,
        )

    # -- being told ------------------------------------------------------------------------

    def add_plan(self, plan: Plan) -> None:
        args, kwargs = self._loads(plan.arguments)
        call = self._model if plan.method == "__call__" else getattr(self._model, plan.method)
        known = self._plans.get(plan.plan)
        if known is None or known.plan != plan:
            self._plans[plan.plan] = Method(
                plan,
                call,
                args,
                kwargs,
                self._traced,
                self._sources,
                self._stream,
            )
            if known is not None and (known.plan.level, known.plan.form) == (plan.level, plan.form):
                self._plans[plan.plan].__dict__.update(known.functions)

    def forget(self, calls: Sequence[int]) -> None:
        """Free what is kept for the backward passes of these calls."""
        for call in calls:
            self._kept.pop(call, None)

    # -- computing -------------------------------------------------------------------------

    def probe(self, request: Probe, frame: Frame, finished: int, buffer: Buffer) -> Probed:
        """Learn what a plan makes of the first rows, and compile it: see ``Prober``."""
        self.weights.load(request.weights_version, buffer)
        return self._prober.probe(request, frame, finished, buffer)

    def load(self, plan: int, version: int, buffer: Buffer) -> None:
        """Have the weights be of this version, for calls of this plan."""
        copies = self._plans[plan].plan.level == "eager"
        self.weights.load(version, buffer, copies=copies)

    def compute(
        self, kind: Kind, plan: int, frame: Frame, call: int, index: int, buffer: Buffer
    ) -> None:
        """Compute one tile, and write what comes of it."""
        if kind is Kind.BOTH:
            self.both(plan, frame, call, index, buffer)
        elif kind in (Kind.BACKWARD, Kind.SECOND):
            self.backward(plan, frame, call, index, buffer, second=kind is Kind.SECOND)
        else:
            self.forward(plan, frame, call, index, kind is Kind.FORWARD_KEEPING, buffer)

    def forward(
        self, plan: int, frame: Frame, call: int, index: int, keep: bool, buffer: Buffer
    ) -> None:
        """Compute one tile and write its outputs; with ``keep``, hold on to its tape."""
        method = self._plans[plan]
        span = self._span(method.plan, frame, index)
        arrays = self._begin_tile(method, frame, call, index, span, buffer)
        if keep and method.plan.level == "eager":
            kept = self._calls.record(method, arrays, buffer)
            outputs = kept.outputs
            self._kept.setdefault(call, {})[frame.first + index] = kept
            while len(self._kept) > KEPT_CALLS:
                self._kept.popitem(last=False)
        else:
            found = self._calls.run(method, arrays, buffer)
            outputs = [found] if isinstance(found, tf.Tensor) else leaves(found)
        self._write(outputs, frame, span, buffer)

    def both(self, plan: int, frame: Frame, call: int, index: int, buffer: Buffer) -> None:
        """Compute one tile and pull its cotangents back, which are known before: write its outputs,
        and the gradients of variables."""
        method = self._plans[plan]
        span = self._span(method.plan, frame, index)
        arrays = self._begin_tile(method, frame, call, index, span, buffer)
        given, seeds = self._seeds(frame, *span, buffer)
        wanted = tuple(source - len(frame.inputs) for source, _ in frame.weight_gradients)
        outputs, gradients = self._calls.both(method, arrays, given, seeds, wanted, buffer)
        self._write(outputs, frame, span, buffer)
        for (_, placed), gradient in zip(frame.weight_gradients, gradients, strict=True):
            placed.view(buffer)[index] = np.asarray(gradient)

    @staticmethod
    def _write(
        outputs: Sequence[Any], frame: Frame, span: tuple[int, int, int], buffer: Buffer
    ) -> None:
        """Write a tile's outputs, which are to be what the probe found."""
        start, stop, rows = span
        if len(outputs) != len(frame.outputs):
            raise InputError(
                f"the model returned {len(outputs)} arrays; its first call returned "
                f"{len(frame.outputs)}. A pooled method returns the same structure every time"
            )
        for output, placed in zip(outputs, frame.outputs, strict=True):
            value = np.asarray(output)
            spec = placed.spec
            if value.shape != (rows, *spec.shape[1:]) or value.dtype.str != spec.dtype:
                raise InputError(
                    f"the model returned shape {value.shape}, dtype {value.dtype} for {rows} "
                    f"rows; expected {(rows, *spec.shape[1:])}, {spec.dtype} "
                    "as in its first call"
                )
            placed.view(buffer)[start:stop] = value[: stop - start]

    def backward(
        self,
        plan: int,
        frame: Frame,
        call: int,
        index: int,
        buffer: Buffer,
        *,
        second: bool = False,
    ) -> None:
        """Pull one tile's cotangents back and write its gradients; with ``second``, pull those
        gradients' own cotangents (``frame.tangents``) back through that."""
        method = self._plans[plan]
        start, stop, rows = span = self._span(method.plan, frame, index)
        cotangents = [
            None
            if placed is None
            else tile_arrays.pad(placed.view(buffer)[start:stop], rows, repeat=False)
            for placed in frame.cotangents
        ]
        if method.plan.level != "eager":
            arrays = self._begin_tile(method, frame, call, index, span, buffer)
            seeds = tile_arrays.seeds(method.plan, rows, cotangents)
            if second:
                tangents = tile_arrays.tangents(
                    method.plan, frame, len(self._sources), start, stop, rows, buffer
                )
                gradients, of_seeds = self._calls.second(method, arrays, seeds, tangents, buffer)
                for placed, gradient in zip(frame.cotangent_gradients, of_seeds, strict=True):
                    if placed is not None:
                        placed.view(buffer)[start:stop] = gradient[: stop - start]
            else:
                gradients = self._calls.vjp(method, arrays, seeds, buffer)
        else:
            kept = self._kept.get(call, {}).pop(frame.first + index, None)
            if kept is None:
                kept = self._recompute(method, frame, call, index, buffer)
            wanted = {source for source, _ in frame.input_gradients}
            gradients = kept.gradients(cotangents, wanted)
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
            names = [self._source_name(source, len(frame.inputs)) for source in lost]
            raise GradientError(
                f"the gradient for {', '.join(names)} appeared only now: expected none, as on "
                "the first rows of the first call. Which sources an output depends on must not "
                "depend on the data"
            )

    def rehearse(self, plan: int, frame: Frame, version: int, kind: Kind, buffer: Buffer) -> None:
        """Compute a tile as ``forward`` or ``backward`` would, and keep nothing of it."""
        method = self._plans[plan]
        self.load(plan, version, buffer)
        self.weights.distrust()  # the coordinator may be writing the next ones: not to be relied on
        _, stop, rows = self._span(method.plan, frame, 0)
        arrays = tile_arrays.take(frame.inputs, 0, stop, rows, buffer)
        if kind is Kind.BOTH:
            given, found = self._seeds(frame, 0, stop, rows, buffer)
            wanted = tuple(source - len(frame.inputs) for source, _ in frame.weight_gradients)
            self._calls.both(method, arrays, given, found, wanted, buffer)
            return
        if kind not in (Kind.BACKWARD, Kind.SECOND):
            self._calls.run(method, arrays, buffer)
            return
        if method.plan.level == "eager":
            self._calls.record(method, arrays, buffer).gradients(None)
            return
        seeds = tile_arrays.seeds(method.plan, rows, [None] * len(method.plan.outputs))
        if kind is Kind.BACKWARD:
            self._calls.vjp(method, arrays, seeds, buffer)
        else:
            tangents = tile_arrays.tangents(
                method.plan, frame, len(self._sources), 0, stop, rows, buffer
            )
            self._calls.second(method, arrays, seeds, tangents, buffer)

    # -- within ----------------------------------------------------------------------------

    @staticmethod
    def _span(plan: Plan, frame: Frame, index: int) -> tuple[int, int, int]:
        """First row of a tile, one past its last, and how many to call the model with: more where
        it needs them.

        A compiled model gets whole tiles, so that a ragged last one compiles nothing new.
        """
        start, stop = tile_rows(index, frame.tile, frame.batch)
        needed = stop - start if plan.level == "eager" else frame.tile
        return start, stop, plan.rows or max(plan.least_rows, needed)

    def _begin_tile(
        self,
        method: Method,
        frame: Frame,
        call: int,
        index: int,
        span: tuple[int, int, int],
        buffer: Buffer,
    ) -> list[np.ndarray]:
        """Seed the tile's draws, and take its rows: the same for a forward pass and its repeat."""
        if method.plan.draws:
            everywhere = method.plan.level == "eager"
            self._draws.seed(call, frame.first + index, everywhere=everywhere)
        return tile_arrays.take(frame.inputs, *span, buffer)

    @staticmethod
    def _seeds(
        frame: Frame, start: int, stop: int, rows: int, buffer: Buffer
    ) -> tuple[tuple[int, ...], list[tf.Tensor]]:
        """Which outputs have cotangents, and a tile's rows of these."""
        places = {n: placed for n, placed in enumerate(frame.cotangents) if placed is not None}
        seeds = [
            tensor_of(tile_arrays.pad(placed.view(buffer)[start:stop], rows, repeat=False))
            for placed in places.values()
        ]
        return tuple(places), seeds

    def _recompute(
        self, method: Method, frame: Frame, call: int, index: int, buffer: Buffer
    ) -> Recorded:
        if method.plan.draws and not method.plan.reproducible:
            raise GradientError(
                "the forward pass of this result is no longer kept, and it cannot be computed "
                "again: the model draws random numbers from a source that cannot be seeded. Take "
                "gradients before further calls, and once; or draw from TensorFlow, Keras or "
                "NumPy"
            )
        self.recomputed += 1
        span = self._span(method.plan, frame, index)
        arrays = self._begin_tile(method, frame, call, index, span, buffer)
        return self._calls.record(method, arrays, buffer)

    def _source_name(self, source: int, inputs: int) -> str:
        if source < inputs:
            return f"input {source}"
        return f"variable {self._sources[source - inputs].name!r}"
