"""From a list of gates to the matrices that are needed: neighbours fused, phases folded in. Pure.

Phases that differ from sample to sample are not folded into a matrix that does not: each sample
would have a matrix of its own. They are steps by themselves, which turn the amplitudes.

Owns what each gate is made of (``KINDS``) and which gates become one matrix. Sees axes of a tensor,
each of size D, and positions in a list of parameters: no numbers, no TensorFlow.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from workers.engine import gates

if TYPE_CHECKING:
    import tensorflow as tf

    from workers.engine.gates import Complex


@dataclass(frozen=True)
class Kind:
    """A gate: its core and its phases, each a factor times a polynomial of the photon numbers.

    ``phase`` names the parameter that the phases are linear in. ``before`` and ``after`` give
    their factor for each term of ``TERMS``.
    """

    parameters: tuple[str, ...]
    modes: int = 1
    core: Callable[[tf.Tensor, int], tf.Tensor | Complex] | None = None
    vacuum: Callable[[tf.Tensor, int], tf.Tensor] | None = None
    phase: int = 1
    before: tuple[tuple[str, float], ...] = ()
    after: tuple[tuple[str, float], ...] = ()
    keeps: str = "sum"


#: Gates that are fused at most on an axis that meets no other.
_FUSED = 4

#: Phases are polynomials in the photon numbers of the first and the second mode.
TERMS = ("n0", "n0^2", "n1", "n1^2", "n0 n1")

#: One gate, one row. A pair's core keeps the sum or the difference of its photon numbers.
KINDS = {
    "rotation": Kind(("phi",), phase=0, after=(("n0", 1),)),
    "kerr": Kind(("kappa",), phase=0, after=(("n0^2", 1),)),
    "displacement": Kind(
        ("r", "phi"),
        core=gates.displacement,
        vacuum=gates.displaced_vacuum,
        before=(("n0", -1),),
        after=(("n0", 1),),
    ),
    "squeezing": Kind(
        ("r", "phi"),
        core=gates.squeezing,
        vacuum=gates.squeezed_vacuum,
        before=(("n0", -0.5),),
        after=(("n0", 0.5),),
    ),
    "cubic_phase": Kind(("gamma",), core=gates.cubic_phase),
    "cross_kerr": Kind(("kappa",), modes=2, phase=0, after=(("n0 n1", 1),)),
    "beamsplitter": Kind(
        ("theta", "phi"),
        modes=2,
        core=gates.beamsplitter,
        before=(("n0", 1),),
        after=(("n0", -1),),
    ),
    "mach_zehnder": Kind(
        ("phi_in", "phi_ex"), modes=2, core=gates.mach_zehnder, before=(("n0", 1),)
    ),
    "two_mode_squeezing": Kind(
        ("r", "phi"),
        modes=2,
        core=gates.two_mode_squeezing,
        before=(("n0", -1),),
        after=(("n0", 1),),
        keeps="difference",
    ),
    "loss": Kind(("T",), modes=2, core=gates.loss, keeps="difference"),
}


@dataclass(frozen=True)
class Gate:
    """A gate on axes of the state. ``parameters`` are positions in the list of all parameters."""

    kind: str
    axes: tuple[int, ...]
    parameters: tuple[int, ...]
    conjugate: bool = False


@dataclass(frozen=True)
class Circuit:
    """What is known before any number is: the key under which a compiled circuit is kept.

    Attributes:
        axes: number of axes of the state.
        cutoff: their size D.
        dtype: of the state, "complex64" or "complex128".
        gates: in the order of their application.
        batched: for each parameter, whether it has a batch axis.
        prepared: whether it starts from a given state rather than from the vacuum.
        batched_state: whether that state has a batch axis.
    """

    axes: int
    cutoff: int
    dtype: str
    gates: tuple[Gate, ...]
    batched: tuple[bool, ...]
    prepared: bool = False
    batched_state: bool = False


_Term = tuple[str, int, float]

#: A phase: for each term of TERMS the parameters it is linear in, as (position, factor).
Angle = tuple[_Term, ...]


#: What steps have in common whose matrices have one shape and are applied alike: on a pair or
#: not, with cores or not, with a batch axis or not, to the vacuum or not.
Form = tuple[bool, bool, bool, bool]


@dataclass(frozen=True)
class Step:
    """One matrix: cores with phases before, between and after them, on one axis or on a pair.

    Without cores it is diagonal: one angle for each photon number.

    Attributes:
        axes: one or two.
        keeps: "one", or what a pair's core keeps, "sum" or "difference".
        cores: (kind, parameter) of each, the first one applied first; a pair has one at most.
        angles: one more than cores.
        batched: whether any of its parameters has a batch axis.
        vacuum: whether it acts on an axis in vacuum, so that only the first column is wanted.
    """

    axes: tuple[int, ...]
    keeps: str
    cores: tuple[tuple[str, int], ...]
    angles: tuple[Angle, ...]
    conjugate: bool
    batched: bool
    vacuum: bool = False

    @property
    def form(self) -> Form:
        return self.keeps != "one", bool(self.cores), self.batched, self.vacuum

    @property
    def parameters(self) -> set[int]:
        """Those that its matrix depends on. What comes first does nothing to the vacuum."""
        angles = self.angles[1:] if self.vacuum else self.angles
        return {p for _, p in self.cores} | {p for angle in angles for _, p, _ in angle}


@dataclass
class _Run:
    """Gates on one axis that nothing has come between yet."""

    conjugate: bool = False
    cores: list[tuple[str, int]] = field(default_factory=list)
    angles: list[list[_Term]] = field(default_factory=lambda: [[]])


@functools.lru_cache(maxsize=256)
def plan(circuit: Circuit) -> tuple[Step, ...]:
    """Fuse the gates into steps."""
    fusion = _Fusion(circuit)
    for gate in circuit.gates:
        fusion.add(gate)
    for axis in sorted(fusion.runs):
        fusion.flush(axis)
    return tuple(_soonest(fusion.steps, circuit.axes))


class _Fusion:
    """The gates so far: ``steps`` that are fused, and the gates of one axis that are still
    gathered, by axis (``runs``). ``vacuum`` are the axes on which nothing has acted."""

    def __init__(self, circuit: Circuit) -> None:
        self.steps: list[Step] = []
        self.runs: dict[int, _Run] = defaultdict(_Run)
        self._batched = circuit.batched
        self._vacuum = set() if circuit.prepared else set(range(circuit.axes))
        pairs = {axis for gate in circuit.gates for axis in gate.axes if len(gate.axes) > 1}
        counts = Counter(
            gate.axes[0]
            for gate in circuit.gates
            if KINDS[gate.kind].core and gate.axes[0] not in pairs
        )
        # Of an axis alone, many matrices are applied sooner than multiplied, and in a loop.
        self._deep = {axis: counts[axis] > _FUSED for axis in range(circuit.axes)}

    def add(self, gate: Gate) -> None:
        """Gather a gate of one axis; a gate on a pair ends what was gathered on both."""
        kind = KINDS[gate.kind]
        if kind.core and self._deep[gate.axes[0]] and self.runs[gate.axes[0]].cores:
            self.flush(gate.axes[0])
        before, after = (
            [(term, gate.parameters[kind.phase], factor) for term, factor in phases]
            for phases in (kind.before, kind.after)
        )
        if kind.modes > 1:
            self._add_pair(gate, before, after)
            return
        run = self.runs[gate.axes[0]]
        run.conjugate = gate.conjugate
        run.angles[-1] += before
        if kind.core:
            run.cores.append((gate.kind, gate.parameters[0]))
            run.angles.append([])
        run.angles[-1] += after

    def _add_pair(self, gate: Gate, before: list[_Term], after: list[_Term]) -> None:
        kind = KINDS[gate.kind]
        empty = self._vacuum.issuperset(gate.axes)
        if kind.keeps == "sum" and empty and not any(self.runs[a].cores for a in gate.axes):
            return  # photons are only moved, and there are none
        for name, axis in zip(("n0", "n1"), gate.axes, strict=True):
            if axis in self.runs and not self.runs[axis].cores and axis not in self._vacuum:
                # A gate on a pair takes the phases before it along; its conjugation is one for
                # all, which for loss (not conjugated, on a ket and a bra) is put right here.
                run = self.runs.pop(axis)
                sign = 1.0 if run.conjugate == gate.conjugate else -1.0
                before += [
                    (term.replace("n0", name), p, sign * factor)
                    for term, p, factor in run.angles[0]
                ]
            else:
                self.flush(axis)
        cores = ((gate.kind, gate.parameters[0]),) if kind.core else ()
        angles = (tuple(before), tuple(after)) if cores else (tuple(before + after),)
        self._emit(Step(gate.axes, kind.keeps, cores, angles, gate.conjugate, False))

    def flush(self, axis: int) -> None:
        """A step of what was gathered on this axis."""
        run = self.runs.pop(axis, None)
        vacuum = axis in self._vacuum
        if run is None or (vacuum and not run.cores):
            return  # phases do nothing to the vacuum
        angles = tuple(map(tuple, run.angles))
        self._emit(Step((axis,), "one", tuple(run.cores), angles, run.conjugate, False, vacuum))

    def _emit(self, step: Step) -> None:
        for part in _apart(step, self._batched):
            batched = any(self._batched[p] for p in part.parameters)
            self.steps.append(replace(part, batched=batched))
        self._vacuum.difference_update(step.axes)


def _soonest(steps: Sequence[Step], axes: int) -> list[Step]:
    """The steps in an order that repeats where the circuit does: each as soon as the steps on its
    axes allow. The vacuum's come first."""
    depths = [0] * axes
    found = []
    for step in steps:
        depth = 0 if step.vacuum else 1 + max(depths[axis] for axis in step.axes)
        for axis in step.axes:
            depths[axis] = depth
        found.append((depth, step))
    return [step for _, step in sorted(found, key=lambda pair: pair[0])]


