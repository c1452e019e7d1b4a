"""The scripts' own parts: every test is in one shard; the site has every page and public name."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import qpool

ROOT = Path(__file__).resolve().parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_test_is_in_one_shard() -> None:
    found = script("_shards").paths(ROOT)
    files = [file for own in found.values() for file in own]
    assert sorted(files) == sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")
    )
    assert all(found.values())


def test_the_paths_of_shards_and_of_the_quick_tests_are_there() -> None:
    module = script("_shards")
    named = [path for own in module.SHARDS.values() for path in own]
    text = (ROOT / "scripts" / "test").read_text()
    named += [line.strip(' ",') for line in text.splitlines() if line.startswith('    "tests/')]
    assert len(named) > len(module.SHARDS)
    for path in named:
        assert list(ROOT.glob(f"{path}*")), path


def test_the_site_has_every_page_and_every_public_name(tmp_path) -> None:
    docs = script("_docs")
    assert docs.build(tmp_path / "site") == 0
    reference = (tmp_path / "site" / "reference" / "qpool" / "index.html").read_text()
    reference += (tmp_path / "site" / "reference" / "measures" / "index.html").read_text()
    reference += (tmp_path / "site" / "reference" / "models" / "index.html").read_text()
    reference += (tmp_path / "site" / "reference" / "errors" / "index.html").read_text()
    for name, home in docs.public().items():
        assert f'id="{home}"' in reference.replace("workers.errors", "qpool.errors"), name
        assert inspect.getdoc(getattr(qpool, name)), name
    assert set(docs.public()) == set(qpool.__all__) - {"__version__"}
    for page in docs.pages():
        name = "" if page.stem == "README" else page.stem
        folder = tmp_path / "site" / page.parent.relative_to(ROOT) / name
        assert (folder / "index.html").exists(), page


def test_a_link_that_leads_nowhere_fails_the_site(tmp_path, monkeypatch, capfd) -> None:
    docs = script("_docs")
    page = tmp_path / "README.md"
    page.write_text("# A page\n\n[nowhere](nothing.md)\n")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "pages", lambda: [page])
    monkeypatch.setattr(docs, "REFERENCE", {})
    monkeypatch.setattr(docs, "public", dict)
    assert docs.build(tmp_path / "site") != 0
    assert "nothing.md" in capfd.readouterr().err
