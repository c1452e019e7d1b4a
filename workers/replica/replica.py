"""A model as one process holds it: compute a tile, pull cotangents back.

Owns the TensorFlow side of a worker: what is called with which rows, and what is kept between a
forward and its backward pass. It reads and writes arrays over the arena's buffer at places it is
told, and knows nothing of processes or messages' order.

Bits: a tile is computed alone, from its own rows, with its own seed. What a replica computed
before, and which replica it is, leaves no trace in the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import numpy as np
import tensorflow as tf

from workers.compiling import compiled, streams
from workers.compiling.streams import Stream
from workers.engine import circuit
from workers.engine.scope import traced_engines
from workers.errors import ConfigurationError, GradientError, InputError, StatefulCallError
from workers.exchange.protocol import Build, Frame, Kind, Plan, Survey, Surveyed
from workers.layout import Buffer, tile_rows, tile_worth
from workers.replica import recipes, survey, tile_arrays
from workers.replica.calls import Calls
from workers.replica.draws import Draws
from workers.replica.method import Method, as_tensors, as_the_model_wants, differentiable
from workers.replica.recorded import Recorded
from workers.replica.weights import Weights
from workers.tensors import tensor_of

#: Forward calls whose tapes are kept for a backward pass that may come. A GAN step keeps at most
#: three at once (generator, critic on real, critic on generated); older ones are recomputed.
KEPT_CALLS = 8

#: Two counts of rows for the survey: together they split a call's cost into its parts. Not one
#: row, which Strawberry Fields computes in another way (without a batch axis).
_SURVEY_ROWS = (2, 6)


class Replica:
    """One model in one worker."""

    def __init__(self, build: Build, in_force: dict[str, Any] | None, alone: bool = True) -> None:
        """``in_force`` are the settings of this process, None if they are free to choose.

        Unless ``alone``, global sources of draws are others', and a call may come from within a
        graph, which holds the threads that another graph needs.
        """
        self._levels = compiled.LEVELS[:-1] if alone else ("xla",)
        self._traced = build.engine == "traced"
        with traced_engines(self._traced):
            shipped: recipes.Shipped = pickle.loads(build.shipment)
        if in_force not in (None, shipped.settings):
            raise ConfigurationError(
                f"the models of a pool share their processes' settings: those in force are "
                f"{in_force}, this model needs {shipped.settings}; give it a pool of its own"
            )
        recipes.apply_settings(shipped.settings)
        self.settings = shipped.settings
        self._model = shipped.model
        self._sources = [shipped.variables[index] for index in shipped.differentiable]
        #: TensorFlow's global generator in the model's calls; of stock engines it is as it is.
        self._stream = Stream() if self._traced else None
        self._draws = Draws(build.seed, shipped.draws, stream=self._stream, alone=alone)
        self._plans: dict[int, Method] = {}
        self._kept: OrderedDict[int, dict[int, Recorded]] = OrderedDict()
        self.recomputed = 0
        states = {id(v) for source in shipped.draws for v in recipes.state_variables(source)}
        #: The model's variables: told and loaded by whoever owns the replica.
        self.weights = Weights(shipped.variables, states)
        self.weights.place(build.weights)
        self._calls = Calls(self.weights, self._sources)

    # -- being told ------------------------------------------------------------------------

    def add_plan(self, plan: Plan) -> None:
        args, kwargs = pickle.loads(plan.arguments)
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
            if known is not None and known.plan.form == plan.form:
                self._plans[plan.plan].__dict__.update(known.functions)

    def forget(self, calls: Sequence[int]) -> None:
        """Free what is kept for the backward passes of these calls."""
        for call in calls:
            self._kept.pop(call, None)

    # -- computing -------------------------------------------------------------------------

    @circuit.untraced()
    def survey(self, request: Survey, frame: Frame, finished: int, buffer: Buffer) -> Surveyed:
        """Run the first rows and learn what comes out, what it costs and what depends on what."""
        known = self._plans[request.plan]
        method = dataclasses.replace(  # what is asked here is asked of the model as it is
            known, plan=dataclasses.replace(known.plan, level="eager")
        )
        self.weights.load(request.weights_version, buffer)
        few, many = (method.plan.rows,) * 2 if method.plan.rows else _SURVEY_ROWS

        def run(rows: int) -> Any:
            return self._calls.run(method, self._first_rows(frame, rows, buffer), buffer)

        losses = survey.losses(self._model)
        with survey.no_new_variables(), circuit.tally() as of_few:
            self._draws.seed(0, 0)
            structure, outputs = survey.flatten(run(few), few)
            streamed = self._stream.numbers if self._stream is not None else 0
            globally = self._draws.drawn_globally_since(0, 0)
            others = bool(self._draws) or globally
            draws = others or streamed > 0
        self.weights.check_unchanged(buffer, all_of_them=True)
        if survey.losses(self._model) > losses:
            raise StatefulCallError(
                "the model adds losses in its call (add_loss, an activity regularizer), which a "
                "worker cannot hand back. Return what the loss needs, and add it in the caller"
            )
        self._draws.seed(0, 0)
        calls_few, second = survey.interpreter_calls(lambda: run(few))
        reproducible = survey.bits(outputs) == survey.bits(tf.nest.flatten(second))
        self._draws.seed(0, 0)
        with circuit.tally() as of_all:
            of_many = survey.flatten(run(many), many)[1]
        later = self._stream.numbers if self._stream is not None else 0
        by_row = not streamed or (few != many and later * few == streamed * many)
        calls_many, _ = survey.interpreter_calls(lambda: run(many))
        survey.check_rows_are_alike(outputs, of_many, few, many)
        if not draws and reproducible:
            survey.check_rows_are_independent(outputs, of_many, few)
        connected: tuple[bool, ...] = ()
        if request.gradient:
            kept = self._calls.record(method, self._first_rows(frame, few, buffer), buffer)
            connected = tuple(
                g is not None for g in kept.gradients(None, last=bool(request.wanted))
            )
        per_row = max(calls_many - calls_few, 0) / max(many - few, 1)
        fixed = max(calls_few - per_row * few, 0.0)
        fixed_cost = fixed / per_row if per_row else float("inf")
        seedable = not globally and self._draws.in_variables and reproducible
        choice = compiled.Choice(
            "eager", survey.why_eager(outputs, traced=self._traced, seedable=seedable), 0.0
        )
        if not choice.reason:
            looped = survey.loops((few, of_few.runs), (many, of_all.runs)) and not others and by_row
            for form in survey.forms(method.plan, outputs, looped=looped):
                cost = float("inf") if form.by_rows else fixed_cost
                rows = method.plan.rows or tile_worth(cost, request.largest_tile)
                arrays = self._first_rows(frame, rows, buffer)
                trial = dataclasses.replace(method, plan=form)
                found = self._compile(
                    known,
                    trial,
                    arrays,
                    of_many,
                    draws=draws,
                    gradient=request.gradient,
                    gradient_first=request.gradient_first,
                    wanted=tuple(  # variables that anything depends on, by their places
                        n - len(method.plan.as_tensor) for n in request.wanted if connected[n]
                    ),
                    buffer=buffer,
                )
                choice = found.after(choice) if looped and not form.by_rows else found
                if choice.level != "eager":
                    fixed_cost = cost
                    break
        form = self._plans[request.plan].plan
        return Surveyed(
            request.ticket,
            finished,
            cloudpickle.dumps(structure),
            tuple(survey.row_spec(output) for output in outputs),
            tuple(isinstance(output, tf.Tensor) for output in outputs),
            few if method.plan.rows else survey.least_rows(run),
            draws or not reproducible,
            reproducible,
            fixed_cost,
            connected,
            choice.level,
            choice.reason,
            choice.seconds,
            form.by_rows,
            form.narrowed,
            of_few.runs,
            next(iter(of_few.failures), ""),
        )

    def _compile(
        self,
        known: Method,
        method: Method,
        arrays: list[np.ndarray],
        of_many: list[Any],
        *,
        draws: bool,
        gradient: bool,
        gradient_first: bool,
        wanted: tuple[int, ...],
        buffer: Buffer,
    ) -> compiled.Choice:
        """The level for this plan from now on, with a tile's shape compiled already: the call and,
        with ``gradient``, its vjp, or what is ``wanted`` of both as one program.

        ``method`` is the model as it is; ``known`` may have been compiled before, without
        gradients. ``of_many`` is what a few rows gave, if the tile has as many: a loop over all
        of them takes its time.
        """
        self._draws.seed(0, 0)
        rows = len(arrays[0])
        # Vectorised, a loop draws in another order: then the rest is compared, without the draws.
        alike = streams.constant if draws and method.plan.by_rows else contextlib.nullcontext
        if method.plan.by_rows and rows >= len(of_many[0]) and not draws:
            expected = of_many
        else:
            with alike():
                expected = tf.nest.flatten(self._calls.run(method, arrays, buffer))
        seeds = [
            tf.ones([rows, *output.shape[1:]], output.dtype)
            for output in expected
            if differentiable(output)
        ]

        def pull_back(function: Callable[..., Any], level: str) -> None:
            plan = dataclasses.replace(
                method.plan,
                level=level,
                outputs=tuple(survey.row_spec(output) for output in expected),
            )
            trial = dataclasses.replace(method, plan=plan)
            self._plans[plan.plan] = trial
            if wanted:
                trial.compiled_both[given, wanted] = function
                return
            trial.__dict__["compiled"] = function
            if gradient:
                self._calls.vjp(trial, arrays, seeds, buffer)

        inputs = as_tensors(as_the_model_wants(method.plan, arrays))
        given = (len(expected) - 1,)
        function: Callable[..., Any] = method
        if wanted:
            function = method.both(given, wanted)
            inputs.append(seeds[-1])
        same = known.plan.level != "eager" and known.plan == dataclasses.replace(
            method.plan, level=known.plan.level, outputs=known.plan.outputs
        )
        ready = known.functions.get("compiled") if same and not wanted else None
        choice = compiled.choose(
            function,
            inputs,
            expected,
            pull_back,
            {known.plan.level: ready},
            before=lambda: self._draws.seed(0, 0, everywhere=False),
            draws=draws,
            alike=alike,
            levels=self._levels,
            program=method.program(f"both {(given, wanted)}" if wanted else "compiled"),
            use_first=gradient_first,
        )
        if choice.level == "eager":
            plan = dataclasses.replace(method.plan, by_rows=(), narrowed=False)
            self._plans[plan.plan] = dataclasses.replace(method, plan=plan)
        return choice

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
            outputs = [found] if isinstance(found, tf.Tensor) else tf.nest.flatten(found)
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
        """Write a tile's outputs, which are to be what the survey found."""
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
    def _first_rows(frame: Frame, rows: int, buffer: Buffer) -> list[np.ndarray]:
        return tile_arrays.take(frame.inputs, 0, min(rows, frame.batch), rows, buffer)

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
