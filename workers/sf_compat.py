"""Strawberry Fields 0.23 on current SciPy and setuptools.

Two names that SF imports are gone: ``scipy.integrate.simps`` (SciPy 1.14) and ``pkg_resources``
(setuptools 82). ``install`` puts a finder on ``sys.meta_path`` that watches for the three SF
modules that need them, and lends the missing name while such a module runs its imports. Nothing
else in the process ever sees the loan, nothing is imported ahead of time, and where a name is
present nothing is lent.

One defect is mended: in a process with many programs, a program could be run with the values of
another one (see ``_one_parameter_per_name``). And what Numba compiles for its first gates is kept
for the next process (see ``_machine_code_kept``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any


@contextlib.contextmanager
def _simps() -> Iterator[None]:
    """``scipy.integrate.simps``, which is now ``simpson`` and takes x by keyword only."""
    import scipy.integrate

    if hasattr(scipy.integrate, "simps"):
        yield
        return

    def simps(y: Any, x: Any = None, dx: float = 1.0, axis: int = -1) -> Any:
        return scipy.integrate.simpson(y, x=x, dx=dx, axis=axis)

    scipy.integrate.simps = simps
    try:
        yield
    finally:
        del scipy.integrate.simps


@contextlib.contextmanager
def _pkg_resources() -> Iterator[None]:
    """``pkg_resources.resource_filename``, the one function of it that SF calls."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources"):
        yield
        return
    lent = types.ModuleType("pkg_resources")
    lent.resource_filename = _resource_filename  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = lent
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


def _resource_filename(package: str, resource: str) -> str:
    folder = importlib.import_module(package).__path__[0]
    return f"{folder}/{resource}"


@contextlib.contextmanager
def _one_parameter_per_name() -> Iterator[None]:
    """Equal free parameters are one object.

    Strawberry Fields finds a parameter's value on the object. sympy mostly makes one object of
    those with equal names, and now and then, when its cache has dropped the first, another one; an
    expression of the first that the cache still has is then evaluated with the value of some other
    program's run, silently. With one object that cannot be: a program binds its values before it
    runs.
    """
    yield
    import sympy
    from strawberryfields.parameters import FreeParameter

    known: dict[str, Any] = {}

    def new(cls: type, name: str, **assumptions: Any) -> Any:
        if name not in known:
            known[name] = sympy.Symbol.__new__(cls, name, **assumptions)
        return known[name]

    FreeParameter.__new__ = staticmethod(new)


@contextlib.contextmanager
def _machine_code_kept() -> Iterator[None]:
    """Numba keeps the matrices of gates, and their derivatives, on disk.

    The Walrus asks for that in some of its functions (``cache=True``), not in these: each process
    that runs a circuit of Strawberry Fields as it is would compile them, for 7.7 s of a first
    gradient of four kinds of gates (0.4 s if they are found). They lie where Numba keeps the
    others: beside the module, or in the user's cache. ``QPOOL_CACHE=off`` keeps nothing.
    """
    yield
    if os.environ.get("QPOOL_CACHE") == "off":
        return
    for function in vars(sys.modules["thewalrus.fock_gradients"]).values():
        with contextlib.suppress(RuntimeError, AttributeError):  # nowhere to write; not compiled
            function.enable_caching()
            _forgive(function._cache)


def _forgive(cache: Any) -> None:
    """A disk that is full, or a file that is damaged, costs no more than compiling again."""
    load, save = cache.load_overload, cache.save_overload

    def load_overload(*args: Any) -> Any:
        try:
            return load(*args)
        except Exception:
            return None

    def save_overload(*args: Any) -> None:
        with contextlib.suppress(OSError):
            save(*args)

    cache.load_overload, cache.save_overload = load_overload, save_overload


#: Module -> what is done around its being imported.
_AROUND: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "strawberryfields.backends.states": _simps,
    "strawberryfields.apps.data.sample": _pkg_resources,
    "strawberryfields.apps.data.feature": _pkg_resources,
    "strawberryfields.parameters": _one_parameter_per_name,
    "thewalrus.fock_gradients": _machine_code_kept,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, name: str) -> None:
        self._loader = loader
        self._name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        # The module keeps its own loader: whoever asks for its source or resources finds them.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with _AROUND[self._name]():
            self._loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _AROUND:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, fullname)
        return spec


def install() -> None:
    """Watch for Strawberry Fields being imported; calling it again does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in ("strawberryfields.parameters", "thewalrus.fock_gradients"):
        if name in sys.modules:
            with _AROUND[name]():
                pass
