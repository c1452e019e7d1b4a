"""The loans: made where a name is missing, unseen by others, and not made where it is there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import Mock

import pytest

from workers import sf_compat


def run(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_states_import_and_nothing_stays_behind() -> None:
    code = """
        from workers import sf_compat
        import sys, scipy.integrate
        before = hasattr(scipy.integrate, "simps")
        sf_compat.install(); sf_compat.install()
        import strawberryfields.backends.states as states
        print(callable(states.simps), hasattr(scipy.integrate, "simps") == before,
              sum(type(f).__module__ == "workers.sf_compat" for f in sys.meta_path),
              type(states.__loader__).__name__)
    """
    assert run(code) == "True True 1 SourceFileLoader"


def test_a_name_that_is_there_is_used() -> None:
    code = """
        import scipy.integrate
        scipy.integrate.simps = marker = lambda *a: "the user's"
        from workers import sf_compat
        sf_compat.install()
        import strawberryfields.backends.states as states
        print(states.simps is marker, scipy.integrate.simps is marker)
    """
    assert run(code) == "True True"


@pytest.mark.parametrize("module", ["sample", "feature"])
def test_app_data_without_pkg_resources(module: str) -> None:
    code = f"""
        import sys
        from workers import sf_compat
        sf_compat.install()
        import importlib.util
        true = importlib.util.find_spec
        importlib.util.find_spec = lambda n, *a: None if n == "pkg_resources" else true(n, *a)
        import os, strawberryfields
        sys.modules.pop("pkg_resources", None)
        sys.modules.pop("strawberryfields.apps.data.{module}", None)
        import strawberryfields.apps.data.{module} as data
        print(os.path.isdir(data.DATA_PATH), "pkg_resources" in sys.modules)
    """
    assert run(code) == "True False"


def test_simpson_integrates_as_simps_did() -> None:
    import numpy as np
    import strawberryfields.backends.states as states

    x = np.linspace(0.0, 2.0, 11)
    assert states.simps(x**2, x) == pytest.approx(8 / 3, rel=1e-12)


@pytest.mark.parametrize("first", ["install", "strawberryfields"])
def test_parameters_of_one_name_are_one_object(first: str) -> None:
    code = f"""
        import importlib.util, os, pickle, sys, types
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        from workers import sf_compat
        if {first!r} == "strawberryfields":
            import scipy.integrate
            scipy.integrate.simps = scipy.integrate.simpson
            if importlib.util.find_spec("pkg_resources") is None:  # newer Pythons come without
                sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
                sys.modules["pkg_resources"].resource_filename = os.path.join
            import strawberryfields
        sf_compat.install()
        import strawberryfields as sf
        from strawberryfields.parameters import FreeParameter
        from sympy.core.cache import clear_cache
        def build():
            program = sf.Program(1)
            with program.context as q:
                sf.ops.Xgate(2 * program.params("x")) | q[0]
            return program
        first = build()
        clear_cache()
        second = build()
        same = first.free_params["x"] is second.free_params["x"]
        same &= pickle.loads(pickle.dumps(first.free_params["x"])) is first.free_params["x"]
        found = []
        for program, x in ((first, 0.3), (second, -0.1), (first, 0.2)):
            engine = sf.Engine("fock", backend_options={{"cutoff_dim": 8}})
            state = engine.run(program, args={{"x": x}}).state
            found.append(round(float(state.quad_expectation(0)[0]), 2))
        print(same, found)
    """
    assert run(code) == "True [0.6, -0.2, 0.4]"


def matrices(cache: Path, **variables: str) -> tuple[str, int]:
    """A displacement's matrix and its derivatives, and how many functions were found compiled."""
    code = """
        from workers import sf_compat
        sf_compat.install()
        from thewalrus import fock_gradients as f
        import numpy as np
        matrix = f.displacement(0.3, 0.2, 5, np.complex128)
        all = [matrix, *f.grad_displacement(matrix, 0.3, 0.2)]
        found = sum(g.stats.cache_hits.total() for g in (f.displacement, f.grad_displacement))
        print(b"".join(x.tobytes() for x in all).hex(), found)
    """
    numbers, found = run(code, NUMBA_CACHE_DIR=str(cache), **variables).split()
    return numbers, int(found)


def test_what_numba_compiles_for_gates_is_kept(tmp_path: Path) -> None:
    expected, found = matrices(tmp_path)
    assert found == 0
    assert matrices(tmp_path) == (expected, 2)
    for file in tmp_path.rglob("*.nbc"):
        file.write_bytes(b"damaged")
    assert matrices(tmp_path) == (expected, 0)
    assert matrices(tmp_path) == (expected, 2)  # made good
    assert matrices(tmp_path, QPOOL_CACHE="off") == (expected, 0)


def test_what_cannot_be_kept_is_compiled() -> None:
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    cache = Mock(load_overload=full, save_overload=full)
    sf_compat._forgive(cache)
    assert cache.load_overload("signature", None) is None
    assert cache.save_overload("signature", None) is None
    assert full.call_count == 2
