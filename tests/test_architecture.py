"""The rules of the house, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

#: Strategies that call the model in this process, and what they share.
IN_PLACE = ("in_place", "auto")

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted([*ROOT.glob("qpool/**/*.py"), *ROOT.glob("workers/**/*.py")])


def imports(path: Path) -> set[str]:
    """What a module imports, but for what only a type checker reads."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_workers_never_import_qpool() -> None:
    for path in ROOT.glob("workers/**/*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "qpool"}, path


#: Which packages of ``workers`` each one may know, beside itself and what lies in none.
PACKAGES = {
    "engine": (),
    "compiling": ("engine",),
    "exchange": (),
    "replica": ("engine", "compiling", "exchange"),
    "process": ("exchange", "replica"),
}

#: What of ``workers`` lies in no package: every one may know it, and it knows none. The last one is
#: a name that programs outside rely on.
NO_PACKAGE = {
    "__init__",
    "cache",
    "context",
    "collector",
    "custom_gradient",
    "errors",
    "layout",
    "logs",
    "names",
    "sf_compat",
    "tensors",
    "variables",
    "backend",
}


def test_packages_know_only_those_below_them() -> None:
    assert {path.stem for path in ROOT.glob("workers/*.py")} == NO_PACKAGE
    assert {path.parent.name for path in ROOT.glob("workers/*/*.py")} == set(PACKAGES)
    for package, others in PACKAGES.items():
        for path in ROOT.glob(f"workers/{package}/*.py"):
            parts = [name.split(".") for name in imports(path)]
            known = {name[1] for name in parts if name[0] == "workers" and len(name) > 1}
            assert known <= {*others, package, *NO_PACKAGE} - {"backend"}, path
    for name in NO_PACKAGE - {"backend"}:
        found = imports(ROOT / "workers" / f"{name}.py")
        assert not any(
            module.startswith(f"workers.{package}") for module in found for package in PACKAGES
        )


#: Which folders of ``qpool`` each one may not know, but for types: nothing runs back up.
ABOVE = {
    "bridge": {
        "executors",
        "training",
        "measure",
        "studies",
        "generator",
        "pooled",
        "models",
        "cli",
    },
    "children": {"executors", "models", "training", "measure", "studies", "generator", "cli"},
    "models": {"executors", "training", "measure", "studies", "cli"},
    "executors": {"training", "measure", "studies", "generator", "pooled", "cli"},
    "measure": {"training", "studies", "cli"},
    "training": {"studies", "cli"},
    "studies": {"cli"},
}


def test_nothing_of_qpool_runs_back_up() -> None:
    for folder, above in ABOVE.items():
        for path in ROOT.glob(f"qpool/{folder}/**/*.py"):
            known = {name.split(".")[1] for name in imports(path) if name.startswith("qpool.")}
            assert not known & above, path
    for path in ROOT.glob("qpool/*.py"):
        known = {name.split(".")[1] for name in imports(path) if name.startswith("qpool.")}
        if path.stem not in ("__init__", "__main__", "cli", "applications"):
            assert not known & {"training", "measure", "studies", "cli"}, path


def test_dispatch_and_tiles_are_pure() -> None:
    impure = {"os", "time", "threading", "multiprocessing", "select", "tensorflow", "random"}
    for name in ("qpool/tiles.py", "qpool/executors/processes/dispatch.py"):
        assert not imports(ROOT / name) & impure, name


def test_only_the_bridge_and_the_trainer_know_tensorflow_and_the_pool() -> None:
    for path in ROOT.glob("qpool/executors/**/*.py"):
        if path.parent.name not in IN_PLACE:
            assert "tensorflow" not in imports(path), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_open_with_what_they_own_and_stay_small(path: Path) -> None:
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
    assert len(source.splitlines()) <= 500, f"{path} wants splitting"
