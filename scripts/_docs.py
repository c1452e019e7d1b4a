"""The site: pages are the READMEs where they lie, and a reference made of docstrings.

By MkDocs with its Material theme and mkdocstrings, which read docstrings without running the code,
link names to each other, have a search of their own, and fail where a link leads nowhere. Owns
which names are public enough to have a place, and nothing of what is said of them.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Pages of the reference: their names, and what is on them beside ``qpool``'s own public names.
REFERENCE: dict[str, list[str]] = {
    "models": ["qpool.models"],
    "measures": ["qpool.metrics", "qpool.states"],
    "errors": ["workers.errors"],
    "engine": ["workers.engine.engine.TracedEngine", "workers.engine.backend.TracedTFBackend"],
    "campaigns": [
        "qpool.training.campaign.campaign.Campaign",
        "qpool.training.campaign.progress.report",
        "qpool.training.campaign.progress.run_directory",
    ],
    "strategies": ["qpool.executors.base.Executor", "qpool.executors.base.Options"],
}

CONFIGURATION = """
site_name: qpool
site_dir: {site}
docs_dir: {docs}
theme:
  name: material
  font: false
  features: [navigation.indexes, content.code.copy, search.highlight]
extra_css: [wide.css]
plugins:
  - search
  - mkdocstrings:
      handlers:
        python:
          paths: [{root}]
          options:
            docstring_style: google
            show_source: false
            show_root_heading: true
            show_root_full_path: false
            show_signature_annotations: true
            separate_signature: true
            heading_level: 2
            filters: ["!^_"]
markdown_extensions: [tables, admonition, pymdownx.superfences, toc]
exclude_docs: |
  *.py
validation:
  links: {{not_found: warn, anchors: warn, unrecognized_links: warn}}
  nav: {{omitted_files: ignore}}
"""

#: Pictures of characters and tables of figures need the room.
STYLE = ".md-grid { max-width: 78rem; } .md-typeset pre > code { font-size: 0.62rem; }"

_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def build(site: Path) -> int:
    """Write the site; the exit code, which is not 0 where anything is warned of."""
    with tempfile.TemporaryDirectory(prefix="qpool-docs-") as folder:
        docs = Path(folder, "docs")
        for page in pages():
            _copy(page, docs)
        _reference(docs / "reference")
        (docs / "wide.css").write_text(STYLE)
        configuration = Path(folder, "mkdocs.yml")
        configuration.write_text(CONFIGURATION.format(site=site, docs=docs, root=ROOT))
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        command += ["-f", str(configuration)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        return done.returncode


def pages() -> list[Path]:
    """The repository's own Markdown: READMEs, and what changed."""
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for top in ("qpool", "workers", "scripts", "tests"):
        found += sorted((ROOT / top).rglob("README.md"))
    return found


def public() -> dict[str, str]:
    """``qpool``'s public names, each with the full name of what it is."""
    tree = ast.parse((ROOT / "qpool" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == "_HOMES" and node.value is not None:
                homes: dict[str, str] = ast.literal_eval(node.value)
    return {
        name: home if home == f"qpool.{name}" else f"{home}.{name}" for name, home in homes.items()
    }


def _copy(page: Path, docs: Path) -> None:
    """A page and the files of the repository that it links to or shows, where they lie."""
    where = docs / page.relative_to(ROOT)
    where.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text()
    for link, _ in _LINK.findall(text):
        target = (page.parent / link).resolve()
        if target.is_file() and target.is_relative_to(ROOT) and target.suffix != ".md":
            other = docs / target.relative_to(ROOT)
            if target.suffix == "" or target.suffix == ".py":  # shown as text
                text = text.replace(f"]({link})", f"]({link}.txt)")
                other = other.with_name(other.name + ".txt")
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, other)
    where.write_text(text)


def _reference(folder: Path) -> None:
    folder.mkdir(parents=True)
    modules = {name for names in REFERENCE.values() for name in names}
    own = sorted(name for name in public().values() if name not in modules | {"qpool.errors"})
    sections = {"qpool": own, **REFERENCE}
    for page, names in sections.items():
        body = "\n\n".join(f"::: {name}" for name in names)
        (folder / f"{page}.md").write_text(f"# {page}\n\n{body}\n")


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").resolve()))