def _apart(step: Step, batched: tuple[bool, ...]) -> list[Step]:
    """The step, with phases that differ from sample to sample as steps of their own.

    Not where a core does too, nor on the vacuum, where a matrix is a column.
    """
    if step.vacuum or not step.cores or any(batched[p] for _, p in step.cores):
        return [step]
    parts: list[Step] = []
    cores: list[tuple[str, int]] = []
    angles: list[Angle] = []
    for place, angle in enumerate(step.angles):
        own = tuple(term for term in angle if batched[term[1]])
        shared = tuple(term for term in angle if not batched[term[1]])
        if place == 0:
            parts += _turns(step, own)
            angles = [shared]
            continue
        cores.append(step.cores[place - 1])
        angles.append(shared)
        if own:
            parts.append(replace(step, cores=tuple(cores), angles=tuple(angles)))
            parts += _turns(step, own)
            cores, angles = [], [()]
    if cores:
        parts.append(replace(step, cores=tuple(cores), angles=tuple(angles)))
    return parts


def _turns(step: Step, angle: Angle) -> list[Step]:
    """Diagonal steps: those of one mode on its own axis, which has fewer angles than the pair."""
    found = []
    for n, axis in enumerate(step.axes):
        name = f"n{n}"
        of_one = tuple(
            (term.replace(name, "n0"), p, factor)
            for term, p, factor in angle
            if term in (name, f"{name}^2")
        )
        if of_one:
            found.append(Step((axis,), "one", (), (of_one,), step.conjugate, True))
    of_both = tuple(term for term in angle if term[0] == "n0 n1")
    if of_both:
        found.append(replace(step, cores=(), angles=(of_both,)))
    return found


def meetings(steps: Sequence[Step], axes: int) -> tuple[list[frozenset[int] | None], int | None]:
    """For each step the axes that have met where it acts; None where axes meet, or one leaves the
    vacuum. And how many steps are applied to fewer than all axes before all have met, if ever."""
    met = [frozenset([axis]) for axis in range(axes)]
    found: list[frozenset[int] | None] = []
    alone, count = None if axes > 1 else 0, 0
    for step in steps:
        groups = {met[axis] for axis in step.axes}
        together = frozenset[int]().union(*groups)
        found.append(together if len(groups) == 1 and not step.vacuum else None)
        for axis in together:
            met[axis] = together
        if alone is None and len(together) == axes:
            alone = count
        count += not step.vacuum
    return found, alone


def partner(keeps: str, block: np.ndarray, n0: np.ndarray, cutoff: int) -> np.ndarray:
    """The photon number of the second mode in a block, for each of the first."""
    return (block - n0) % cutoff if keeps == "sum" else (n0 - block) % cutoff
