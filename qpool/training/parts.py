"""The part of a training step that XLA compiles by itself, where a pooled call comes before it.

Owns whether it can be compiled, found out once. What it computes is ``gan``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from workers.compiling import compile_cache
from workers.tensors import within_xla

log = logging.getLogger("qpool")


class Part:
    """A function of tensors, compiled within a graph; called as it is eagerly, within XLA, and
    where XLA does not know an operation of it.

    ``sure`` says that XLA knows all of it, which else is tried: that traces it once more.
    """

    def __init__(self, function: Callable[..., Any], *, sure: bool) -> None:
        self._function = function
        self._compiled = self._made()
        self._known: bool | None = True if sure else None

    def __call__(self, *args: Any) -> Any:
        if tf.executing_eagerly() or within_xla():
            return self._function(*args)
        if self._known is None:
            self._known = self._can_be_compiled(args)
        return (self._compiled if self._known else self._function)(*args)

    def _made(self) -> Any:
        return tf.function(compile_cache.named_lastingly(self._function), jit_compile=True)

    def _can_be_compiled(self, args: tuple[Any, ...]) -> bool:
        """Whether XLA lowers it, for arguments of these shapes."""
        with tf.init_scope():
            try:
                zeros = tf.nest.map_structure(
                    lambda x: None if x is None else tf.zeros(x.shape, x.dtype), args
                )
                self._made().experimental_get_compiler_ir(*zeros)(stage="hlo")
            except Exception as error:  # whatever it is that XLA cannot do
                log.info("%s is not compiled: %s", self._function.__name__, error)
                return False
        return True
