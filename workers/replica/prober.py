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
from workers.compiling.compile_cache import Guarded
from workers.compiling.streams import Stream
from workers.engine import circuit
from workers.engine.scope import GOES_ON
from workers.errors import StatefulCallError
from workers.exchange.protocol import Form, Frame, Plan, Probe, Probed
from workers.layout import Buffer, tile_worth
from workers.replica import probe, tile
from workers.replica.calls import Calls
from workers.replica.draws import Draws
from workers.replica.kept import Before
from workers.replica.method import Method, as_tensors, as_the_model_wants
from workers.tensors import differentiable, leaves

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


@dataclasses.dataclass(frozen=True, eq=False)
class Prober:
    """Probes plans of one model. ``plans`` are its methods by number, which a probe replaces by
    what it has compiled; ``levels`` are those to try."""

    model: Any
    plans: dict[int, Method]
    calls: Calls
    draws: Draws
    stream: Stream | None
    levels: Sequence[str]
    traced: bool

    @circuit.untraced()
    def probe(self, request: Probe, frame: Frame, finished: int, buffer: Buffer) -> Probed:
        """Run the first rows and learn what comes out, what it costs and what depends on what."""
        asked = _OneProbe(self, request, self.plans[request.plan], frame, buffer)
        seen = asked.seen
        choice, fixed_cost, connected = asked.choose()
        return Probed(
            request.ticket,
            finished,
            cloudpickle.dumps(seen.structure),
            tuple(probe.row_spec(output) for output in seen.outputs),
            tuple(isinstance(output, tf.Tensor) for output in seen.outputs),
            seen.few if asked.method.plan.rows else probe.least_rows(asked.run),
            seen.drew or not seen.reproducible,
            seen.reproducible,
            fixed_cost,
            connected,
            choice.level,
            choice.reason,
            choice.seconds,
            self.plans[request.plan].plan.form,
            seen.ran_few.runs,
            next(iter(seen.ran_few.failures), ""),
            seen.attributes,
            asked.leads(),
        )

    @property
    def drawn(self) -> int:
        """How many numbers the stream has given since it was seeded."""
        return self.stream.numbers if self.stream is not None else 0


