"""Whether row n of a call's outputs comes of row n of its inputs alone, read off its graph.

Numbers cannot tell: a norm of the whole batch that is clipped at 4 does nothing to small numbers.
Each tensor is given the places that it may depend on: rows of the inputs, and rows of whatever
else the graph is given (weights, arguments for the whole batch). Where its leading axis is kept
apart, it is given those of each of its rows. What an operation is not known to keep apart it mixes:
so the answer errs towards "no".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

#: Entry by entry, with broadcasting.
_ENTRYWISE = frozenset(
    """
    Abs Add AddV2 AddN Sub Mul RealDiv Div DivNoNan Neg Reciprocal Square Sqrt Rsqrt Exp Expm1
    Log Log1p Sin Cos Tan Sinh Cosh Tanh Asin Acos Atan Atan2 Sigmoid Erf Relu Elu Selu
    Softplus Softsign LeakyRelu Relu6 Pow Maximum Minimum Cast Identity StopGradient Real Imag
    Complex ComplexAbs Angle Conj Sign Floor Ceil Round Rint Mod FloorMod SelectV2 Greater
    GreaterEqual Less LessEqual Equal NotEqual LogicalAnd LogicalOr LogicalNot IsNan IsFinite
    ClipByValue SquaredDifference Xlogy PreventGradient EnsureShape CheckNumerics BiasAdd
    """.split()  # noqa: SIM905 - a list of names is read as words
)

#: What is of a tensor's shape, whatever its numbers.
_OF_SHAPES = frozenset(("Shape", "Rank", "Size", "ZerosLike", "OnesLike"))

#: What gives a graph its values, other than constants.
_ROOTS = frozenset(("Placeholder", "PlaceholderWithDefault", "ReadVariableOp"))

#: The places, (tensor, row), that a tensor depends on; or a list of these, one for each row.
_Places = Any


def rows_are_alone(inputs: Sequence[tf.Tensor], outputs: Sequence[tf.Tensor], rows: int) -> bool:
    """Whether row n of the ``outputs`` has nothing of another row of the ``inputs`` than n, and all
    rows have the same of everything else.

    Args:
        inputs: tensors (rows, ...) of a graph.
        outputs: tensors of it that were made of them.
    """
    names = {x.name for x in inputs}
    known: dict[str, _Places] = {}
    for output in outputs:
        found = _of(output, known)
        if not isinstance(found, list) or len(found) != rows:
            return False
        others = [frozenset(place for place in own if place[0] not in names) for own in found]
        if any(other != others[0] for other in others):
            return False
        if any(n != row for row, own in enumerate(found) for name, n in own if name in names):
            return False
    return True


def rows_behind(inputs: Sequence[tf.Tensor], tensors: Sequence[tf.Tensor]) -> list[Any]:
    """For each of the ``tensors`` the rows of the ``inputs`` that it may depend on, a frozenset; or
    a list of these, for each of its own rows, where they are apart."""
    names = {x.name for x in inputs}
    known: dict[str, _Places] = {}

    def rows(places: frozenset[Any]) -> frozenset[int]:
        return frozenset(n for name, n in places if name in names)

    found = [_of(tensor, known) for tensor in tensors]
    return [list(map(rows, x)) if isinstance(x, list) else rows(x) for x in found]


def _of(tensor: tf.Tensor, known: dict[str, _Places]) -> _Places:
    """What a tensor depends on; without recursion, for graphs are deep."""
    stack = [tensor]
    while stack:
        top = stack[-1]
        if top.name in known:
            stack.pop()
            continue
        if top.op.type in _ROOTS:
            size = top.shape[0] if top.shape.rank else None
            name = top.op.inputs[0].name if top.op.type == "ReadVariableOp" else top.name
            places = [frozenset([(name, n)]) for n in range(size or 0)]
            known[top.name] = places or frozenset([(name, 0)])
            continue
        ahead = [x for x in top.op.inputs if x.name not in known]
        if ahead:
            stack += ahead
            continue
        given = [known[x.name] for x in top.op.inputs]
        for output, found in zip(top.op.outputs, _through(top.op, given), strict=True):
            known[output.name] = found
        stack.pop()
    return known[tensor.name]


def _all(found: _Places) -> frozenset[Any]:
    return frozenset().union(*found) if isinstance(found, list) else found


def _through(op: Any, given: list[_Places]) -> list[_Places]:
    """What each of an operation's outputs depends on."""
    mixed: frozenset[Any] = frozenset().union(*(_all(x) for x in given))
    if not mixed or op.type in _OF_SHAPES:
        return [frozenset() for _ in op.outputs]
    if op.type == "IdentityN":
        # A row's circuit (``rows``) is one: its last output comes of all before it.
        return [*given[:-1], mixed]
    kept = _kept(op, given)
    if kept is not None:
        return kept
    return [mixed for _ in op.outputs]


