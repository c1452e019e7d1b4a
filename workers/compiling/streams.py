"""Draws from TensorFlow's global generator, as functions of a key.

    samples + tf.random.normal(samples.shape)       noise, as people write it

What a call draws so is of no seed that a compiled call could be given: XLA has a generator of its
own. Within a ``Stream`` the n-th draw of a call is a stateless one, of the stream's key and n; so
the same key gives the same draws, compiled or not, in a forward pass and in its repeat.

Owns which draws are taken over: normal, truncated and uniform ones without a seed of their own, in
the code of the call itself. Within a loop or function of TensorFlow, which is traced once and run
again and again, they are left alone, and so are all others.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import random_seed
from tensorflow.python.ops import gen_random_ops

from workers.context import during
from workers.errors import UntraceableError
from workers.tensors import graph_of_now

_within: ContextVar[Stream | None] = ContextVar("within", default=None)
_constant: ContextVar[bool] = ContextVar("constant", default=False)

#: What was drawn outside of streams.
_noticed: ContextVar[list[str] | None] = ContextVar("noticed", default=None)

#: Within a call for one row that is to be vectorised: makes the place of a row's draw.
Maker = Callable[[list[int], Any, Callable[..., tf.Tensor]], tf.Tensor]
_row_of: ContextVar[Maker | None] = ContextVar("row_of", default=None)

#: Whether that call is the body of a loop, or a branch, in graphs of their own.
_nested: ContextVar[bool] = ContextVar("nested", default=False)

_asked = threading.local()


class Stream:
    """The draws of calls, one call at a time.

    ``taken`` counts those that were taken over since ``seed``, ``numbers`` the numbers in them.
    """

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            self._key = tf.Variable(np.zeros(2, np.int32), trainable=False, name="key_of_draws")
        self._graph: Any = None
        self._number = 0
        self.taken = self.numbers = 0

    def seed(self, seed: Any) -> None:
        """Have the next call draw from this key: two int32, or one number."""
        if isinstance(seed, int):
            seed = tf.constant([seed, 0], tf.int32)
        self._key.assign(seed)
        self.taken = self.numbers = 0

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """What is called, or traced, within this draws from the beginning of the stream."""
        _install()
        before = self._graph, self._number
        self._graph, self._number = graph_of_now(), 0
        token = _within.set(self)
        try:
            yield
        finally:
            _within.reset(token)
            self._graph, self._number = before

    def draw(self, shape: Any, dtype: Any, made: Callable[..., tf.Tensor], fixed: Any) -> Any:
        """The next draw, ``made(shape, seed=)``; None if it is not to be taken over."""
        if graph_of_now() is not self._graph and not _nested.get():
            return None
        self.taken += 1
        static = tf.get_static_value(shape)
        self.numbers += 0 if static is None else int(np.prod(static))
        if _constant.get():
            return tf.fill(shape, tf.cast(fixed, dtype))
        seed = self._key + np.asarray([0, self._number], np.int32)
        self._number += 1
        row_of = _row_of.get()
        if row_of is None:
            return made(shape, seed=seed)
        if static is None:
            raise UntraceableError("a draw of a shape that is not known cannot be vectorised")
        return row_of([int(n) for n in static], dtype, functools.partial(made, seed=seed))


def constant() -> AbstractContextManager[Any]:
    """What is taken over within this is a constant in the place of each draw: two forms of a call
    that draw in another order can be compared so."""
    return during(_constant, True)


@contextlib.contextmanager
def of_rows(maker: Maker, *, nested_from: int | None = None) -> Iterator[None]:
    """A call for one row is traced within this, to be vectorised. ``maker`` is given a draw's
    shape, its dtype, and how it is made of a shape, and returns what stands for it.

    ``nested_from``: it is traced in graphs of its own, perhaps again, from this ``position`` on.
    """
    stream = _within.get()
    if stream is not None and nested_from is not None:
        stream._number = nested_from
    with during(_row_of, maker), during(_nested, nested_from is not None):
        yield


@contextlib.contextmanager
def noticing() -> Iterator[list[str]]:
    """The operations, of those that a stream would take over, that are called within this."""
    _install()
    noticed: list[str] = []
    with during(_noticed, noticed):
        yield noticed


def _notice(name: str) -> None:
    noticed = _noticed.get()
    if noticed is not None and getattr(_asked, "seed", None) is None:
        noticed.append(name)


def position() -> int:
    """How many draws there have been in the call that is being traced."""
    stream = _within.get()
    return 0 if stream is None else stream._number


@functools.cache
def _install() -> None:
    """Have TensorFlow's operations ask first; outside of a stream they are as they were."""
    asked = random_seed.get_seed

    def get_seed(op_seed: Any) -> Any:
        _asked.seed = op_seed
        return asked(op_seed)

    random_seed.get_seed = get_seed
    for name, made, fixed in (
        ("random_standard_normal", tf.random.stateless_normal, 0.5),
        ("truncated_normal", tf.random.stateless_truncated_normal, 0.5),
        ("random_uniform", tf.random.stateless_uniform, 0.25),
    ):
        _take_over(name, functools.partial(made, alg="philox"), fixed)
    whole = gen_random_ops.random_uniform_int

    def random_uniform_int(shape: Any, minval: Any, maxval: Any, *args: Any, **kwargs: Any) -> Any:
        stream = _within.get()
        if stream is None or getattr(_asked, "seed", None) is not None:
            _notice("random_uniform_int")
            return whole(shape, minval, maxval, *args, **kwargs)
        dtype = tf.convert_to_tensor(minval).dtype
        made = functools.partial(
            tf.random.stateless_uniform, minval=minval, maxval=maxval, dtype=dtype, alg="philox"
        )
        found = stream.draw(shape, dtype, made, minval)
        return whole(shape, minval, maxval, *args, **kwargs) if found is None else found

    gen_random_ops.random_uniform_int = random_uniform_int


def _take_over(name: str, made: Callable[..., tf.Tensor], fixed: float) -> None:
    original = getattr(gen_random_ops, name)

    def draw(shape: Any, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        stream = _within.get()
        found = None
        if stream is not None and getattr(_asked, "seed", None) is None:
            found = stream.draw(shape, dtype, functools.partial(made, dtype=dtype), fixed)
        if stream is None:
            _notice(name)
        return original(shape, dtype, *args, **kwargs) if found is None else found

    setattr(gen_random_ops, name, draw)
