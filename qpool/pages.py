"""Reports for people: a list of blocks as Markdown, and as one HTML file that can be read alone.

Owns how a heading, a text, a table and a picture look. What is said is the caller's.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: ("title" | "heading" | "text" | "picture" | "table", content): a picture is a path below the
#: report's folder, a table its header and its rows.
Block = tuple[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown; pictures are linked."""
    lines: list[str] = []
    for kind, content in blocks:
        if kind == "title":
            lines += [f"# {content}", ""]
        elif kind == "heading":
            lines += [f"## {content}", ""]
        elif kind == "text":
            lines += [content, ""]
        elif kind == "picture":
            lines += [f"![{Path(content).stem}]({content})", ""]
        else:
            header, rows = content
            lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def page(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as one HTML file, with the pictures of ``folder`` in it."""
    parts = []
    title = next((content for kind, content in blocks if kind == "title"), "qpool")
    for kind, content in blocks:
        if kind in ("title", "heading"):
            tag = "h1" if kind == "title" else "h2"
            parts.append(f"<{tag}>{html.escape(content)}</{tag}>")
        elif kind == "text":
            parts.append(f"<p>{html.escape(content)}</p>")
        elif kind == "picture":
            data = base64.b64encode((folder / content).read_bytes()).decode()
            alt = html.escape(Path(content).stem)
            parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
        else:
            header, rows = content
            cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
            lines = [
                "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>"
                for row in rows
            ]
            parts.append(f"<div class='wide'><table><tr>{cells}</tr>{''.join(lines)}</table></div>")
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>"
    )