def _kept(op: Any, given: list[_Places]) -> list[_Places] | None:
    """The outputs of an operation that is known to keep rows apart, or to take one; else None."""
    kind = op.type
    if kind in _ENTRYWISE:
        return _entrywise(op, given)
    if kind in _OF_ANY:
        return _OF_ANY[kind](op, given)
    return _OF_ROWS[kind](op, given) if kind in _OF_ROWS and isinstance(given[0], list) else None


def _entrywise(op: Any, given: list[_Places]) -> list[_Places] | None:
    shape = op.outputs[0].shape
    if not shape.rank or shape[0] is None:
        return None

    def of_row(x: tf.Tensor, places: _Places, n: int) -> frozenset[Any]:
        aligned = isinstance(places, list) and x.shape.rank == shape.rank
        # What is broadcast is the same for all rows: its leading axis is another one of theirs.
        return places[n] if aligned and len(places) == shape[0] else _all(places)

    pairs = list(zip(op.inputs, given, strict=False))
    return [[frozenset().union(*(of_row(*pair, n) for pair in pairs)) for n in range(shape[0])]]


def _einsum(op: Any, given: list[_Places]) -> list[_Places] | None:
    """Rows are apart where the output's leading label leads in each operand that has it."""
    shape = op.outputs[0].shape
    terms, _, out = op.get_attr("equation").decode().replace(" ", "").partition("->")
    terms = terms.split(",")
    if not out or "." in out or not shape.rank or shape[0] is None:
        return None
    if any(out[0] in term[1:] for term in terms):
        return None

    def of_row(term: str, places: _Places, n: int) -> frozenset[Any]:
        leads = term[:1] == out[0] and isinstance(places, list)
        return places[n] if leads else _all(places)

    pairs = list(zip(terms, given, strict=True))
    return [[frozenset().union(*(of_row(*pair, n) for pair in pairs)) for n in range(shape[0])]]


def _packed(op: Any, given: list[_Places]) -> list[_Places] | None:
    """Tensors along a new axis."""
    rank = op.outputs[0].shape.rank
    if rank is None:
        return None
    return _entrywise(op, given) if op.get_attr("axis") % rank else [[_all(x) for x in given]]


def _joined(op: Any, given: list[_Places]) -> list[_Places] | None:
    """One piece after another along an axis, the last operand."""
    axis, rank = _constant(op.inputs[-1]), op.outputs[0].shape.rank
    if axis is None or rank is None:
        return None
    if axis % rank:
        return _entrywise(op, given[:-1])
    rows: list[frozenset[Any]] = []
    for piece, places in zip(op.inputs, given[:-1], strict=False):
        size = piece.shape[0]
        if size is None:
            return None
        apart = isinstance(places, list) and len(places) == size
        rows += places if apart else [_all(places)] * size
    return [rows]


