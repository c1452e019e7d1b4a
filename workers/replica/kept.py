"""What a call leaves behind it: tensors in the model's attributes, its parts', its lists and dicts.

Owns where that is, and how it is left there by a call that is compiled; or, where that cannot be,
what is there in its place: not what an earlier call has left.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import operator
import types
from collections.abc import Callable, Container, Iterator, MutableMapping, Sequence
from typing import Any, NoReturn

import tensorflow as tf

from workers.compiling import rows
from workers.errors import AttributeNotSetError, ModelError
from workers.replica import functions, serialization

#: Whose objects hold no tensors of a call's, or none that are anybody else's.
_LIBRARIES = ("tensorflow.", "keras.", "numpy.", "sympy.", "builtins.", "workers.engine.", "qpool.")

#: Strawberry Fields' states and results are values; its engines and programs hold much.
_VALUES = ("strawberryfields.backends.", "strawberryfields.result.", "workers.engine.state.")

#: The key of what a list has more than before, and that of all of a list.
_GROWN, _ALL = object(), object()

#: Entries of a list while a call is traced, at least: that it keeps to some length is seen then.
_LONG = 4096

#: What may be asked of a tensor, a state, or a list of them, beside attributes.
_ASKED = tuple(
    """
    array bool call contains float getitem int iter len add radd sub rsub mul rmul truediv rtruediv
    matmul rmatmul pow rpow neg abs lt le gt ge
    """.split()  # noqa: SIM905 - a list of names is read as words
)

#: Levels of lists, dicts and objects within each other.
_DEEP = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """A place that a call sets: an entry of a ``holder``, a dict (of attributes, or plain), or what
    it appends to one, a list. ``name`` is what to call it; ``value`` what is there, with a
    ``tf.TensorSpec`` for each tensor, which ``specs`` are. ``new``: there was nothing before the
    call, or None.
    """

    holder: Any
    key: Any
    name: str
    value: Any
    specs: tuple[tf.TensorSpec, ...]
    new: bool = True

    @property
    def is_attribute(self) -> bool:
        """Whether it is one of the model's own."""
        return self.name == f"self.{self.key}"

    def is_there(self) -> bool:
        """Whether there is something."""
        return not isinstance(self.holder, MutableMapping) or self.key in self.holder

    @property
    def is_listed(self) -> bool:
        """Whether it is in a list that calls fill."""
        return self.key is _GROWN or self.key is _ALL

    @property
    def place(self) -> tuple[int, Any]:
        """Which place it is."""
        holder = getattr(self.holder, "module", self.holder)  # of names that are bound
        return id(holder), _GROWN if self.is_listed else self.key

    def replaced(self) -> Kept:
        """The same, of a list that each call fills anew."""
        return dataclasses.replace(self, key=_ALL) if self.key is _GROWN else self

    @property
    def may_be_left(self) -> bool:
        """Whether a compiled call can: not in a deque, of which what was there falls out, nor what
        a function closes over."""
        return bool(self.specs) and not isinstance(self.holder, collections.deque)

    def read(self, length: int = 0) -> Any:
        """What is there: of a list that is appended to, what it has more than so many."""
        if self.is_listed:
            return list(self.holder)[length if self.key is _GROWN else 0 :]
        return self.holder[self.key]

    def tensors(self) -> list[tf.Tensor]:
        """What the call that has just been left there."""
        more = len(self.value) if self.is_listed else 0
        return tensors_of(self.read(self.length() - more))

    def length(self) -> int:
        """Of a list that is appended to, now."""
        return len(self.holder) if self.is_listed else 0

    def write(self, tensors: Sequence[tf.Tensor]) -> None:
        """Leave these there, as the call leaves its own."""
        left = iter(tensors)
        self._put(_with(self.value, lambda _: next(left)))

    def unset(self) -> None:
        """Have what is there say that no compiled call has set it."""
        if self.is_listed:
            items = [Unset(self.name) if tensors_of(item) else item for item in self.holder]
            serialization.set_items(self.holder, items or [Unset(self.name)])
        else:
            self.holder[self.key] = Unset(self.name)

    def of_fewer(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """What it leaves of what a call with more rows, the last one again and again, left."""
        pairs = zip(tensors, self.specs, strict=False)
        return [x if x.shape == spec.shape else x[: spec.shape[0]] for x, spec in pairs]

    def of_rows(self, stacked: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """What the whole call leaves, of what the turn of each row left, stacked: that of the last
        row, that of all rows together, or one thing more for each.

        Raises:
            ValueError: none of that is of the shape that the model's own call left.
        """
        if len(self.specs) == len(stacked):
            return [_of_rows(x, spec) for x, spec in zip(stacked, self.specs, strict=True)]
        count = int(stacked[0].shape[0]) if stacked else 0
        each = [x[n] for n in range(count) for x in stacked]
        if [x.shape for x in each] != [spec.shape for spec in self.specs]:
            raise ValueError(f"{self.name} is no thing for each row, nor of the last one")
        return each

    def _put(self, value: Any) -> None:
        if self.key is _GROWN:
            self.holder.extend(value)
        elif self.key is _ALL:
            serialization.set_items(self.holder, value)
        else:
            self.holder[self.key] = value


class Before:
    """What a model and its parts held before a call of a method, and containers of its module."""

    def __init__(self, model: Any, method: str) -> None:
        self._parts = {id(part): part for part in serialization.walk(model)}
        self._held: list[tuple[str, Any, Any]] = []
        for name, holder in _holders({"self": model} | functions.containers(model, method)):
            copied = dict(holder) if isinstance(holder, MutableMapping) else list(holder)
            self._held.append((name, holder, copied))

    def put_back(self) -> None:
        """Have what it held be there again where there are tensors now, or other numbers."""
        for _, holder, content in self._held:
            if isinstance(holder, MutableMapping):
                counted = [k for k, then in content.items() if type(then) in (int, float)]
                holder.update(
                    {k: content[k] for k in counted if type(holder.get(k)) in (int, float)}
                )
        before = {id(holder): content for _, holder, content in self._held}
        for kept in self.kept():
            holder, content = kept.holder, before[id(kept.holder)]
            if isinstance(holder, MutableMapping) and kept.key not in content:
                del holder[kept.key]
            elif kept.is_listed:
                serialization.set_items(holder, content)
            else:
                holder[kept.key] = content[kept.key]

    def kept(self) -> list[Kept]:
        """Where there are tensors now that were not there."""
        found = []
        for name, holder, before in self._held:
            for key, called, value in _news(name, holder, before):
                specs: list[tf.TensorSpec] = []

                def spec(tensor: Any, specs: list[tf.TensorSpec] = specs) -> tf.TensorSpec:
                    specs.append(tf.TensorSpec(tensor.shape, tensor.dtype))
                    return specs[-1]

                template = _with(value, spec, self._parts)
                if specs or _closes_over_tensors(value):
                    new = key is _GROWN or (isinstance(before, dict) and before.get(key) is None)
                    found.append(Kept(holder, key, called, template, tuple(specs), new))
        return found


def tensors_of(value: Any) -> list[tf.Tensor]:
    """Those in lists, dicts and objects, in order."""
    found: list[tf.Tensor] = []

    def note(tensor: tf.Tensor) -> tf.Tensor:
        found.append(tensor)
        return tensor

    _with(value, note)
    return found


def _closes_over_tensors(value: Any) -> bool:
    cells = value.__closure__ if isinstance(value, types.FunctionType) else None
    return any(tensors_of(cell.cell_contents) for cell in cells or ())


def _raise(unset: Unset, *_: Any, **__: Any) -> NoReturn:
    raise AttributeNotSetError(
        f"{unset.name} is not there: the last call was compiled, and leaves nothing there. So "
        "return what is to be read afterwards, or call the model as it is, strategy='sequential'"
    )


class Unset:
    """In the place of what a call would have left, and what was compiled of it does not."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, which a compiled call does not set>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by libraries, of anything
            raise AttributeError(name)
        _raise(self)


for _name in _ASKED:
    setattr(Unset, f"__{_name}__", _raise)


class Wrapped:
    """A call of a model's that returns more with its result."""

    def __init__(self, call: Callable[..., Any], model: Any, what: Sequence[Any]) -> None:
        self.plain, self._what = call, what
        self.__self__ = model
        self.__qualname__ = getattr(call, "__qualname__", type(call).__qualname__)


class Keeping(Wrapped):
    """What it has left in the places that it keeps. What it leaves there it may not look at before,
    where it is traced: what an earlier call has left would be a constant. Nor may it leave things
    in other places then than it did before, nor hand on what was there: such a call goes on from
    the one before."""

    def __init__(
        self,
        call: Callable[..., Any],
        model: Any,
        method: str,
        kept: Sequence[Kept],
        lost: Sequence[Kept],
    ) -> None:
        super().__init__(call, model, kept)
        self._method, self._lost = method, lost

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if tf.executing_eagerly():
            lengths = [kept.length() for kept in self._what]
            result = self.plain(*args, **kwargs)
            pairs = zip(self._what, lengths, strict=True)
            return self._with(result, [tensors_of(kept.read(n)) for kept, n in pairs])
        for lost in self._lost:
            lost.unset()
        stand_ins = {kept: _stand_in(kept) for kept in self._what if kept.is_there()}
        lengths = [kept.length() for kept in self._what]
        before = Before(self.__self__, self._method)
        result = self.plain(*args, **kwargs)
        handed_on = {id(x.op) for _, tensors in stand_ins.values() for x in tensors}
        places = (*self._what, *self._lost)
        known = {kept.place for kept in places}
        within = {id(part) for kept in places if kept.is_there() for part in _within(kept.read())}
        for other in before.kept():
            is_known = other.place in known or id(other.holder) in within
            if not (is_known or all(_is_constant(x, handed_on) for x in other.tensors())):
                raise ModelError(f"it leaves a tensor in {other.name}, which not each call does")
        return self._with(
            result,
            [
                _left(kept, length, stand_ins)
                for kept, length in zip(self._what, lengths, strict=True)
            ],
        )

    def of_rows(self, found: Any) -> Any:
        """Of what all rows' turns have given: see ``Kept.of_rows``."""
        if not self._what:
            return found
        result, left = found
        return result, [kept.of_rows(each) for kept, each in zip(self._what, left, strict=True)]

    def _with(self, result: Any, left: list[list[tf.Tensor]]) -> Any:
        if not self._what:
            return result
        looked_at = rows.looked_at()
        if looked_at is not None:
            for kept, tensors in zip(self._what, left, strict=True):
                looked_at.append((kept.name, tensors, len(kept.specs)))
            return result, []
        if rows.of_one():
            return result, [[x[None] for x in each] for each in left]
        for kept, tensors in zip(self._what, left, strict=True):
            if len(tensors) != len(kept.specs) and not tf.executing_eagerly():
                raise ModelError(f"{kept.name} has another number of tensors with each call")
        return result, left


def _stand_in(kept: Kept) -> tuple[Any, list[tf.Tensor]]:
    """What was in a place, and tensors of the graph that are there now in its place; of a list, in
    which nothing is to be looked at, none."""
    if kept.is_listed:
        length = max(_LONG, len(kept.holder))
        serialization.set_items(kept.holder, [Unset(kept.name)] * length)
        return None, []
    value = kept.read()
    stand_ins: list[tf.Tensor] = []

    def stand_in(tensor: tf.Tensor) -> tf.Tensor:
        stand_ins.append(tf.identity(tensor))
        return stand_ins[-1]

    kept.holder[kept.key] = _with(value, stand_in)
    return value, stand_ins


def _left(
    kept: Kept, length: int, before: dict[Kept, tuple[Any, list[tf.Tensor]]]
) -> list[tf.Tensor]:
    """What a traced call has left in a place, of which ``before`` says what was there."""
    if kept.is_listed:
        all_of_it = kept.key is _ALL
        old = list(kept.holder)[: None if all_of_it else length]
        if sum(isinstance(item, Unset) for item in old) != (0 if all_of_it else length):
            raise ModelError(f"{kept.name} is not only appended to")
    now = tensors_of(kept.read(length)) if kept.is_there() else []
    value, stand_ins = before.get(kept, (None, []))
    if stand_ins and len(now) == len(stand_ins) and all(map(operator.is_, now, stand_ins)):
        if not kept.new:
            raise ModelError(f"{kept.name} is not left in each call")
        kept.holder[kept.key] = value  # made once
        return tensors_of(value)
    if any(x.consumers() for x in stand_ins):
        raise ModelError(f"what an earlier call has left in {kept.name} is looked at")
    all_stand_ins = {id(x) for _, tensors in before.values() for x in tensors}
    if any(id(x) in all_stand_ins for x in now):
        raise ModelError(f"{kept.name} is what an earlier call has left somewhere")
    return now


def _within(value: Any) -> Iterator[Any]:
    """The lists and dicts in a value, of attributes too."""
    for part in serialization.walk(value):
        yield part
        yield getattr(part, "__dict__", None)


def _is_constant(tensor: tf.Tensor, but: Container[int]) -> bool:
    """Whether nothing but constants is behind it, and none of the operations ``but``."""
    if not tf.is_symbolic_tensor(tensor):
        return True
    seen: set[int] = set()
    ahead = [tensor.op]
    while ahead:
        op = ahead.pop()
        if id(op) not in seen:
            seen.add(id(op))
            if id(op) in but or (not op.inputs and op.type != "Const"):
                return False
            ahead += [x.op for x in op.inputs]
    return True


def _holders(roots: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Attribute dicts of the user's objects in these, and the lists and dicts, by name."""
    seen: set[int] = set()
    ahead = collections.deque(roots.items())
    while ahead:
        name, part = ahead.popleft()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, MutableMapping):
            name = "" if isinstance(part, functions.Bound) else name
            yield name, part
            ahead.extend((f"{name}[{key!r}]" if name else key, x) for key, x in part.items())
        elif isinstance(part, list | tuple | collections.deque):
            if not isinstance(part, tuple):
                yield name, part
            ahead.extend((f"{name}[{n}]", value) for n, value in enumerate(part))
        elif not _is_of(part, (*_LIBRARIES, "strawberryfields.")):
            attributes = getattr(part, "__dict__", None)
            if isinstance(attributes, dict):
                yield f"{name}.", attributes
                ahead.extend((f"{name}.{key}", value) for key, value in attributes.items())


def _news(name: str, holder: Any, before: Any) -> Iterator[tuple[Any, str, Any]]:
    """The keys, names and values of what a holder has, and had not."""
    if isinstance(holder, MutableMapping):
        for key, value in holder.items():
            if key not in before or before[key] is not value:
                entry = name and not name.endswith(".")
                yield key, f"{name}[{key!r}]" if entry else f"{name}{key}", value
        return
    if isinstance(holder, collections.deque):
        there = set(map(id, before))
        yield _GROWN, name, [value for value in holder if id(value) not in there]
        return
    same = all(a is b for a, b in zip(holder, before, strict=False))
    if len(holder) > len(before) and same:
        yield _GROWN, name, holder[len(before) :]
    elif len(holder) == len(before):
        for n, (now, then) in enumerate(zip(holder, before, strict=True)):
            if now is not then:
                yield n, f"{name}[{n}]", now
    elif not same:
        yield _ALL, name, list(holder)


def _with(
    value: Any, function: Callable[[Any], Any], known: Any = (), path: tuple[int, ...] = ()
) -> Any:
    """A value like it, with ``function`` of each of its tensors in the tensor's place; what is
    ``known`` is left alone."""
    if isinstance(value, tf.Tensor | tf.TensorSpec):
        return function(value)
    if id(value) in path or len(path) > _DEEP:
        return value
    path = (*path, id(value))
    if isinstance(value, dict):
        parts = {key: _with(part, function, known, path) for key, part in value.items()}
        return value if all(parts[key] is value[key] for key in parts) else parts
    if isinstance(value, list | tuple):
        items = [_with(part, function, known, path) for part in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(value, type) or id(value) in known:
        return value
    if not _is_of(value, _VALUES) and _is_of(value, (*_LIBRARIES, "strawberryfields.")):
        return value
    changed = {name: _with(part, function, known, path) for name, part in attributes.items()}
    if all(changed[name] is attributes[name] for name in changed):
        return value
    found = copy.copy(value)
    found.__dict__.update(changed)
    return found


def _of_rows(stacked: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
    if stacked.shape[1:] == spec.shape:
        return stacked[-1]
    together = tf.reshape(stacked, [-1, *stacked.shape[2:]]) if stacked.shape.rank > 1 else stacked
    if together.shape != spec.shape:
        raise ValueError("what the rows leave is not what the call leaves")
    return together


def _is_of(value: Any, modules: tuple[str, ...]) -> bool:
    return f"{type(value).__module__}.".startswith(modules)
