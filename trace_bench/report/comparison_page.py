"""The page of several runs: the tables of their comparison, figures, and the way to the page of each run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from trace_bench.report.comparison import Comparison
from trace_bench.report.figures import RUNS_NAMES, pictures_of_runs
from trace_bench.report.html import document, table_view, text_html, write_pictures
from trace_tasks.data.files import write_text


def write_comparison_page(comparison: Comparison, file: Path, head: str = "") -> None:
    """Writes the page, and its figures as SVG and PNG into a folder next to it, `<name>-figures`.

    Args:
        comparison: What to show.
        file: Where.
        head: Markdown to begin with, its first line a title; by default the file's name without the ending.
    """
    head = head or f"# {file.stem}"
    folder = file.with_name(f"{file.stem}-figures")
    figures = write_pictures(folder, pictures_of_runs(comparison), RUNS_NAMES)
    reports = {e.name: e.run.path / "report.html" for e in comparison.entries}
    links = {
        name: quote(os.path.relpath(report, file.parent).replace(os.sep, "/"))
        for name, report in reports.items()
        if report.exists()
    }
    blocks: list[Any] = []
    for table in comparison.tables:
        blocks.append(text_html(f"## {table.title}\n\n{table.about[0].upper()}{table.about[1:]}."))
        if table.title == "Runs" and "runs" in figures:
            blocks.append(figures["runs"])
        heat = comparison.final_ends() if table.title.startswith("Final") else ()
        blocks.append(table_view(table, links, heat=heat, elsewhere="the .md and .csv"))
    if "stages" in figures:
        blocks += [text_html("## Over the stages"), figures["stages"]]
    blocks.append(text_html("## What the numbers are\n\n" + "\n".join(f"- {note}" for note in comparison.notes)))
    about = f"{len(comparison.entries)} runs, set against `{comparison.against.name}`."
    foot = Markup("Made by <code>trace-bench report</code> from the files of the runs.")
    if figures:
        foot += Markup(" The figures are in the folder <code>{}</code> as SVG and PNG.").format(folder.name)
    page = document(
        title=head.partition("\n")[0].lstrip("# "),
        head=[text_html(text) for text in (head, about, *(f"> {warning}" for warning in comparison.warnings))],
        parts={"comparison": blocks},
        wide=True,
        foot=foot,
    )
    write_text(file, page)