def _split(op: Any, given: list[_Places]) -> list[_Places] | None:
    """``_joined``, backwards."""
    uneven = op.type == "SplitV"
    axis, places = _constant(op.inputs[2 if uneven else 0]), given[0 if uneven else 1]
    sizes = [output.shape[0] if output.shape.rank else None for output in op.outputs]
    if axis is None or not isinstance(places, list) or None in sizes:
        return None
    if axis % op.outputs[0].shape.rank:
        return [places for _ in op.outputs]
    ends = np.cumsum(sizes)
    return [places[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _written(op: Any, given: list[_Places]) -> list[_Places] | None:
    """A list of tensors in which one has been replaced."""
    index, places = _constant(op.inputs[1]), given[0]
    if not isinstance(places, list):
        made = op.inputs[0].op
        size = _constant(made.inputs[1]) if made.type == "TensorListReserve" else None
        if size is None or _all(places):
            return None
        places = [frozenset()] * int(size)
    if index is None or not 0 <= int(index) < len(places):
        return None
    return [[*places[: int(index)], _all(given[2]), *places[int(index) + 1 :]]]


def _slice(op: Any, given: list[_Places]) -> list[_Places] | None:
    begin, size = (_constant(x) for x in op.inputs[1:])
    if begin is None or size is None:
        return None
    return [given[0][int(begin[0]) :][: int(size[0]) if size[0] >= 0 else None]]


def _sliced(op: Any, given: list[_Places]) -> list[_Places] | None:
    first = given[0]
    begin, end, strides = (_constant(x) for x in op.inputs[1:4])
    masks = [op.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis")]
    if begin is None or end is None or strides is None or (masks[2] | masks[3]) & 1:
        return None
    if op.get_attr("shrink_axis_mask") & 1:
        return [first[int(begin[0])]]
    span = slice(
        None if masks[0] & 1 else int(begin[0]),
        None if masks[1] & 1 else int(end[0]),
        int(strides[0]),
    )
    return [first[span]]


def _unpacked(op: Any, given: list[_Places]) -> list[_Places]:
    return list(given[0]) if op.get_attr("axis") == 0 else [given[0] for _ in op.outputs]


def _gathered(op: Any, given: list[_Places]) -> list[_Places] | None:
    index, axis = _constant(op.inputs[1]), _constant(op.inputs[2])
    if index is None or axis != 0 or op.get_attr("batch_dims"):
        return None
    taken = [given[0][int(n)] for n in np.ravel(index)]
    return [taken if np.ndim(index) == 1 else frozenset().union(*taken)]


def _layer(op: Any, given: list[_Places]) -> list[_Places]:
    """Each row by all of the other operands."""
    others = frozenset().union(*map(_all, given[1:]))
    return [[own | others for own in given[0]]]


def _product(op: Any, given: list[_Places]) -> list[_Places] | None:
    return None if op.get_attr("transpose_a") else _layer(op, given)


def _products(op: Any, given: list[_Places]) -> list[_Places] | None:
    rank = op.outputs[0].shape.rank
    return _entrywise(op, given) if rank and rank > 2 else None


def _padded(op: Any, given: list[_Places]) -> list[_Places] | None:
    """Rows as they are, with more in each."""
    lengths = _constant(op.inputs[1])
    kept = lengths is not None and np.all(lengths[0] == (1 if op.type == "Tile" else 0))
    return _layer(op, given) if kept else None


def _reduced(op: Any, given: list[_Places]) -> list[_Places] | None:
    axes, rank = _constant(op.inputs[1]), op.inputs[0].shape.rank
    if axes is None or rank is None or 0 in {int(axis) % rank for axis in np.ravel(axes)}:
        return None
    return given[:1]


def _transposed(op: Any, given: list[_Places]) -> list[_Places] | None:
    order = _constant(op.inputs[1])
    return given[:1] if order is not None and order[0] == 0 else None


def _reshaped(op: Any, given: list[_Places]) -> list[_Places] | None:
    """The rows in another shape, where they still lead."""
    axis = _constant(op.inputs[1]) if op.type == "ExpandDims" else 1
    shape = op.outputs[0].shape
    same = axis not in (None, 0) and shape.rank and shape[0] == len(given[0])
    return given[:1] if same else None


def _constant(tensor: tf.Tensor) -> Any:
    return tf.get_static_value(tensor)


_Rule = Callable[[Any, list[_Places]], "list[_Places] | None"]


def _each(rules: dict[str, _Rule]) -> dict[str, _Rule]:
    return {kind: rule for kinds, rule in rules.items() for kind in kinds.split()}


#: What rows are given to, whichever of the operands has them.
_OF_ANY = _each(
    {
        "Pack": _packed,
        "ConcatV2": _joined,
        "Einsum": _einsum,
        "TensorListSetItem": _written,  # as TensorArrays write
        "Split SplitV": _split,
    }
)

#: What is known of where the first operand has rows.
_OF_ROWS = _each(
    {
        "TensorListStack": lambda op, given: given[:1],
        "Slice": _slice,
        "StridedSlice": _sliced,
        "Unpack": _unpacked,
        "GatherV2": _gathered,
        "MatMul": _product,
        "BatchMatMulV2": _products,
        "Conv2D DepthwiseConv2dNative MaxPool AvgPool": _layer,
        "Pad PadV2 MirrorPad Tile": _padded,
        "Sum Mean Max Min Prod Any All": _reduced,
        "Transpose": _transposed,
        "Reshape Squeeze Softmax ExpandDims": _reshaped,
    }
)
