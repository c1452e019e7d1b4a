"""``cpu_batch``: the compiled engine in this process, the whole batch at once, without a pool."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from qpool import notices
from qpool.bridge import symbolic
from qpool.executors.base import Executor, Options
from qpool.executors.in_place import choosing
from qpool.executors.in_place.compiled_calls import CompiledCall, CompiledCalls, as_it_is
from qpool.executors.in_place.effects import State
from qpool.shipping import engines_batch_size
from workers.compiling import compiled, streams, updates
from workers.engine import circuit
from workers.engine.scope import GOES_ON, reset_before
from workers.errors import ConfigurationError, InputError
from workers.process import affinity
from workers.tensors import within_xla

log = logging.getLogger("qpool")


#: What becomes of a call with a list of numbers.
_LISTED = compiled.Choice("eager", "its first argument is a list of numbers", 0.0)


class CpuBatchExecutor(Executor):
    """Calls the model here, with Strawberry Fields' engines traced and the call compiled.

    Gradients are TensorFlow's own, of any order. Variables that a call updates, and that no
    gradient is for, are updated. A model that changes others, draws from NumPy's sources or from a
    ``tf.random.Generator``, or has TensorFlow check numbers is not compiled, and neither is a call
    with a list of numbers for its first argument (the model would find tensors in it).

    From now on this process keeps the memory that it frees (``affinity.keep_memory``).
    """

    def __init__(self, model: Any, options: Options) -> None:
        super().__init__(model, options)
        if options.engine != "traced":
            raise ConfigurationError(
                f"strategy='cpu_batch' is the compiled engine; engine={options.engine!r} rules it "
                "out. Use strategy='sequential' for Strawberry Fields as it is"
            )
        affinity.keep_memory()
        self._compiled_calls = CompiledCalls(model, options.sharded)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._compiled_calls.lock:
            return self._call(method, args, kwargs)

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self.model if method == "__call__" else getattr(self.model, method)
        empty = bool(args) and getattr(args[0], "shape", (None,))[:1] == (0,)
        if within_xla() or empty:
            return as_it_is(function, args, kwargs)
        if _is_for_the_model_alone(args):
            with circuit.tally() as run, self._counted(args):
                found = as_it_is(function, args, kwargs)
            notices.not_compiled(self.model, method, _LISTED, run.runs, self.options)
            return found
        compiled_call, inputs = self._compiled_calls.find(method, function, args, kwargs)
        if compiled_call.choice is None:
            if tf.executing_eagerly():
                before = State(self.model, method)
                with (
                    circuit.untraced(),
                    circuit.tally() as run,
                    streams.noticing() as drawn,
                    updates.noticing() as assigned,
                    self._counted(args),
                ):
                    result = as_it_is(function, args, kwargs)
                compiled_call.ran, compiled_call.drew = run, bool(drawn)
                compiled_call.assigned = assigned
                self._choose(compiled_call, inputs, result, before)
                if not (record.could_possibly_record() and compiled_call.only_computes):
                    return result
                # What was compiled gives the gradients: the eager call's take longer than that.
                return self._compiled_calls.run(compiled_call, inputs)
            self._choose_by_draws(compiled_call, inputs)
        eagerly = tf.executing_eagerly()
        with self._counted(args) if eagerly else _of_known_size(inputs):
            if not compiled_call.is_compiled:
                return as_it_is(function, args, kwargs)
            return self._compiled_calls.run(compiled_call, inputs)

    @property
    def within_xla(self) -> bool:
        """Whether XLA has compiled every way in which the model has been called."""
        choices = [compiled_call.choice for compiled_call in self._compiled_calls.known]
        return bool(choices) and all(choice and choice.level == "xla" for choice in choices)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        from qpool.bridge.losses import of_each_sample

        return of_each_sample(self.model, self.call, z, cotangent)

    def stats(self) -> dict[str, Any]:
        return {
            "strategy": "cpu_batch",
            **self._rate(),
            "compiled": [compiled_call.as_dict() for compiled_call in self._compiled_calls.decided],
        }

    def _choose(
        self,
        compiled_call: CompiledCall,
        inputs: list[tf.Tensor],
        result: Any,
        before: State,
    ) -> None:
        run = compiled_call.ran
        kept, updated = before.kept(), before.updated(compiled_call.assigned)
        reason = before.what_changed(updated)
        compiled_call.seeded = before.drew(updated)
        anew = compiled_call.reset_before and not run.went_on
        again = before.again([] if reason else updated)
        with reset_before(anew), again, before.other_numbers():
            compiled_call.choice = choosing.choose(
                compiled_call, self.model, inputs, result, reason, kept=kept, updated=updated
            )
        # Of those that a call makes nothing stays.
        compiled_call.runs = [weakref.ref(engine) for engine in dict.fromkeys(run.engines)]
        run.engines.clear()
        if anew:
            compiled_call.engines = run.began
            for engine in run.began:  # by the call, before it was traced
                engine.has_run()
        elif GOES_ON in compiled_call.choice.reason and not compiled_call.reset_before:
            # Whoever calls may reset it before each call: that is seen with the next one.
            compiled_call.reset_before, compiled_call.choice = True, None
            return
        method = compiled_call.method.plan.method
        notices.not_compiled(self.model, method, compiled_call.choice, run.runs, self.options)
        notices.caught(self.model, method, next(iter(run.failures), ""), self.options)
        if compiled_call.choice.level != "eager":
            lost = [each.name for each in compiled_call.lost]
            notices.not_set(self.model, method, lost, self.options)

    def _choose_by_draws(self, compiled_call: CompiledCall, inputs: list[tf.Tensor]) -> None:
        """By what draws in the place of a graph's inputs show, where they can be had."""
        if not all(
            x.dtype.is_floating and x.shape.rank is not None and x.shape[1:].is_fully_defined()
            for x in inputs
        ):
            return
        rows = engines_batch_size(self.model) or 2
        compiled_call.alike = ()  # of other counts of rows than these draws have
        with tf.init_scope():
            draws = [
                tf.constant(
                    symbolic.stand_in(
                        [rows if sharded or size is None else size for size in x.shape[:1]]
                        + x.shape[1:].as_list(),
                        x.dtype.as_numpy_dtype,
                        seed=n,
                    )
                )
                for n, (x, sharded) in enumerate(zip(inputs, compiled_call.sharded, strict=True))
            ]
            before = State(self.model, compiled_call.method.plan.method)
            compiled_call.reset_before = True  # by the loop that the graph's caller is in
            try:
                with (
                    circuit.untraced(),
                    circuit.tally() as run,
                    updates.noticing() as assigned,
                ):
                    found = compiled_call.method(*draws)
                compiled_call.ran, compiled_call.assigned = run, assigned
                self._choose(compiled_call, draws, found, before)
                compiled_call.rows = inputs[0].shape[0] if inputs[0].shape.rank else 0
            except Exception as error:  # the model's own, of draws that it does not take
                log.info("it is traced as it is, not compiled: on normal draws %r", error)
            finally:
                before.put_back()
                if not compiled_call.is_compiled:
                    for engine in run.began:  # by the draws, before the graph is traced
                        engine.reset()


@contextlib.contextmanager
def _of_known_size(inputs: list[tf.Tensor]) -> Iterator[None]:
    """Where a model that asks for the size of a batch fails in a graph that has none, say so."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if tf.executing_eagerly() or not inputs or inputs[0].shape[:1] != [None]:
            raise
        raise InputError(
            f"the model cannot be traced for a batch of unknown size ({error}), which this graph "
            "has: give it a size (drop_remainder=True, input_signature=), or have the graph run "
            "eagerly (run_eagerly=True), or use strategy='processes', which asks for none"
        ) from error


def _is_for_the_model_alone(args: tuple[Any, ...]) -> bool:
    """Whether a compiled call would be given something else than the model is: tensors for a list
    of numbers."""
    listed = bool(args) and isinstance(args[0], list | tuple | dict)
    return listed and not all(map(tf.is_tensor, tf.nest.flatten(args[0])))
