"""What coordinator and workers say to each other: frozen messages, one class each.

A worker is told what it lacks (segment, model, plan, frame) and then sent work that names those
things by number. Arrays never travel in messages; they lie in the arena, and a Frame says where.

    coordinator -> worker                         worker -> coordinator
      Start        who you are                      Hello
      Remap        the segment has grown            -
      Build        a model                          - | Failed
      Confirm      is that done?                    Confirmed | Failed
      Plan         a method and its constants       -
      Frame        where a batch's arrays lie       -
      Rehearse     compile what others have         -
      Probe        learn outputs and cost           Probed | Failed
      Compute      tiles, forward or backward       Computed | Failed
      Forget       free what is kept for backward   -
      Discard      a model and its plans            -
      Inject       faults, in tests                 -
      Stop                                          (end of file)
                                                    Crashed, then end of file

Answers to messages with a ticket carry it, and ``finished``: the worker's progress counter, by
which the coordinator knows which tile a worker was in when it died.
"""

from __future__ import annotations

import enum
import itertools
import marshal
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from workers.errors import QPoolError
from workers.exchange.arena import Segment
from workers.exchange.faults import Fault
from workers.layout import ArraySpec, Placed


class Kind(enum.Enum):
    """What to compute for each tile."""

    __hash__ = object.__hash__  # Enum's own is Python, and this is in keys of each tile

    FORWARD = "forward"
    FORWARD_KEEPING = "forward, keeping what the backward pass needs"
    BACKWARD = "backward"
    SECOND = "backward of the backward"
    BOTH = "forward and backward"

    @property
    def makes_outputs(self) -> bool:
        return self in (Kind.FORWARD, Kind.FORWARD_KEEPING, Kind.BOTH)

    @property
    def makes_gradients(self) -> bool:
        return self in (Kind.BACKWARD, Kind.SECOND, Kind.BOTH)


@dataclass(frozen=True)
class Standin:
    """Stands for something that has a number in the arguments of a call, or in a list, tuple or
    dict of them."""

    index: int


@dataclass(frozen=True)
class Sharded(Standin):
    """Stands in a plan's arguments for the n-th sharded input."""


