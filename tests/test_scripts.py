"""The scripts' own parts: every test is in one shard."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shards():
    spec = importlib.util.spec_from_file_location("_shards", ROOT / "scripts" / "_shards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_test_is_in_one_shard() -> None:
    found = shards().paths(ROOT)
    files = [file for own in found.values() for file in own]
    assert sorted(files) == sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")
    )
    assert all(found.values())


def test_the_paths_of_shards_and_of_the_quick_tests_are_there() -> None:
    module = shards()
    named = [path for own in module.SHARDS.values() for path in own]
    text = (ROOT / "scripts" / "test").read_text()
    named += [line.strip(' ",') for line in text.splitlines() if line.startswith('    "tests/')]
    assert len(named) > len(module.SHARDS)
    for path in named:
        assert list(ROOT.glob(f"{path}*")), path
