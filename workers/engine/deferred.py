"""Strawberry Fields' circuit of a backend, whose gates wait until the state is wanted.

Owns what has been asked of the state and not been done yet, and what its batch is. Whatever is not
a gate, a preparation or a measurement of a known outcome (deletion and addition of modes,
measurements that draw) is Strawberry Fields' own code, run on the state so far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import numpy as np
import tensorflow as tf
from strawberryfields.backends.tfbackend import ops
from strawberryfields.backends.tfbackend.circuit import Circuit as SFCircuit

from workers.context import during
from workers.engine import circuit, gates, plan, projections
from workers.tensors import origin

#: Told of a batch that an engine was not made for, which then refuses it, as Strawberry Fields' own
#: does; None where it takes any.
_refusing: ContextVar[Callable[[], None] | None] = ContextVar("refusing", default=None)


def refusing_batches(told: Callable[[], None] | None) -> AbstractContextManager[Any]:
    """Within, what was made without a ``batch_size`` refuses arguments of gates that have a batch,
    and ``told`` is called before that."""
    return during(_refusing, told)


class TracedCircuit(SFCircuit):
    """Strawberry Fields' ``Circuit`` whose gates wait in a list until the state is wanted."""

    _base: tf.Tensor | None
    _gates: list[plan.Gate]
    _parameters: list[tf.Tensor]
    _flags: list[bool]
    _num_modes: int
    _batched: bool
    _batch_size: Any  #: None, a number, or a scalar tensor where a graph does not know it yet

    # -- Strawberry Fields' attributes, computed when they are wanted ------------------------

    @property
    def _state(self) -> tf.Tensor:
        """The state after all gates so far: ([batch,] D, ..., D), mixed ones with 2 N axes."""
        if self._gates or self._base is None:
            self._base = self._run()
            self._gates, self._parameters, self._flags = [], [], []
        if self._batched and len(self._base.shape) == self._axes:
            shape = [self._batch_size, *self._base.shape]
            self._base = tf.broadcast_to(self._base[None], shape)
        return self._base

    @_state.setter
    def _state(self, state: tf.Tensor) -> None:
        self._base = state

    def _update_state(self, new_state: tf.Tensor) -> None:
        self._gates, self._parameters, self._flags = [], [], []
        self._base = new_state

    def _replace_and_update(self, replacement: tf.Tensor, modes: Any) -> None:
        """Of all modes in their order nothing is left, and nothing has to be computed."""
        replaced = [modes] if isinstance(modes, int) else list(modes)
        if replaced != [*range(self._num_modes)]:
            super()._replace_and_update(replacement, modes)
            return
        self._update_state(replacement)
        self._state_is_pure = len(replacement.shape) - self._batched == self._num_modes

    @property
    def untouched(self) -> bool:
        """Whether nothing has been done to the vacuum yet."""
        return self._base is None and not self._gates

    def adopt(self, state: tf.Tensor) -> None:
        """Take over a state computed elsewhere: (batch, D, ...), a ket or a density matrix."""
        self._state_is_pure = len(state.shape) == 1 + self._num_modes
        size = state.shape[0]
        self._batched, self._batch_size = True, tf.shape(state)[0] if size is None else size
        self._update_state(state)

    @property
    def _axes(self) -> int:
        return self._num_modes * (1 if self._state_is_pure else 2)

    @property
    def _single_mode_pure_vac(self) -> tf.Tensor:
        return self._for_batch(tf.one_hot(0, self._cutoff_dim, dtype=self._dtype))

    @property
    def _single_mode_mixed_vac(self) -> tf.Tensor:
        vacuum = tf.one_hot(0, self._cutoff_dim**2, dtype=self._dtype)
        return self._for_batch(tf.reshape(vacuum, [self._cutoff_dim] * 2))

    def reset(self, **kwargs: Any) -> None:
        """See ``Circuit.reset``."""
        pure = kwargs.get("pure", getattr(self, "_state_is_pure", True))
        modes = kwargs.get("num_subsystems", getattr(self, "_num_modes", 1))
        cutoff = kwargs.get("cutoff_dim", getattr(self, "_cutoff_dim", 1))
        dtype = kwargs.get("dtype", getattr(self, "_dtype", tf.complex64))
        if not isinstance(modes, int):
            raise ValueError(f"Argument 'num_subsystems' must be a positive integer, not {modes!r}")
        if not isinstance(cutoff, int) or cutoff < 1:
            raise ValueError(f"Argument 'cutoff_dim' must be a positive integer, not {cutoff!r}")
        if not isinstance(pure, bool):
            raise ValueError(f"Argument 'pure' must be either True or False, not {pure!r}")
        if dtype not in (tf.complex64, tf.complex128):
            raise ValueError(f"Argument 'dtype' must be a complex Tensorflow DType, not {dtype!r}")
        if "batch_size" in kwargs:
            batch = kwargs["batch_size"]
            if batch is not None and (not isinstance(batch, int) or batch < 1):
                raise ValueError(
                    f"Argument 'batch_size' must be None or a positive integer, not {batch!r}"
                )
            self._asked_batch = batch
        if "num_subsystems" in kwargs:  # a new circuit; a measurement of all modes keeps its batch
            self._batch_size = self._asked_batch
        self._state_is_pure, self._num_modes, self._cutoff_dim = pure, modes, cutoff
        self._dtype = tf.as_dtype(dtype)
        self._batched = self._batch_size is not None
        self._cache: dict[str, Any] = {}
        self._base = None
        self._gates = []
        self._parameters = []
        self._flags = []

    # -- gates: collected ------------------------------------------------------------------

    def phase_shift(self, theta: Any, mode: int) -> None:
        """exp(i theta n)."""
        self._add("rotation", [theta], mode)

    def displacement(self, r: Any, phi: Any, mode: int) -> None:
        """D(r exp(i phi))."""
        self._add("displacement", [r, phi], mode)

    def squeeze(self, r: Any, theta: Any, mode: int) -> None:
        """S(r exp(i theta))."""
        self._add("squeezing", [r, theta], mode)

    def kerr_interaction(self, kappa: Any, mode: int) -> None:
        """exp(i kappa n^2)."""
        self._add("kerr", [kappa], mode)

    def cubic_phase(self, gamma: Any, mode: int) -> None:
        """exp(i gamma x^3 / 6)."""
        self._add("cubic_phase", [gamma], mode)

    def beamsplitter(self, theta: Any, phi: Any, mode1: int, mode2: int) -> None:
        """exp(theta (exp(i phi) a b^dagger - h.c.))."""
        self._add("beamsplitter", [theta, phi], mode1, mode2)

    def mzgate(self, phi_in: Any, phi_ex: Any, mode1: int, mode2: int) -> None:
        """BS(pi/4, pi/2) R(phi_in) BS(pi/4, pi/2) R(phi_ex), the rotations on ``mode1``."""
        self._add("mach_zehnder", [phi_in, phi_ex], mode1, mode2)

    def two_mode_squeeze(self, r: Any, phi: Any, mode1: int, mode2: int) -> None:
        """exp(r (exp(i phi) a^dagger b^dagger - h.c.))."""
        self._add("two_mode_squeezing", [r, phi], mode1, mode2)

    def cross_kerr_interaction(self, kappa: Any, mode1: int, mode2: int) -> None:
        """exp(i kappa n1 n2)."""
        self._add("cross_kerr", [kappa], mode1, mode2)

    def loss(self, T: Any, mode: int) -> None:
        """The loss channel; the state is mixed from here on."""
        value = self._parameter(T, "T")
        if self._state_is_pure:
            mixed = ops.mix(self._state, self._batched)
            self._state_is_pure = False
            self._update_state(mixed)
        self._take("loss", [value], (2 * mode, 2 * mode + 1), conjugate=False)

    def gaussian_gate(self, S: Any, d: Any, modes: Sequence[int]) -> None:
        """Strawberry Fields' own, on the state so far. It looks at ``S`` in NumPy: in a graph, the
        gate is made before it, of numbers."""
        if len(d.shape) == 2:
            self._join_batch(tf.convert_to_tensor(d).shape[0], "d")
        batched, size = self._batched, self._batch_size
        if tf.executing_eagerly():
            if batched and len(d.shape) == 1:
                S, d = (tf.broadcast_to(x, [size, *x.shape]) for x in (S, d))
            super().gaussian_gate(S, d, modes)
            self._batched, self._batch_size = batched, size
            return
        with tf.init_scope():
            alone = SFCircuit(len(modes), self._cutoff_dim, True, None, self._dtype)
            alone.gaussian_gate(S, d, list(range(len(modes))))  # which refuses what is no such gate
            of_samples = len(d.shape) == 2
            matrix = ops.gaussian_gate_matrix(S, d, self._cutoff_dim, of_samples, self._dtype)
        if batched and not of_samples:
            matrix = self._for_batch(matrix)
        state = ops.n_mode_gate(matrix, modes, self._state, self._state_is_pure, batched)
        self._update_state(state)

    def _add(self, name: str, parameters: Sequence[Any], *modes: int) -> None:
        if len(modes) == 1 and not (isinstance(modes[0], int) and 0 <= modes[0] < self._num_modes):
            raise ValueError("'mode' argument is not compatible with number of in_modes")
        if len(modes) == 2 and (modes[0] == modes[1] or max(modes) >= self._num_modes):
            raise ValueError("One or more mode numbers are incompatible")
        kind = plan.KINDS[name]
        values = [self._parameter(p, n) for p, n in zip(parameters, kind.parameters, strict=True)]
        if self._state_is_pure:
            self._take(name, values, modes, conjugate=False)
        else:
            self._take(name, values, tuple(2 * mode for mode in modes), conjugate=False)
            self._take(name, values, tuple(2 * mode + 1 for mode in modes), conjugate=True)

    def _take(
        self, name: str, values: Sequence[tf.Tensor], axes: tuple[int, ...], *, conjugate: bool
    ) -> None:
        places = []
        for value in values:
            known = [n for n, other in enumerate(self._parameters) if other is value]
            if not known:
                self._parameters.append(value)
                self._flags.append(len(value.shape) == 1)
            places.append(known[0] if known else len(self._parameters) - 1)
        self._gates.append(plan.Gate(name, axes, tuple(places), conjugate))

    def _run(self) -> tf.Tensor:
        prepared = self._base is not None
        # In the order in which a graph took them from an array, XLA takes them all at once.
        order = sorted(range(len(self._parameters)), key=lambda n: origin(self._parameters[n]))
        places = {n: place for place, n in enumerate(order)}
        gates = [
            dataclasses.replace(gate, parameters=tuple(places[n] for n in gate.parameters))
            for gate in self._gates
        ]
        what = plan.Circuit(
            self._axes,
            self._cutoff_dim,
            self._dtype.name,
            tuple(gates),
            tuple(self._flags[n] for n in order),
            prepared,
            self._base is not None and len(self._base.shape) > self._axes,
        )
        return circuit.run(what, [self._parameters[n] for n in order], self._base)

    # -- preparations ------------------------------------------------------------------------

    def prepare_coherent_state(self, r: Any, phi: Any, mode: int) -> None:
        """Replace a mode by D(r exp(i phi)) |0>."""
        self._prepare([r, phi, 0.0, 0.0], ["r", "phi", "r", "phi"], mode)

    def prepare_squeezed_state(self, r: Any, theta: Any, mode: int) -> None:
        """Replace a mode by S(r exp(i theta)) |0>."""
        self._prepare([0.0, 0.0, r, theta], ["r", "phi", "r", "phi"], mode)

    def prepare_displaced_squeezed_state(
        self, r_d: Any, phi_d: Any, r_s: Any, phi_s: Any, mode: int
    ) -> None:
        """Replace a mode by D(r_d exp(i phi_d)) S(r_s exp(i phi_s)) |0>."""
        self._prepare([r_d, phi_d, r_s, phi_s], ["r_d", "phi_d", "r_s", "phi_s"], mode)

    def _prepare(self, parameters: list[Any], names: list[str], mode: int) -> None:
        """Strawberry Fields' formula has no derivative at r_s = 0, and other ones under XLA."""
        if self._valid_modes(mode):
            values = [self._parameter(p, n) for p, n in zip(parameters, names, strict=True)]
            values = [tf.cast(value, gates.FLOAT) for value in values]
            if self._batched:
                values = [tf.broadcast_to(value, [self._batch_size]) for value in values]
            r_d, phi_d, r_s, phi_s = values
            ket = gates.displaced_squeezed_vacuum(r_d, phi_d, r_s, phi_s, self._cutoff_dim)
            ket = tf.cast(ket, self._dtype)
            self._replace_and_update(
                ket if self._state_is_pure else ops.mix(ket, self._batched), mode
            )

    def prepare_multimode(self, state: Any, modes: Any, input_state_is_pure: bool = False) -> None:
        """See ``Circuit.prepare_multimode``. What ``state`` is, follows from its shape, as in
        Strawberry Fields: one state, which all samples share, or one for each sample; a ket or a
        density matrix, as a tensor or flat.

        ``input_state_is_pure`` says how to take what could be either: a square array of D^n rows
        is a density matrix, unless kets are expected and the batch is of that size.
        """
        if not self._valid_modes(modes):
            return
        modes = [modes] if isinstance(modes, int) else list(modes)
        count, size = len(modes), self._cutoff_dim ** len(modes)
        shape = tuple(state.shape)
        square = shape == (size, size)
        forms = {
            "density matrix": [(size, size), (self._cutoff_dim,) * (2 * count)],
            "ket": [(size,), (self._cutoff_dim,) * count],
        }
        found = [
            (kind, batched)
            for kind, tails in forms.items()
            for batched in (False, True)
            if shape[batched:] in tails and len(shape) > batched
        ]
        if square and input_state_is_pure and self._batch_size == size:
            found = [("ket", True)]
        if not found:
            expected = [tail for tails in forms.values() for tail in tails]
            raise ValueError(
                f"a state of shape {shape} for {count} modes, cutoff {self._cutoff_dim}: expected "
                f"one of {sorted(set(expected))}, or one of these with a batch axis before it"
            )
        kind, batched = found[0]
        if batched:
            self._join_batch(shape[0] or tf.shape(state)[0], "state")
        axes = (self._cutoff_dim,) * (count if kind == "ket" else 2 * count)
        value = tf.cast(tf.convert_to_tensor(state), self._dtype)
        value = tf.reshape(value, [-1, *axes] if batched else axes)
        self._replace_and_update(value if batched else self._for_batch(value), modes)

    # -- post-selection ----------------------------------------------------------------------

    def measure_fock(self, modes: Any, select: Any = None, **kwargs: Any) -> Any:
        """See ``Circuit.measure_fock``. ``select``: (modes,) or (batch, modes), of integers."""
        modes = [modes] if isinstance(modes, int) else [int(mode) for mode in modes]
        if select is None:
            return super().measure_fock(modes, None, **kwargs)
        if not modes or modes != sorted(set(modes)):
            raise ValueError(f"modes must be increasing, each once; came {modes}")
        numbers = tf.cast(tf.convert_to_tensor(select), tf.int64)
        numbers = tf.reshape(numbers, [1]) if not numbers.shape.rank else numbers
        if numbers.shape.rank > 2 or numbers.shape[-1] != len(modes):
            raise ValueError(
                f"'select' has shape {tuple(numbers.shape)}: expected a photon number for each of "
                f"{len(modes)} modes, or (batch, {len(modes)})"
            )
        if numbers.shape.rank == 2:
            self._join_batch(numbers.shape[0] or tf.shape(numbers)[0], "select")
        vectors = projections.number_state(numbers, self._cutoff_dim, self._dtype)
        self._project(modes, tf.unstack(vectors, axis=-2))
        if not self._batched:
            return numbers[None]
        rows = tf.broadcast_to(numbers, [self._batch_size, len(modes)])
        return tf.cast(rows, tf.int32)[:, None]

    def measure_homodyne(self, phi: Any, mode: int, select: Any = None, **kwargs: Any) -> Any:
        """See ``Circuit.measure_homodyne``. ``phi`` and ``select`` are scalars or (batch,)."""
        if select is None:
            return super().measure_homodyne(phi, mode, None, **kwargs)
        if not self._valid_modes(mode):
            raise ValueError("Specified modes are not valid.")
        angle, value = self._parameter(phi, "phi"), self._parameter(select, "select")
        ket = projections.quadrature_state(
            angle, value, self._cutoff_dim, self._dtype, float(self._hbar)
        )
        self._project([mode], [ket])
        value = tf.cast(value, tf.float64)
        if self._batched:
            return tf.broadcast_to(value, [self._batch_size])[:, None, None]
        return tf.cast(value, self._dtype)[None, None]

    def draw_numbers(self, modes: list[int]) -> tf.Tensor:
        """See ``TracedTFBackend.draw_numbers``."""
        batch, pure = self._batch_size if self._batched else 1, self._state_is_pure
        drawn = projections.draw_numbers(self._states, modes, batch, pure=pure)
        return drawn if self._batched else drawn[0]

    def draw_quadrature(self, phi: Any, mode: int) -> tf.Tensor:
        """See ``TracedTFBackend.draw_quadrature``."""
        angle, states = self._parameter(phi, "phi"), self._states
        batch, pure = self._batch_size if self._batched else 1, self._state_is_pure
        hbar = float(self._hbar)
        drawn = projections.draw_quadrature(states, mode, angle, batch, hbar, pure=pure)
        return drawn if self._batched else drawn[0]

    def _project(self, modes: list[int], vectors: list[tf.Tensor]) -> None:
        if len(modes) == self._num_modes:
            self.reset(pure=self._state_is_pure)
            return
        found = projections.project(self._states, vectors, modes, pure=self._state_is_pure)
        self._update_state(found if self._batched else found[0])

    @property
    def _states(self) -> tf.Tensor:
        """The state, with a batch axis."""
        return self._state if self._batched else self._state[None]

    # -- batches ---------------------------------------------------------------------------

    def _parameter(self, value: Any, name: str) -> tf.Tensor:
        """A gate's argument as a real tensor, a scalar or (batch,)."""
        value = tf.convert_to_tensor(value)
        if value.dtype.is_complex:
            if not tf.executing_eagerly():
                raise ValueError(
                    f"{name} is complex ({value.dtype.name}); expected a real number. Inside a "
                    "tf.function its imaginary part cannot be looked at: pass tf.math.real(...)"
                )
            if np.any(np.imag(value) != 0):
                raise ValueError(f"{name} cannot be complex; expected a real number")
            value = tf.math.real(value)
        if len(value.shape) > 1:
            raise ValueError(
                f"{name} can be either a scalar or a vector with one entry a sample, not of shape "
                f"{tuple(value.shape)}"
            )
        if len(value.shape) == 1:
            size = value.shape[0]
            told = _refusing.get()
            if told is not None and self._asked_batch is None:
                told()
                raise ValueError(
                    f"{name} has a batch, of shape {tuple(value.shape)}, and the engine has none: "
                    "expected a scalar, or batch_size among the engine's backend_options"
                )
            self._join_batch(tf.shape(value)[0] if size is None else size, name)
        return value

    def _join_batch(self, size: Any, name: str) -> None:
        known = self._batch_size
        if known is None:
            self._batch_size, self._batched = size, True
        elif isinstance(known, int) and isinstance(size, int) and known != size:
            raise ValueError(
                f"{name} can be either a scalar or a vector of length {known}, the batch size so "
                f"far, not of length {size}"
            )
        elif not isinstance(known, int) and isinstance(size, int):
            self._batch_size = size

    def _for_batch(self, state: tf.Tensor) -> tf.Tensor:
        if not self._batched:
            return state
        return tf.broadcast_to(state[None], [self._batch_size, *state.shape])

    def _maybe_batch(self, param: Any, convert_to_tensor: bool = True) -> Any:
        """Strawberry Fields' hook: an argument, with a batch axis if the state has one."""
        if not convert_to_tensor:  # photon numbers, in NumPy
            n = np.asarray(param)
            if n.ndim == 1:
                self._join_batch(len(n), "n")
            if n.ndim > 1:
                raise ValueError(f"n can be a scalar or a vector, not of shape {n.shape}")
            return np.broadcast_to(n, (self._batch_size,)) if self._batched else n
        value = tf.convert_to_tensor(param)
        if len(value.shape) > 1:
            raise ValueError(
                "Parameter can be either a scalar or a vector with one entry a sample, not of "
                f"shape {tuple(value.shape)}"
            )
        if len(value.shape) == 1:
            size = value.shape[0]
            self._join_batch(tf.shape(value)[0] if size is None else size, "Parameter")
            return value
        return tf.broadcast_to(value, [self._batch_size]) if self._batched else value
