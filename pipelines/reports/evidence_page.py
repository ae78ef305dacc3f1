"""The report: one self-contained HTML page with tables and figures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipelines.reports.tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0 0.2rem; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; white-space: nowrap; }
img { max-width: 100%; }
.note, .origin { color: #555; font-size: 13px; }
code { background: #f4f4f4; padding: 0 0.2rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Origin:
    """Origin of a figure: the MLflow runs, the seeds and the command that made it."""

    run_id: str
    nested: list[str]
    """Runs of the trainings."""
    seeds: list[int]
    command: str


@dataclass(frozen=True)
class Section:
    """A part of the page. ``figures`` are PNG files by name, in order."""

    title: str
    text: list[str]
    tables: list[Table]
    figures: dict[str, bytes]
    origin: Origin


def page(title: str, sections: Sequence[Section]) -> str:
    """Return an HTML page without references to other files or hosts."""
    body = "\n".join(map(_section, sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _section(section: Section) -> str:
    origin = _origin(section.origin)
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in section.text]
    parts += map(_table, section.tables)
    if not section.figures:
        parts.append(origin)
    for name, png in section.figures.items():
        data = base64.b64encode(png).decode()
        parts.append(f'<p><img alt="{escape(name)}" src="data:image/png;base64,{data}"></p>\n{origin}')
    return "\n".join(parts)


def _origin(origin: Origin) -> str:
    seeds = ", ".join(map(str, origin.seeds))
    nested = f" with {', '.join(run[:8] for run in origin.nested)}" if origin.nested else ""
    return (
        f'<p class="origin">Run <code>{escape(origin.run_id)}</code>{escape(nested)}. '
        f"Seeds: {escape(seeds)}. Command: <code>{escape(origin.command)}</code></p>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'\n<p class="note">{escape(table.note)}.</p>' if table.note else ""
    return f"<table><caption>{escape(table.title)}</caption><tr>{head}</tr>\n{rows}</table>{note}"
