"""The public names, and what importing costs."""

from __future__ import annotations

import programs
import pytest

import qpool
import qpool.errors
import workers.errors


def run(code: str) -> str:
    return programs.run(code).stdout.strip()


def test_public_names() -> None:
    assert set(qpool.__all__) == {
        "CircuitLayer",
        "Cluster",
        "Engine",
        "Monitor",
        "MonitorCallback",
        "ParallelGenerator",
        "Pool",
        "QuantumGANTrainer",
        "__version__",
        "create_parallel_generator",
        "errors",
        "gradient_flow",
        "gradient_norms",
        "metrics",
        "models",
        "parallelize",
        "register_strategy",
        "states",
        "suggest_batch",
    }
    for name in qpool.__all__:
        assert getattr(qpool, name) is not None
    assert set(qpool.__all__) <= set(dir(qpool))
    with pytest.raises(AttributeError, match="no_such_name"):
        qpool.no_such_name  # noqa: B018


def test_every_error_is_public() -> None:
    defined = {
        name
        for name, value in vars(workers.errors).items()
        if isinstance(value, type) and issubclass(value, workers.errors.QPoolError | Warning)
    }
    assert set(qpool.errors.__all__) == defined


@pytest.mark.parametrize("module", ["qpool", "qpool.cli"])
def test_importing_is_light(module: str) -> None:
    heavy = "tensorflow keras strawberryfields numpy scipy matplotlib sklearn psutil"
    code = f"import sys, {module}; print(*[m for m in {heavy!r}.split() if m in sys.modules])"
    assert run(code) == ""


def test_a_pool_loads_tensorflow_in_its_own_process_first() -> None:
    """Made before TensorFlow is imported, its import and the caller's go on side by side."""
    heavy = "tensorflow keras strawberryfields scipy matplotlib sklearn"
    code = (
        f"import sys, qpool; qpool.Pool; print(*[m for m in {heavy!r}.split() if m in sys.modules])"
    )
    assert run(code) == ""


def test_strawberry_fields_imports_after_qpool() -> None:
    code = "import qpool; import strawberryfields as sf; print(sf.__version__)"
    assert run(code).splitlines()[-1].startswith("0.23")
