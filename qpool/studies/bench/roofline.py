"""What bounds a compiled step on one core: each of its operations against the machine's limits.

Operations and the bytes they touch come from XLA's optimized program, their seconds from
TensorFlow's profiler, the limits from a float32 matrix product and a float32 sum timed on the same
core (Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009). Owns the reading of a program
and the picture.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qpool.studies.bench.timing import turns_of

_BYTES = {"f64": 8, "f32": 4, "c64": 8, "c128": 16, "s64": 8, "s32": 4, "u32": 4, "pred": 1}

_LINE = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>\S+) = (?P<type>.+?) (?P<op>[a-z][\w-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")

#: Ways to take a part of an array, of which only the part is touched.
_PARTS = ("slice", "dynamic-slice", "gather")

#: What counts as one floating-point operation an element.
_ARITHMETIC = {
    *("add", "subtract", "multiply", "divide", "negate", "maximum", "minimum", "abs"),
    *("exponential", "log", "sine", "cosine", "sqrt", "rsqrt", "power", "tanh", "atan2", "reduce"),
}

#: What a sum of arrays touches while the memory is timed: of a core's own cache, and beyond.
_MIB = (1, 16, 256)

#: Of the picture.
_COLOURS = {"products": "#33658a", "gathers": "#f26419", "elementwise": "#7a9e7e"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program: what it computes, what it touches."""

    name: str
    kind: str
    flop: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    op: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> int:
        return sum(_BYTES.get(kind, 4) * math.prod(shape) for kind, shape in self.arrays)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.arrays)


def operations(program: str) -> list[Operation]:
    """The operations of XLA's optimized program, as its text says them.

    A fused operation touches its operands and its result, or of an operand that it only takes
    parts of, those.
    """
    computations, entry = _parse(program)
    found = []
    for instruction in computations[entry].values():
        if instruction.op in ("parameter", "constant", "bitcast", "get-tuple-element", "tuple"):
            continue
        called = re.search(r"(?:calls|to_apply)=%([^\s,]+)", instruction.rest)
        within = computations.get(called.group(1), {}) if called else {}
        parts = list(within.values()) if instruction.op == "fusion" else [instruction]
        kinds = {part.op for part in parts}
        lookup = within if instruction.op == "fusion" else computations[entry]
        touched: float = instruction.bytes
        for place, operand in enumerate(instruction.operands):
            whole = computations[entry][operand].bytes
            taken = instruction.op in _PARTS and place == 0
            part = instruction.bytes if taken else _touched(within, place, whole)
            touched += min(whole, part)
        found.append(
            Operation(
                instruction.name,
                "products" if "dot" in kinds else "gathers" if "gather" in kinds else "elementwise",
                sum(_flop(part, lookup) for part in parts),
                touched,
            )
        )
    return found


