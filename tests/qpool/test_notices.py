"""What is said to a person: advice that fits the reason, one warning, a summary."""

from __future__ import annotations

import pytest

from qpool import notices
from qpool.executors import Options
from workers.compiling.compiled import Choice
from workers.errors import NotCompiledWarning


class Model:
    pass


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("xla: AttributeError: 'SymbolicTensor' object has no attribute 'numpy'", ".numpy()"),
        ("it returns NumPy arrays", "return tensors"),
        ("xla: Error: Using a symbolic `tf.Tensor` as a Python `bool`", "tf.where"),
        ("xla: UntraceableError: the engine goes on ...; call engine.reset()", "engine.reset()"),
        ("xla: UntraceableError: MeasureFock | (q[0]) cannot be traced", "select="),
        ("the model draws random numbers", "SeedGenerator"),
        ("the call changes its variable 'n'", "in the caller"),
        ("xla, graph: ModelError: it does more than compute: AssignVariableOp", "a tensor"),
        ("xla: output 0 differs from the eager one", ""),
    ],
)
def test_advice_fits_the_reason(reason: str, words: str) -> None:
    assert words in notices.advice(reason)
    assert bool(notices.advice(reason)) == bool(words)


def test_a_method_is_warned_of_once_and_only_if_it_computes_circuits_slowly() -> None:
    slow, fast = Choice("eager", "it returns NumPy arrays", 0.1), Choice("xla", "", 1.0)
    options = Options()
    notices.not_compiled(Model(), "__call__", fast, 3, options)
    notices.not_compiled(Model(), "__call__", slow, 0, options)
    notices.not_compiled(Model(), "__call__", slow, 3, Options(engine="stock"))
    with pytest.warns(NotCompiledWarning, match="Model is not compiled") as caught:
        notices.not_compiled(Model(), "__call__", slow, 3, options)
    assert caught[0].filename == __file__
    notices.not_compiled(Model(), "__call__", slow, 3, options)
    with pytest.warns(NotCompiledWarning, match=r"Model\.generate"):
        notices.not_compiled(Model(), "generate", slow, 3, options)


def test_a_summary_says_what_computes_and_what_is_slow() -> None:
    stats = {
        "strategy": "processes",
        "samples_per_second": 12345.6,
        "tiles_by_batch": {16: 8, 32: 8},
        "pool": {"workers": [{}, {}]},
        "compiled": [
            {"method": "__call__", "level": "xla", "by_rows": True, "why_not_better": ""},
            {"method": "sample", "level": "eager", "why_not_better": "it returns NumPy arrays"},
        ],
    }
    unpooled = [{"method": "validate", "level": "graph", "by_rows": False, "why_not_better": ""}]
    assert notices.summary("Model", stats, unpooled, ["the engine of 'gaussian'"]).splitlines() == [
        "Model, pooled: processes, 2 workers, tiles of 8 rows, 12,346 samples/s",
        "  __call__: compiled by XLA, its loop over rows traced once",
        "  sample: not compiled: it returns NumPy arrays. Instead: return tensors, and call "
        ".numpy() on what comes back",
        "  validate (not pooled): a graph",
        "  left as it is: the engine of 'gaussian'",
    ]
    assert notices.summary("Model", {}, [], []) == "Model, pooled: not called yet"
