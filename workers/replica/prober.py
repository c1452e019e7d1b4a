"""What a plan makes of the first rows, and the form in which it is compiled from then on.

Owns the probe: it calls the model as it is, on two counts of rows, and has what that shows decide
how tiles are computed. Computing them is the replica's; what is compared, ``probe``'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import numpy as np
import tensorflow as tf

from workers.compiling import branches, compiled, streams
from workers.compiling.streams import Stream
from workers.engine import circuit
from workers.engine.scope import GOES_ON
from workers.errors import StatefulCallError
from workers.exchange.protocol import Form, Frame, Plan, Probe, Probed
from workers.layout import Buffer, tile_worth
from workers.replica import probe, serialization, tile_arrays
from workers.replica.calls import Calls
from workers.replica.draws import Draws
from workers.replica.method import Method, as_tensors, as_the_model_wants, differentiable
from workers.tensors import leaves

#: Two counts of rows for the probe: together they split a call's cost into its parts. Not one
#: row, which Strawberry Fields computes in another way (without a batch axis).
_ROWS = (2, 6)


@dataclasses.dataclass(frozen=True)
class Observed:
    """What the model as it is did with ``few`` rows, and with ``many``.

    ``drew``: at all; ``beyond``: from another source than the stream; ``globally``: from a
    library's global one; ``in_variables``: of its own from none but such as stand in variables.
    ``attributes``: those that it sets to tensors each time. ``by_row``: what
    it drew was so many numbers a row. ``fixed_cost`` of a call is in rows.
    """

    structure: Any
    outputs: list[Any]
    of_many: list[Any]
    few: int
    many: int
    ran_few: circuit.Tally
    ran_many: circuit.Tally
    drew: bool
    beyond: bool
    globally: bool
    in_variables: bool
    attributes: tuple[str, ...]
    by_row: bool
    reproducible: bool
    calls_of_few: int

    @property
    def loops(self) -> bool:
        """Whether it runs a circuit for each row, which may be traced for one of them."""
        counts = (self.few, self.ran_few.runs), (self.many, self.ran_many.runs)
        return probe.loops(*counts) and not self.beyond and self.by_row


class Prober:
    """Probes plans of one model. ``plans`` are its methods by number, which a probe replaces by
    what it has compiled; ``levels`` are those to try."""

    def __init__(
        self,
        model: Any,
        plans: dict[int, Method],
        calls: Calls,
        draws: Draws,
        stream: Stream | None,
        *,
        levels: Sequence[str],
        traced: bool,
    ) -> None:
        self._model = model
        self._plans = plans
        self._calls = calls
        self._draws = draws
        self._stream = stream
        self._levels = levels
        self._traced = traced

    @circuit.untraced()
    def probe(self, request: Probe, frame: Frame, finished: int, buffer: Buffer) -> Probed:
        """Run the first rows and learn what comes out, what it costs and what depends on what."""
        known = self._plans[request.plan]
        method = dataclasses.replace(  # what is asked here is asked of the model as it is
            known, plan=dataclasses.replace(known.plan, level="eager")
        )

        def run(rows: int, others: int = 0) -> Any:
            arrays = tile_arrays.first(frame, rows, buffer)
            if others:  # again and again the first ones, in the places of the others
                arrays = [np.resize(array[:others], array.shape) for array in arrays]
            return self._calls.run(method, arrays, buffer)

        seen = self._observe(method.plan, run, buffer)
        fixed_cost = functools.cache(functools.partial(self._fixed_cost, seen, run))
        connected = functools.cache(
            functools.partial(self._connected, request, method, seen, frame, buffer)
        )
        choice, cost, there = self._choose(
            request, known, method, seen, fixed_cost, connected, frame, buffer
        )
        form = self._plans[request.plan].plan.form
        return Probed(
            request.ticket,
            finished,
            cloudpickle.dumps(seen.structure),
            tuple(probe.row_spec(output) for output in seen.outputs),
            tuple(isinstance(output, tf.Tensor) for output in seen.outputs),
            seen.few if method.plan.rows else probe.least_rows(run),
            seen.drew or not seen.reproducible,
            seen.reproducible,
            cost,
            there,
            choice.level,
            choice.reason,
            choice.seconds,
            form,
            seen.ran_few.runs,
            next(iter(seen.ran_few.failures), ""),
            seen.attributes,
        )

    def _observe(self, plan: Plan, run: Callable[..., Any], buffer: Buffer) -> Observed:
        """Run few rows twice, and many twice; raise for what no tile may do."""
        few, many = (plan.rows,) * 2 if plan.rows else _ROWS
        losses = probe.losses(self._model)
        before = dict(getattr(self._model, "__dict__", {}))
        with probe.no_new_variables(), circuit.tally() as ran_few:
            self._draws.seed(0, 0)
            stands = self._draws.stands()
            structure, outputs = probe.flatten(run(few), few)
            streamed = self._stream.numbers if self._stream is not None else 0
            globally = self._draws.drawn_globally_since(0, 0)
            beyond = self._draws.stands() != stands or globally
            in_variables = self._draws.in_variables(stands)
            drew = beyond or streamed > 0
        made = serialization.set_to_tensors(self._model, before)
        self._calls.check_all_unchanged(buffer)
        if probe.losses(self._model) > losses:
            raise StatefulCallError(
                "the model adds losses in its call (add_loss, an activity regularizer), which a "
                "worker cannot hand back. Return what the loss needs, and add it in the caller"
            )
        before = dict(getattr(self._model, "__dict__", {}))
        self._draws.seed(0, 0)
        with circuit.tally() as ran_again:
            calls_few, second = probe.interpreter_calls(lambda: run(few))
        again = self._stream.numbers if self._stream is not None else 0
        attributes = serialization.set_to_tensors(self._model, before)
        kept = [f"self.{name}" for name in made if name not in attributes]
        if kept and (again < streamed or globally > self._draws.drawn_globally_since(0, 0)):
            raise StatefulCallError(
                f"the first call set {', '.join(kept)}, and drew random numbers that later calls "
                "do not draw, so the coordinator's model would not be the one that is computed; "
                "call the model once on a batch before qpool.parallelize"
            )
        if ran_again.went_on:
            raise StatefulCallError(
                f"{GOES_ON}. Each worker has an engine of its own, which would go on from the rows "
                "that it happened to compute before; strategy='sequential' goes on as Strawberry "
                "Fields does"
            )
        reproducible = probe.bits(outputs) == probe.bits(leaves(second))
        self._draws.seed(0, 0)
        with circuit.tally() as ran_many:
            of_many = probe.flatten(run(many), many)[1]
        later = self._stream.numbers if self._stream is not None else 0
        by_row = not streamed or (few != many and later * few == streamed * many)
        probe.check_rows_are_alike(outputs, of_many, few, many)
        if reproducible and not drew:
            probe.check_rows_are_alone(outputs, of_many, few, "rows were added", probe.MEANS)
        return Observed(
            structure,
            outputs,
            of_many,
            few,
            many,
            ran_few,
            ran_many,
            drew,
            beyond,
            globally,
            in_variables,
            attributes,
            by_row,
            reproducible,
            calls_few,
        )

    def _fixed_cost(self, seen: Observed, run: Callable[..., Any]) -> float:
        """What a call costs whatever its rows, in rows. Raises if rows come out otherwise beside
        others than those that they have been seen with.

        Not asked of a loop over rows that is vectorised: a row of it is one for itself, as its
        graph shows, and each of its tiles costs as if it had many.
        """
        few, many = seen.few, seen.many
        self._draws.seed(0, 0)
        calls_of_many, beside = probe.interpreter_calls(
            lambda: run(many, others=few if few < many else 0)
        )
        if seen.reproducible and not seen.beyond:  # what NumPy draws for one may be others' doing
            others = leaves(beside)
            probe.check_rows_are_alone(seen.of_many, others, few, "others changed", probe.BITS)
        per_row = max(calls_of_many - seen.calls_of_few, 0) / max(many - few, 1)
        fixed = max(seen.calls_of_few - per_row * few, 0.0)
        return fixed / per_row if per_row else float("inf")

    def _connected(
        self, request: Probe, method: Method, seen: Observed, frame: Frame, buffer: Buffer
    ) -> tuple[bool, ...]:
        """Which sources the model as it is has gradients for; none if no gradient is asked for."""
        if not request.purpose.gradient:
            return ()
        rows = tile_arrays.first(frame, seen.few, buffer)
        gradients = self._calls.record(method, rows, buffer).gradients(
            None, last=bool(request.purpose.wanted)
        )
        return tuple(gradient is not None for gradient in gradients)

    def _choose(
        self,
        request: Probe,
        known: Method,
        method: Method,
        seen: Observed,
        fixed_cost: Callable[[], float],
        connected: Callable[[], tuple[bool, ...]],
        frame: Frame,
        buffer: Buffer,
    ) -> tuple[compiled.Choice, float, tuple[bool, ...]]:
        """The first of the plan's forms that compiles, what a call of it costs in rows, and which
        sources it has gradients for."""
        seedable = not seen.globally and seen.in_variables and seen.reproducible
        reason = probe.why_eager(seen.outputs, traced=self._traced, seedable=seedable)
        choice = compiled.Choice("eager", reason, 0.0)
        if reason:
            return choice, fixed_cost(), connected()
        purpose = request.purpose
        forms = probe.forms(
            method.plan, seen.outputs, looped=seen.loops, circuits=seen.ran_few.runs
        )
        for form in forms:
            cost = float("inf") if form.by_rows else fixed_cost()
            rows = method.plan.rows or tile_worth(cost, purpose.largest_tile)
            arrays = tile_arrays.first(frame, rows, buffer)
            trial = dataclasses.replace(method, plan=dataclasses.replace(method.plan, form=form))
            everything = tuple(x.dtype.kind in "fc" for x in arrays)
            everything += (True,) * len(trial.variables) * purpose.gradient
            # Variables that anything depends on, by their places: in these rows, or in any.
            first, every = (
                tuple(n - len(arrays) for n in purpose.wanted if sources[n])
                for sources in (connected() if purpose.wanted else (), everything)
            )
            for wanted in dict.fromkeys((first, every)):
                depends: list[bool] = []
                with branches.noticed() as conditions:
                    found = self._compile(
                        known,
                        trial,
                        arrays,
                        seen,
                        gradient=purpose.gradient,
                        gradient_first=request.gradient_first,
                        wanted=wanted,
                        depends=depends,
                        buffer=buffer,
                    )
                if not conditions:
                    break
            compiles = found.level != "eager"
            instead = probe.instead_of_rows(form) if seen.loops and compiles else ""
            choice = found.after(choice, instead) if instead else found
            if choice.level != "eager":
                # What is compiled says it: where rows decide, of both ways.
                there = tuple(depends) or (everything if conditions else connected())
                return choice, cost, there if purpose.gradient else ()
        return choice, fixed_cost(), connected()

    def _compile(
        self,
        known: Method,
        method: Method,
        arrays: list[np.ndarray],
        seen: Observed,
        *,
        gradient: bool,
        gradient_first: bool,
        wanted: tuple[int, ...],
        depends: list[bool],
        buffer: Buffer,
    ) -> compiled.Choice:
        """The level for this plan from now on, with a tile's shape compiled already: the call and,
        with ``gradient``, its vjp, or what is ``wanted`` of both as one program.

        ``method`` is the model as it is; ``known`` may have been compiled before, without
        gradients. What many rows gave is not asked for again, if the tile has as many: none depends
        on the others. ``depends`` takes whether the vjp has gradients for the
        sources.
        """
        # Vectorised, a loop draws in another order: then the rest is compared, without the draws.
        alike = (
            streams.constant if seen.drew and method.plan.form.by_rows else contextlib.nullcontext
        )
        rows = len(arrays[0])
        self._draws.seed(0, 0)
        if rows >= seen.many and not seen.drew:
            expected = seen.of_many
        else:
            with alike():
                expected = leaves(self._calls.run(method, arrays, buffer))
        seeds = [
            tf.ones([rows, *output.shape[1:]], output.dtype)
            for output in expected
            if differentiable(output)
        ]

        def pull_back(function: Callable[..., Any], level: str) -> None:
            plan = dataclasses.replace(
                method.plan,
                level=level,
                outputs=tuple(probe.row_spec(output) for output in expected),
            )
            trial = dataclasses.replace(method, plan=plan)
            self._plans[plan.plan] = trial
            if wanted:
                trial.compiled_both[given, wanted] = function
                return
            trial.__dict__["compiled"] = function
            if gradient:
                found = self._calls.vjp(trial, arrays, seeds, buffer)
                depends[:] = [x is not None for x in found]

        inputs = as_tensors(as_the_model_wants(method.plan, arrays))
        given = (len(expected) - 1,)
        function: Callable[..., Any] = method
        if wanted:
            function = method.both(given, wanted)
            inputs.append(seeds[-1])
        choice = compiled.choose(
            function,
            inputs,
            expected,
            pull_back,
            {} if wanted else _ready(known, method.plan),
            before=lambda: self._draws.seed(0, 0, everywhere=False),
            draws=seen.drew,
            failed=bool(seen.ran_few.failures),
            alike=alike,
            levels=self._levels,
            program=method.program(f"both {(given, wanted)}" if wanted else "compiled"),
            use_first=gradient_first,
        )
        if choice.level == "eager":
            plan = dataclasses.replace(method.plan, form=Form())
            self._plans[plan.plan] = dataclasses.replace(method, plan=plan)
        return choice


def _ready(known: Method, plan: Plan) -> dict[str, Callable[..., Any] | None]:
    """The call as it was compiled for this very plan before, by its level."""
    level = known.plan.level
    as_known = dataclasses.replace(plan, level=level, outputs=known.plan.outputs)
    same = level != "eager" and known.plan == as_known
    return {level: known.functions.get("compiled")} if same else {}