def filled(value: Any, found: Sequence[Any], kind: type[Standin] = Sharded) -> Any:
    """An argument with what was ``found`` in the places of what stands for it."""
    if isinstance(value, kind):
        return found[value.index]
    if not stands_for(value, kind):
        return value
    if isinstance(value, dict):
        return {name: filled(part, found, kind) for name, part in value.items()}
    parts = [filled(part, found, kind) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def stands_for(value: Any, kind: type[Standin]) -> bool:
    """Whether it is, or holds, what stands for something."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(stands_for(part, kind) for part in value)
    return isinstance(value, kind)


@dataclass(frozen=True)
class Remap:
    segment: Segment


@dataclass(frozen=True)
class Build:
    """``shipment`` unpickles to a model and its variables; ``weights`` says where values lie.

    ``engine`` is what the model's Strawberry Fields engines are, "traced" or "stock".
    """

    model: int
    shipment: bytes
    weights: tuple[Placed, ...]
    seed: int
    engine: str


@dataclass(frozen=True)
class Place:
    """The model's weights have moved within the arena."""

    model: int
    weights: tuple[Placed, ...]


@dataclass(frozen=True)
class Form:
    """How a method is rewritten before it is compiled.

    ``by_rows``: which of its inputs it is vectorised over because it loops over their rows, empty
    for none (``compiling.rows``). ``together``: circuits that do not wait for each other are run as
    one (``compiling.together``). ``narrowed``: its ndarrays of double precision are tensors of
    single precision; eagerly TensorFlow converts them to whatever they meet.
    """

    by_rows: tuple[bool, ...] = ()
    together: bool = False
    narrowed: bool = False


@dataclass(frozen=True)
class Plan:
    """One method of one model, called in one way.

    ``arguments`` unpickles to ``(args, kwargs)`` in which ``Sharded`` marks the inputs.
    ``as_tensor`` says which inputs the model gets as tensors (the others as ndarrays).
    ``rows`` is the constant number of rows the model must be called with, 0 for any; then
    ``least_rows`` is how many it needs (engines made for one row at a time are of another kind:
    Strawberry Fields' ``batch_size`` is at least 2). A probe
    finds out whether the method ``draws`` random numbers, and whether seeding makes the draws
    ``reproducible``, at which ``level`` it can be compiled (``compiling.compiled``) and in which
    ``form``, and what one row of its ``outputs`` is; the plan is then told anew. ``twin`` counts
    the plans before it that are called alike, of models with variables alike: what is compiled for
    it has its name by that.
    """

    plan: int
    model: int
    method: str
    arguments: bytes
    as_tensor: tuple[bool, ...]
    rows: int
    least_rows: int = 1
    draws: bool = False
    reproducible: bool = True
    level: str = "eager"
    form: Form = Form()
    outputs: tuple[ArraySpec, ...] = ()
    twin: int = 0

    def as_found(self, probed: Probed) -> Plan:
        """The plan as a probe found it."""
        return replace(
            self,
            least_rows=probed.least_rows,
            draws=probed.draws,
            reproducible=probed.reproducible,
            level=probed.level,
            form=probed.form,
            outputs=probed.outputs,
        )


@dataclass(frozen=True)
class Frame:
    """Where the arrays of a batch lie. Row ranges of tiles follow from ``tile`` and ``batch``.

    ``weight_gradients`` have one row per tile; all others one row per sample. Each gradient comes
    with the source it belongs to (inputs first, then variables).

    For ``Kind.BOTH`` gradients are of the outputs that have ``cotangents``.

    For ``Kind.SECOND``, ``tangents`` are the cotangents of gradients, by source (of a variable's,
    the whole array), and ``cotangent_gradients`` belong to ``cotangents``.

    ``first`` is the number of the first tile within the call, where the frame is a part of its
    batch: draws, and what is kept, go by a tile's number within the call.
    """

    frame: int
    batch: int
    tile: int
    inputs: tuple[Placed, ...]
    outputs: tuple[Placed, ...] = ()
    cotangents: tuple[Placed | None, ...] = ()
    input_gradients: tuple[tuple[int, Placed], ...] = ()
    weight_gradients: tuple[tuple[int, Placed], ...] = ()
    tangents: tuple[tuple[int, Placed], ...] = ()
    cotangent_gradients: tuple[Placed | None, ...] = ()
    first: int = 0


class Purpose(NamedTuple):
    """What a plan is going to be asked for, and is compiled for.

    ``gradient``: a vjp. ``largest_tile`` bounds the rows of a tile (``workers.layout.tile_worth``),
    which is the shape that is compiled. ``wanted`` are the sources whose gradients, of the last
    output, ``Kind.BOTH`` will be asked for.
    """

    gradient: bool
    largest_tile: int
    wanted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Probe:
    """Run the model on the frame's first rows and report what comes out, and what it costs.

    ``gradient_first``: that is compiled first, another worker begins with the call.
    """

    ticket: int
    plan: int
    frame: int
    weights_version: int
    purpose: Purpose
    gradient_first: bool = False


class Compute(NamedTuple):
    """Tiles of one batch. ``call`` numbers the forward call; its backward carries the same."""

    ticket: int
    call: int
    plan: int
    frame: int
    weights_version: int
    tiles: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class Confirm:
    """Answer when all that was told before is done, and this model, if one is named, is built."""

    ticket: int
    model: int | None


@dataclass(frozen=True)
class Rehearse:
    """Compute the frame's first tile without writing anything, so that the next one is quick.

    The arrays may be written to meanwhile: nothing of what is computed is kept.
    """

    kind: Kind
    plan: int
    frame: int
    weights_version: int


@dataclass(frozen=True)
class Inject:
    """Faults to commit (see ``faults``)."""

    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Forget:
    calls: tuple[int, ...]


@dataclass(frozen=True)
class Discard:
    model: int


@dataclass(frozen=True)
class Stop:
    pass


@dataclass(frozen=True)
class Start:
    """The first message: who the worker is, and what it is to do to itself before it loads.

    ``slot`` is the number of its progress counter at the beginning of the arena; ``device`` see
    ``workers.process.device``, ``spin`` see ``workers.exchange.waiting``.
    """

    worker: int
    slot: int
    cores: tuple[int, ...]
    threads: int
    coordinator: int
    segment: Segment
    path: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    device: str = "cpu"
    spin: float = 0.0


@dataclass(frozen=True)
class Hello:
    """The handshake: who the worker is, after its imports and after it was pinned."""

    pid: int
    cores: tuple[int, ...]
    pinned: bool
    threads: dict[str, Any]
    versions: dict[str, str]
    import_seconds: float


@dataclass(frozen=True)
class Confirmed:
    ticket: int
    finished: int


@dataclass(frozen=True)
class Crashed:
    """Last words: the loop itself failed, or memory ran out. The process ends after this."""

    traceback: str


@dataclass(frozen=True)
class Probed:
    """``structure`` is the pickled nest of outputs with a number at each leaf; ``outputs`` are
    specs of one row each, ``tensors`` says which are tensors (the others are ndarrays).

    ``draws``: the model draws random numbers; ``reproducible``: seeding makes them the same.
    ``fixed_cost``: interpreter work per call that does not depend on its rows, in rows.
    ``level``, ``reason``, ``compile_seconds``: see ``compiling.compiled.Choice``. ``form``: see
    ``Form``. ``circuits``: how many circuits a call of few rows runs.
    ``connected``: for each gradient source, whether any output depends on it; empty if not asked.
    ``leads``: for each output, of several, which sources it may depend on, if that is known.
    ``caught``: what a circuit raised and the model caught. ``attributes``: those that the call set
    to tensors.
    """

    ticket: int
    finished: int
    structure: bytes
    outputs: tuple[ArraySpec, ...]
    tensors: tuple[bool, ...]
    least_rows: int
    draws: bool
    reproducible: bool
    fixed_cost: float
    connected: tuple[bool, ...]
    level: str
    reason: str
    compile_seconds: float
    form: Form = Form()
    circuits: int = 0
    caught: str = ""
    attributes: tuple[str, ...] = ()
    leads: tuple[tuple[bool, ...], ...] = ()


class Computed(NamedTuple):
    """``moments`` are of the machine's monotonic clock (``time.perf_counter``): when the message
    was there, when the weights were, and when each tile was done; ``cpu_seconds`` is the process's
    CPU time since its start, as the system measured it; ``memory`` its own resident bytes, not
    counting shared ones.
    """

    ticket: int
    finished: int
    moments: tuple[float, ...]
    cpu_seconds: float
    memory: int
    recomputed: int

    @property
    def tile_seconds(self) -> tuple[float, ...]:
        """What each tile took."""
        return tuple(end - began for began, end in itertools.pairwise(self.moments[1:]))

    @property
    def seconds(self) -> float:
        """What all tiles took."""
        return self.moments[-1] - self.moments[1]


@dataclass(frozen=True)
class Failed:
    """``ticket`` is that of the message, 0 for one that has none."""

    ticket: int
    finished: int
    error: QPoolError


def encode(message: Any) -> bytes:
    """A message as bytes, for ``decode`` in a process of the same interpreter.

    The two of every step are marshalled, which with reading them takes 6 us, pickling 18.
    """
    if isinstance(message, Compute):
        return marshal.dumps((*message[:-1], message.kind.value))
    if isinstance(message, Computed):
        return marshal.dumps(tuple(message))
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def decode(data: bytes) -> Any:
    """The message of these bytes."""
    if data.startswith(pickle.PROTO):
        return pickle.loads(data)
    fields = marshal.loads(data)
    if isinstance(fields[-1], str):
        return Compute._make((*fields[:-1], Kind(fields[-1])))
    return Computed._make(fields)
