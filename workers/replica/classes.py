"""Classes that travel by value (a script's, a notebook's), where they arrive.

cloudpickle gives each a number, and who unpickles one that is known by it gets that very class:
with all of its attributes set anew, its methods to copies that look up their globals in a copy of
the script's. Within the process that the class came from, that is the user's own class. Owns what
is done instead.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

from cloudpickle import cloudpickle


class Classes:
    """What pickles are read with. A class that is here already stays as it is.

    Of ``copies``, a class is made once for all that is read with this, beside the one that it is a
    copy of: as in a process of its own.
    """

    def __init__(self, *, copies: bool = False) -> None:
        self._copies: dict[str, type] | None = {} if copies else None
        self._here: list[type] = []

    def loads(self, data: bytes) -> Any:
        """As ``pickle.loads``."""
        return _Unpickler(data, self).load()

    def make(self, skeleton: Callable[..., type], *told: Any) -> type:
        """The class that is told by what cloudpickle makes its ``skeleton`` of."""
        *first, number, extra = told
        if self._copies is None:
            known = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(number)
        else:
            known = self._copies.get(number)
        if known is not None:
            self._here.append(known)
            return known
        if self._copies is None:
            return skeleton(*told)
        made = self._copies[number] = skeleton(*first, None, extra)
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS[made] = number  # by which it travels back
        return made

    def fill(self, made: type, state: Any) -> type:
        """Give a class that was made its attributes."""
        if any(made is known for known in self._here):
            return made
        filled: type = cloudpickle._class_setstate(made, state)
        return filled


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, classes: Classes) -> None:
        super().__init__(io.BytesIO(data))
        self._classes = classes

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if module == cloudpickle.__name__:
            if name in ("_make_skeleton_class", "_make_skeleton_enum"):
                return lambda *told: self._classes.make(found, *told)
            if name == "_class_setstate":
                return self._classes.fill
        return found


def loads(data: bytes) -> Any:
    """As ``pickle.loads``, but that classes which are here already stay as they are."""
    return Classes().loads(data)
