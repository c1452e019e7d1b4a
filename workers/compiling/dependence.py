"""Whether row n of a call's outputs comes of row n of its inputs alone, read off its graph.

Numbers cannot tell: a norm of the whole batch that is clipped at 4 does nothing to small numbers.
Each tensor is given the places that it may depend on: rows of the inputs, and rows of whatever
else the graph is given (weights, arguments for the whole batch). Where its leading axis is kept
apart, it is given those of each of its rows. What an operation is not known to keep apart it mixes:
so the answer errs towards "no".
"""

from __future__ import annotations

from collections.abc import Sequence
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

#: Reductions and moves whose axes are their second operand.
_REDUCTIONS = frozenset(("Sum", "Mean", "Max", "Min", "Prod", "Any", "All"))

#: What is of a tensor's shape, whatever its numbers.
_OF_SHAPES = frozenset(("Shape", "Rank", "Size", "ZerosLike", "OnesLike"))

#: A row of the first operand, by all of the others: layers, with rows leading.
_LAYERS = frozenset(("Conv2D", "DepthwiseConv2dNative", "MaxPool", "AvgPool"))

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
    shape = op.outputs[0].shape
    first = given[0]
    apart = isinstance(first, list)
    if op.type in _ENTRYWISE:
        return _entrywise(op, given, shape)
    if op.type in ("Pack", "ConcatV2"):
        stacked = op.type == "Pack"
        parts = given if stacked else given[:-1]
        axis = op.get_attr("axis") if stacked else _constant(op.inputs[-1])
        if axis is None or shape.rank is None:
            return None
        if axis % shape.rank:
            return _entrywise(op, parts, shape)
        return [[_all(x) for x in given]] if stacked else _joined(op.inputs, parts)
    if op.type == "Einsum":
        return _einsum(op, given, shape)
    if op.type == "TensorListSetItem":  # as TensorArrays write
        return _written(op, given)
    if op.type in ("Split", "SplitV"):
        return _split(op, given)
    if not apart:
        return None
    if op.type == "TensorListStack":
        return [first]
    if op.type == "Slice":
        begin, size = (_constant(x) for x in op.inputs[1:])
        if begin is None or size is None:
            return None
        return [first[int(begin[0]) :][: int(size[0]) if size[0] >= 0 else None]]
    if op.type == "Unpack":
        if op.get_attr("axis") == 0:
            return list(first)
        return [first for _ in op.outputs]
    if op.type == "StridedSlice":
        return _sliced(op, first)
    if op.type == "GatherV2":
        index, axis = _constant(op.inputs[1]), _constant(op.inputs[2])
        if index is None or axis != 0 or op.get_attr("batch_dims"):
            return None
        taken = [first[int(n)] for n in np.ravel(index)]
        return [taken if np.ndim(index) == 1 else frozenset().union(*taken)]
    others = frozenset().union(*map(_all, given[1:]))
    if op.type == "MatMul":
        return None if op.get_attr("transpose_a") else [[own | others for own in first]]
    if op.type == "BatchMatMulV2":
        return _entrywise(op, given, shape) if shape.rank and shape.rank > 2 else None
    if op.type in _LAYERS:
        return [[own | others for own in first]]
    if op.type in ("Pad", "PadV2", "MirrorPad", "Tile"):
        lengths = _constant(op.inputs[1])
        kept = lengths is not None and np.all(lengths[0] == (1 if op.type == "Tile" else 0))
        return [[own | others for own in first]] if kept else None
    if op.type in _REDUCTIONS:
        axes = _constant(op.inputs[1])
        rank = op.inputs[0].shape.rank
        if axes is None or rank is None or 0 in {int(axis) % rank for axis in np.ravel(axes)}:
            return None
        return [first]
    if op.type == "Transpose":
        order = _constant(op.inputs[1])
        return [first] if order is not None and order[0] == 0 else None
    if op.type in ("Reshape", "Squeeze", "Softmax", "ExpandDims"):
        axis = _constant(op.inputs[1]) if op.type == "ExpandDims" else 1
        same = axis not in (None, 0) and shape.rank and shape[0] == len(first)
        return [first] if same else None
    return None


def _entrywise(op: Any, given: list[_Places], shape: Any) -> list[_Places] | None:
    if not shape.rank or shape[0] is None:
        return None

    def of_row(x: tf.Tensor, places: _Places, n: int) -> frozenset[Any]:
        aligned = isinstance(places, list) and x.shape.rank == shape.rank
        # What is broadcast is the same for all rows: its leading axis is another one of theirs.
        return places[n] if aligned and len(places) == shape[0] else _all(places)

    pairs = list(zip(op.inputs, given, strict=False))
    return [[frozenset().union(*(of_row(*pair, n) for pair in pairs)) for n in range(shape[0])]]


def _einsum(op: Any, given: list[_Places], shape: Any) -> list[_Places] | None:
    """Rows are apart where the output's leading label leads in each operand that has it."""
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


def _joined(pieces: Sequence[tf.Tensor], given: list[_Places]) -> list[_Places] | None:
    """One piece after another along the leading axis."""
    rows: list[frozenset[Any]] = []
    for piece, places in zip(pieces, given, strict=False):
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


def _sliced(op: Any, first: list[frozenset[Any]]) -> list[_Places] | None:
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


def _constant(tensor: tf.Tensor) -> Any:
    return tf.get_static_value(tensor)