@dataclasses.dataclass(frozen=True, eq=False)
class _OneProbe:
    """One probe: of the method as it is ``known`` so far, with the rows of ``frame``."""

    prober: Prober
    request: Probe
    known: Method
    frame: Frame
    buffer: Buffer

    @functools.cached_property
    def method(self) -> Method:
        """The model as it is: what is asked here is asked of that."""
        return dataclasses.replace(
            self.known, plan=dataclasses.replace(self.known.plan, level="eager")
        )

    def run(self, rows: int, others: int = 0) -> Any:
        """Call it with the first rows; again and again the first of them, if ``others`` are to be
        in the places of the others."""
        arrays = tile.first(self.frame, rows, self.buffer)
        if others:
            arrays = [np.resize(array[:others], array.shape) for array in arrays]
        return self.prober.calls.run(self.method, arrays, self.buffer)

    @functools.cached_property
    def seen(self) -> Observed:
        """Run few rows twice, and many once; raise for what no tile may do."""
        model, draws = self.prober.model, self.prober.draws
        few, many = (self.method.plan.rows,) * 2 if self.method.plan.rows else _ROWS
        losses = probe.losses(model)
        before = Before(model, self.method.plan.method)
        with probe.no_new_variables(), circuit.tally() as ran_few:
            draws.seed(0, 0)
            stands = draws.stands()
            structure, outputs = probe.flatten(self.run(few), few)
            streamed = self.prober.drawn
            globally = draws.drawn_globally_since(0, 0)
            beyond = draws.stands() != stands or globally
            in_variables = draws.in_variables(stands)
            drew = beyond or streamed > 0
        made = [each.name for each in before.kept()]
        self.prober.calls.check_all_unchanged(self.buffer)
        if probe.losses(model) > losses:
            raise StatefulCallError(
                "the model adds losses in its call (add_loss, an activity regularizer), which a "
                "worker cannot hand back. Return what the loss needs, and add it in the caller"
            )
        before = Before(model, self.method.plan.method)
        draws.seed(0, 0)
        with circuit.tally() as ran_again:
            calls_of_few, second = probe.interpreter_calls(lambda: self.run(few))
        again = self.prober.drawn
        attributes = tuple(each.name for each in before.kept())
        kept = [name for name in made if name not in attributes]
        if kept and (again < streamed or globally > draws.drawn_globally_since(0, 0)):
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
        draws.seed(0, 0)
        with circuit.tally() as ran_many:
            of_many = probe.flatten(self.run(many), many)[1]
        later = self.prober.drawn
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
            calls_of_few,
        )

    @functools.cached_property
    def fixed_cost(self) -> float:
        """What a call costs whatever its rows, in rows. Raises if rows come out otherwise beside
        others than those that they have been seen with.

        Not asked of a loop over rows that is vectorised: a row of it is one for itself, as its
        graph shows, and each of its tiles costs as if it had many.
        """
        seen = self.seen
        few, many = seen.few, seen.many
        self.prober.draws.seed(0, 0)
        calls_of_many, beside = probe.interpreter_calls(
            lambda: self.run(many, others=few if few < many else 0)
        )
        if seen.reproducible and not seen.beyond:  # what NumPy draws for one may be others' doing
            others = leaves(beside)
            probe.check_rows_are_alone(seen.of_many, others, few, "others changed", probe.BITS)
        per_row = max(calls_of_many - seen.calls_of_few, 0) / max(many - few, 1)
        fixed = max(seen.calls_of_few - per_row * few, 0.0)
        return fixed / per_row if per_row else float("inf")

    @functools.cached_property
    def connected(self) -> tuple[bool, ...]:
        """Which sources the model as it is has gradients for; none if no gradient is asked for."""
        if not self.request.purpose.gradient:
            return ()
        rows = tile.first(self.frame, self.seen.few, self.buffer)
        recorded = self.prober.calls.record(self.method, rows, self.buffer)
        gradients = recorded.gradients(None, last=bool(self.request.purpose.wanted))
        return tuple(gradient is not None for gradient in gradients)

    def choose(self) -> tuple[compiled.Choice, float, tuple[bool, ...]]:
        """The first of the plan's forms that compiles, what a call of it costs in rows, and which
        sources it has gradients for."""
        seen, purpose, plan = self.seen, self.request.purpose, self.method.plan
        seedable = not seen.globally and seen.in_variables and seen.reproducible
        reason = probe.why_eager(seen.outputs, traced=self.prober.traced, seedable=seedable)
        choice = compiled.Choice("eager", reason, 0.0)
        if reason:
            return choice, self.fixed_cost, self.connected
        for form in probe.forms(plan, seen.outputs, looped=seen.loops, circuits=seen.ran_few.runs):
            cost = float("inf") if form.by_rows else self.fixed_cost
            rows = plan.rows or tile_worth(cost, purpose.largest_tile)
            arrays = tile.first(self.frame, rows, self.buffer)
            trial = dataclasses.replace(self.method, plan=dataclasses.replace(plan, form=form))
            every = tuple(x.dtype.kind in "fc" for x in arrays)
            every += (True,) * len(trial.variables) * purpose.gradient
            # Variables that anything depends on, by their places: in these rows, or in any.
            for wanted in dict.fromkeys(
                tuple(n - len(arrays) for n in purpose.wanted if sources[n])
                for sources in ([self.connected, every] if purpose.wanted else [every])
            ):
                with branches.noticed() as conditions:
                    found, depends = self._compile(trial, arrays, wanted)
                if not conditions:
                    break
            compiles = found.level != "eager"
            instead = probe.instead_of_rows(form) if seen.loops and compiles else ""
            choice = found.after(choice, instead) if instead else found
            if choice.level != "eager":
                # What is compiled says it: where rows decide, of both ways.
                connected = tuple(depends) or (every if conditions else self.connected)
                return choice, cost, connected if purpose.gradient else ()
        return choice, self.fixed_cost, self.connected

    def leads(self) -> tuple[tuple[bool, ...], ...]:
        """For each of several outputs which sources it may depend on; none if that is not known."""
        method, purpose = self.prober.plans[self.method.plan.plan], self.request.purpose
        several = sum(map(differentiable, self.seen.outputs)) > 1
        if not several or purpose.wanted or not purpose.gradient or method.plan.level == "eager":
            return ()
        function = method.compiled
        made: Any = function.made if isinstance(function, Guarded) else function
        found: tuple[tuple[bool, ...], ...] = made.leads(
            len(method.plan.as_tensor), method.variables
        )
        return found

    def _compile(
        self, method: Method, arrays: list[np.ndarray], wanted: tuple[int, ...]
    ) -> tuple[compiled.Choice, list[bool]]:
        """The level for this plan from now on, with a tile's shape compiled already: the call and,
        for a gradient, its vjp, or what is ``wanted`` of both as one program. And whether the vjp
        has gradients for the sources, if there is one.

        ``method`` is the model as it is, in the form that is tried; it may be known from before,
        without gradients. What many rows gave is not asked for again, if the tile has as many:
        none depends on the others.
        """
        seen, draws = self.seen, self.prober.draws
        # Vectorised, a loop draws in another order: then the rest is compared, without the draws.
        alike = (
            streams.constant if seen.drew and method.plan.form.by_rows else contextlib.nullcontext
        )
        rows = len(arrays[0])
        draws.seed(0, 0)
        if rows >= seen.many and not seen.drew:
            expected = seen.of_many
        else:
            with alike():
                expected = leaves(self.prober.calls.run(method, arrays, self.buffer))
        seeds = [
            tf.ones([rows, *output.shape[1:]], output.dtype)
            for output in expected
            if differentiable(output)
        ]
        depends: list[bool] = []

        def pull_back(function: Callable[..., Any], level: str) -> None:
            specs = tuple(probe.row_spec(output) for output in expected)
            plan = dataclasses.replace(method.plan, level=level, outputs=specs)
            trial = dataclasses.replace(method, plan=plan)
            self.prober.plans[plan.plan] = trial
            if wanted:
                trial.compiled_both[given, wanted] = function
                return
            trial.__dict__["compiled"] = function
            if self.request.purpose.gradient:
                found = self.prober.calls.vjp(trial, arrays, seeds, self.buffer)
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
            {} if wanted else _ready(self.known, method.plan),
            before=lambda: draws.seed(0, 0, everywhere=False),
            draws=seen.drew,
            failed=bool(seen.ran_few.failures),
            alike=alike,
            levels=self.prober.levels,
            program=method.program(f"both {(given, wanted)}" if wanted else "compiled"),
            use_first=self.request.gradient_first,
        )
        if choice.level == "eager":
            plan = dataclasses.replace(method.plan, form=Form())
            self.prober.plans[plan.plan] = dataclasses.replace(method, plan=plan)
        return choice, depends


def _ready(known: Method, plan: Plan) -> dict[str, Callable[..., Any] | None]:
    """The call as it was compiled for this very plan before, by its level."""
    level = known.plan.level
    as_known = dataclasses.replace(plan, level=level, outputs=known.plan.outputs)
    same = level != "eager" and known.plan == as_known
    return {level: known.functions.get("compiled")} if same else {}
