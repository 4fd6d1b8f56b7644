"""The page of several runs: the tables of their comparison, figures, and the way to the page of each run."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from trace_bench.comparison import Comparison
from trace_bench.figures import RUNS_NAMES, pictures_of_runs
from trace_bench.html import document, figure_html, table_html, text_html, write_pictures
from trace_tasks.data.files import write_text


def write_page(comparison: Comparison, file: Path, head: str = "") -> None:
    """Writes the page, and its figures as SVG and PNG into a folder beside it, `<name>-figures`.

    Args:
        comparison: What to show.
        file: Where.
        head: Markdown to begin with, its first line a title; by default the file's name without the ending.
    """
    head = head or f"# {file.stem}"
    folder = file.with_name(f"{file.stem}-figures")
    drawn = {picture.name: picture for picture in pictures_of_runs(comparison)}
    write_pictures(folder, drawn.values(), RUNS_NAMES)
    reports = {e.name: e.run.path / "report.html" for e in comparison.entries}
    links = {
        name: quote(os.path.relpath(report, file.parent).replace(os.sep, "/"))
        for name, report in reports.items()
        if report.exists()
    }
    body = ['<main class="wide">']
    for table in comparison.tables:
        body.append(text_html(f"## {table.title}\n\n{table.about[0].upper()}{table.about[1:]}."))
        if table.title == "Runs" and "runs" in drawn:
            body.append(figure_html(drawn["runs"]))
        heat = comparison.final_ends() if table.title.startswith("Final") else ()
        body.append(table_html(table, links, heat=heat, elsewhere="the .md and .csv"))
    if "stages" in drawn:
        body += [text_html("## Over the stages"), figure_html(drawn["stages"])]
    body += [text_html("## What the numbers are\n\n" + "\n".join(f"- {note}" for note in comparison.notes)), "</main>"]
    about = text_html(f"{len(comparison.entries)} runs, set against `{comparison.against.name}`.")
    warnings = [text_html(f"> {warning}") for warning in comparison.warnings]
    foot = "Made by <code>trace-bench report</code> from the files of the runs."
    if drawn:
        foot += f" The figures are in the folder <code>{escape(folder.name)}</code> as SVG and PNG."
    title = head.partition("\n")[0].lstrip("# ")
    write_text(file, document(title, [text_html(head), about, *warnings], body, foot))
