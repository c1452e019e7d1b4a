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

import tensorflow as tf

from workers.compiling import compiled
from workers.compiling.streams import Stream
from workers.engine.scope import traced_engines
from workers.errors import ConfigurationError, GradientError
from workers.exchange.protocol import Build, Frame, Kind, Plan, Probe, Probed
from workers.layout import Buffer
from workers.replica import serialization
from workers.replica.calls import Calls
from workers.replica.classes import Classes
from workers.replica.draws import Draws
from workers.replica.method import Method
from workers.replica.prober import Prober
from workers.replica.recorded import Recorded
from workers.replica.tile import Tile
from workers.replica.weights import Weights
from workers.tensors import leaves

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
        method = self._plans[plan]
        tile = Tile.of(method.plan, frame, index, buffer)
        if kind is Kind.BOTH:
            self._begin(tile, call)
            outputs, gradients = self._both(method, tile)
            tile.write_outputs(outputs)
            tile.write_sums(gradients)
        elif kind.makes_outputs:
            keep = kind is Kind.FORWARD_KEEPING and method.plan.level == "eager"
            tile.write_outputs(self._forward(method, tile, call, keep))
        else:
            lost = tile.write_gradients(self._pulled_back(method, tile, call, kind))
            if lost:
                names = [self._source_name(source, len(frame.inputs)) for source in lost]
                raise GradientError(
                    f"the gradient for {', '.join(names)} appeared only now: expected none, as on "
                    "the first rows of the first call. Which sources an output depends on must not "
                    "depend on the data"
                )

    def rehearse(self, plan: int, frame: Frame, version: int, kind: Kind, buffer: Buffer) -> None:
        """Compute a tile as ``compute`` would, and keep nothing of it."""
        method = self._plans[plan]
        self.load(plan, version, buffer)
        self.weights.distrust()  # the coordinator may be writing the next ones: not to be relied on
        tile = Tile.of(method.plan, frame, 0, buffer)
        if kind is Kind.BOTH:
            self._both(method, tile)
        elif kind.makes_outputs:
            self._calls.run(method, tile.inputs(), buffer)
        elif method.plan.level == "eager":
            self._calls.record(method, tile.inputs(), buffer).gradients(None)
        elif kind is Kind.BACKWARD:
            self._calls.vjp(method, tile.inputs(), tile.seeds(), buffer)
        else:
            self._second(method, tile)

    # -- within ----------------------------------------------------------------------------

    def _begin(self, tile: Tile, call: int) -> None:
        """Seed the tile's draws: the same for a forward pass and its repeat."""
        if tile.plan.draws:
            self._draws.seed(call, tile.number, everywhere=tile.plan.level == "eager")

    def _forward(self, method: Method, tile: Tile, call: int, keep: bool) -> Sequence[Any]:
        """A tile's outputs; with ``keep``, hold on to its tape."""
        self._begin(tile, call)
        if not keep:
            found = self._calls.run(method, tile.inputs(), tile.buffer)
            return [found] if isinstance(found, tf.Tensor) else leaves(found)
        kept = self._calls.record(method, tile.inputs(), tile.buffer)
        self._kept.setdefault(call, {})[tile.number] = kept
        while len(self._kept) > KEPT_CALLS:
            self._kept.popitem(last=False)
        return kept.outputs

    def _both(self, method: Method, tile: Tile) -> tuple[Sequence[Any], Sequence[Any]]:
        """Outputs, and their cotangents, which are known before, pulled back to the variables."""
        given, seeds = tile.seeds_given()
        return self._calls.both(method, tile.inputs(), given, seeds, tile.wanted, tile.buffer)

    def _pulled_back(self, method: Method, tile: Tile, call: int, kind: Kind) -> Sequence[Any]:
        """A tile's cotangents pulled back, by source; of a second derivative, those gradients' own
        (``frame.tangents``) through that, where those of the cotangents are written."""
        if method.plan.level == "eager":
            kept = self._kept.get(call, {}).pop(tile.number, None)
            if kept is None:
                kept = self._recompute(method, tile, call)
            wanted = {source for source, _ in tile.frame.input_gradients}
            return kept.gradients(tile.cotangents(), wanted)
        self._begin(tile, call)
        if kind is Kind.BACKWARD:
            return self._calls.vjp(method, tile.inputs(), tile.seeds(), tile.buffer)
        gradients, of_cotangents = self._second(method, tile)
        tile.write_gradients_of_cotangents(of_cotangents)
        return gradients

    def _second(self, method: Method, tile: Tile) -> tuple[list[Any], list[Any]]:
        tangents = tile.tangents(len(self._sources))
        return self._calls.second(method, tile.inputs(), tile.seeds(), tangents, tile.buffer)

    def _recompute(self, method: Method, tile: Tile, call: int) -> Recorded:
        if method.plan.draws and not method.plan.reproducible:
            raise GradientError(
                "the forward pass of this result is no longer kept, and it cannot be computed "
                "again: the model draws random numbers from a source that cannot be seeded. Take "
                "gradients before further calls, and once; or draw from TensorFlow, Keras or "
                "NumPy"
            )
        self.recomputed += 1
        self._begin(tile, call)
        return self._calls.record(method, tile.inputs(), tile.buffer)

    def _source_name(self, source: int, inputs: int) -> str:
        if source < inputs:
            return f"input {source}"
        return f"variable {self._sources[source - inputs].name!r}"