def _parse(program: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", ""
    for line in program.splitlines():
        head = re.match(r"^(ENTRY )?%(\S+) \(", line)
        if head and line.rstrip().endswith("{"):
            current = head.group(2)
            computations[current] = {}
            entry = current if head.group(1) else entry
            continue
        match = _LINE.match(line)
        if match and current:
            inside, _, after = match["rest"].partition(")")
            arrays = tuple(
                (kind, tuple(int(n) for n in shape.split(",") if n))
                for kind, shape in _ARRAY.findall(match["type"])
            )
            operands = tuple(re.findall(r"%([^\s,()]+)", inside))
            if match["op"] == "parameter":
                after = inside
            computations[current][match["name"]] = _Instruction(
                match["name"], match["op"], arrays, operands, after
            )
    return computations, entry


def _touched(within: dict[str, _Instruction], place: int, whole: int) -> float:
    """Bytes of an operand that a fused computation reads."""
    for parameter in within.values():
        if parameter.op == "parameter" and parameter.rest == str(place):
            users = [i for i in within.values() if parameter.name in i.operands]
            if users and all(i.op in _PARTS and i.operands[0] == parameter.name for i in users):
                return sum(user.bytes for user in users)
    return whole


def _flop(instruction: _Instruction, computation: dict[str, _Instruction]) -> float:
    if instruction.op == "dot":
        dims = re.search(r"lhs_contracting_dims={([\d,]*)}", instruction.rest)
        shape = computation[instruction.operands[0]].arrays[0][1]
        inner = math.prod(shape[int(n)] for n in dims.group(1).split(",") if n) if dims else 1
        return 2.0 * instruction.elements * inner
    if instruction.op == "reduce":
        return float(computation[instruction.operands[0]].elements)
    return float(instruction.elements) if instruction.op in _ARITHMETIC else 0.0


def seconds_by_operation(step: Callable[[], Any], names: set[str], times: int) -> dict[str, float]:
    """Median seconds of each operation in a call of ``step``, as TensorFlow's profiler saw them."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(times):
            step()
        tf.profiler.experimental.stop()
        (path,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
        space = xplane_pb2.XSpace()
        space.ParseFromString(path.read_bytes())
    found: dict[str, list[float]] = defaultdict(list)
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                if name in names:
                    found[name].append(event.duration_ps * 1e-12)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def limits() -> dict[str, Any]:
    """Of this core, now: GFLOP/s of a float32 product, GB/s of a float32 sum by MiB in use."""
    import tensorflow as tf

    matrix = tf.random.stateless_normal((1024, 1024), (1, 2)) / 32
    product = tf.function(lambda x: x @ x, jit_compile=True)
    contenders: dict[str, Any] = {"product": (lambda: product(matrix).numpy(), 10)}
    for mib in _MIB:
        arrays: np.ndarray = np.zeros((3, mib * 2**20 // 12), np.float32)
        contenders[str(mib)] = functools.partial(np.add, *arrays), max(5, 256 // mib)
    seconds = {n: statistics.median(s) for n, s in turns_of(contenders, 5).items()}
    return {
        "gflop_per_second": 2 * 1024**3 / seconds["product"] / 1e9,
        "gigabytes_per_second": {str(mib): mib * 2**20 / seconds[str(mib)] / 1e9 for mib in _MIB},
    }


def roofline() -> dict[str, Any]:
    """The three-mode case (6 layers, cutoff 12, density) at batch 64 on one core: which share of
    the step goes where, and how near each part comes to the machine's limits."""
    times = 10
    from qpool.studies.bench.alone import alone_on_a_core

    return alone_on_a_core("qpool.studies.bench.roofline", times)


def _here(times: int) -> dict[str, Any]:
    from qpool.studies.bench.engine import THREE_MODE_FLOP, Case

    case, batch = Case(3, 6, 12, "density"), 64
    z = case.z(batch)
    function = case.function()
    program = operations(function.experimental_get_compiler_ir(z)(stage="optimized_hlo"))

    def step() -> None:
        function(z)[1].numpy()

    machine = limits()
    whole = statistics.median(turns_of({"step": (step, times)}, 3)["step"])
    taken = seconds_by_operation(step, {operation.name for operation in program}, times)
    rows = [
        {**dataclasses.asdict(operation), "seconds": taken[operation.name]}
        for operation in program
        if operation.name in taken
    ]
    return {
        "case": "roofline",
        "batch": batch,
        "machine": machine,
        "milliseconds": 1e3 * whole,
        "share_of_the_arithmetic_limit": batch
        * THREE_MODE_FLOP
        / whole
        / (1e9 * machine["gflop_per_second"]),
        "kinds": {kind: _kind(rows, kind, machine) for kind in _COLOURS},
        "not_in_an_operation": 1 - sum(row["seconds"] for row in rows) / whole,
        "operations": rows,
    }


def _kind(rows: Sequence[dict[str, Any]], kind: str, machine: dict[str, Any]) -> dict[str, float]:
    of_kind = [row for row in rows if row["kind"] == kind]
    flop, touched, taken = (
        sum(row[name] for row in of_kind) for name in ("flop", "bytes", "seconds")
    )
    bandwidth = max(machine["gigabytes_per_second"].values())
    least = sum(
        max(row["flop"] / machine["gflop_per_second"], row["bytes"] / bandwidth) / 1e9
        for row in of_kind
    )
    return {
        "operations": len(of_kind),
        "milliseconds": 1e3 * taken,
        "gflop": flop / 1e9,
        "gigabytes": touched / 1e9,
        "gflop_per_second": flop / taken / 1e9 if taken else 0.0,
        "gigabytes_per_second": touched / taken / 1e9 if taken else 0.0,
        "milliseconds_at_the_limits": 1e3 * least,
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """The roofs with a disc for each operation, whose area is its time; and the time by kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    roofs, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    peak = found["machine"]["gflop_per_second"]
    reach = np.geomspace(0.05, 50, 300)
    for shade, (mib, rate) in zip(
        ("#bbbbbb", "#888888", "#444444"),
        found["machine"]["gigabytes_per_second"].items(),
        strict=False,
    ):
        roofs.plot(reach, np.minimum(peak, rate * reach), color=shade, linewidth=1)
        roofs.plot([], [], color=shade, label=f"{rate:.0f} GB/s with {mib} MiB in use")
    roofs.annotate(f"{peak:.0f} GFLOP/s: a matrix product", (0.06, peak), va="bottom")
    for kind, colour in _COLOURS.items():
        rows = [r for r in found["operations"] if r["kind"] == kind and r["flop"] and r["seconds"]]
        roofs.scatter(
            [row["flop"] / row["bytes"] for row in rows],
            [row["flop"] / row["seconds"] / 1e9 for row in rows],
            s=[8e6 * row["seconds"] / found["milliseconds"] for row in rows],
            color=colour,
            alpha=0.35,
            linewidths=0,
        )
        roofs.scatter([], [], color=colour, s=40, label=kind)
    roofs.set(
        xscale="log",
        yscale="log",
        xlim=(0.05, 50),
        ylim=(0.1, 2 * peak),
        xlabel="floating-point operations for each byte touched",
        ylabel="GFLOP/s",
        title="each operation of a step on one core",
    )
    roofs.legend(loc="lower right", fontsize=9)
    kinds = list(_COLOURS)[::-1]
    for part, alpha in (("milliseconds", 0.35), ("milliseconds_at_the_limits", 1.0)):
        values = [found["kinds"][kind][part] for kind in kinds]
        bars.barh(kinds, values, color=[_COLOURS[kind] for kind in kinds], alpha=alpha)
    for place, kind in enumerate(kinds):
        total = found["kinds"][kind]
        said = f" {total['milliseconds']:.1f} ({total['milliseconds_at_the_limits']:.1f})"
        bars.annotate(said, (total["milliseconds"], place), va="center")
    bars.set(
        xlabel="milliseconds (dark: at the core's limits)",
        title=f"of {found['milliseconds']:.1f} ms",
        xlim=(0, 1.45 * max(total["milliseconds"] for total in found["kinds"].values())),
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    from qpool.studies.bench.alone import answer

    answer(_here)
