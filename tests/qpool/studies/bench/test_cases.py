"""Benchmark cases are found by name, and what they find is kept. None is run: it takes minutes."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest

from qpool.studies import bench
from workers.errors import ConfigurationError


@pytest.mark.parametrize("name", bench.CASES)
def test_every_case_is_where_it_is_said_to_be(name: str) -> None:
    module, _, function = bench.CASES[name].partition(":")
    case = getattr(importlib.import_module(f"qpool.studies.bench.{module}"), function)
    required = [p for p in inspect.signature(case).parameters.values() if p.default is p.empty]
    assert not required
    assert inspect.getdoc(case)


def test_the_usual_cases_are_cases() -> None:
    assert set(bench.USUAL) < set(bench.CASES)


def test_an_unknown_case_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="roundtrip"):
        bench.run("roundtrp")


def test_what_was_found_is_kept(tmp_path) -> None:
    bench.keep("speedup", {"case": "speedup", "batch": 16}, tmp_path)
    assert json.loads((tmp_path / "speedup.json").read_text())["batch"] == 16
    assert not (tmp_path / "speedup.png").exists()
