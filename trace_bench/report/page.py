"""The pages: of a run the texts and tables of report.md, figures, lengths of answers and samples; and of several runs.

That of several has the tables of their comparison, figures, and the way to the page of each run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from trace_bench import judgements
from trace_bench.metrics import Estimate
from trace_bench.report import html, samples
from trace_bench.report.comparison import Comparison
from trace_bench.report.figures import OF_A_RUN, OF_RUNS
from trace_bench.report.record import scores_csv
from trace_bench.report.results import UNKNOWN, Results
from trace_bench.report.tables import DASH, PERCENT, Block, Table, Unit, stage_label
from trace_tasks.data.files import digest, write_text

#: The parts of the page in their order: key of the section -> what the menu calls it, and its figures.
_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "summary": ("", ()),
    "scores": ("Scores", ("matrix", "sequence")),
    "tolerant": ("", ()),
    "extracted": ("", ()),
    "learning": ("Learning", ("tasks",)),
    "form": ("", ("form",)),
    "likelihood": ("Likelihood", ()),
    "hidden": ("Gone or hidden", ()),
    "limits": ("", ()),
    "transitions": ("Lost and gained", ("flow",)),
    "choices": ("Options", ()),
    "general": ("General ability", ("general",)),
    "distance": ("Distance", ("distance",)),
    "judged": ("Against the base model", ("judged",)),
    "answers": ("Answers", ()),
    "bounds": ("Bounds", ()),
    "conventions": ("Conventions", ()),
    "paper": ("The paper", ()),
    "cost": ("Cost", ("losses", "cost")),
    "lengths": ("Lengths", ()),
    "samples": ("Samples", ()),
    "provenance": ("Provenance", ()),
}


def write_page(results: Results, blocks: dict[str, list[Block]], *, redraw: bool = True) -> None:
    """Writes report.html and figures/ of a run, with the texts and tables that `sections.sections` makes.

    With `redraw=False` an existing page stays if it was made from the same input by the same program, since drawing
    takes most of the time.
    """
    folder = results.run.path
    answers = samples.read_answers(results)
    embedded = samples.embed(results, answers)
    seconds = [results.evaluation_seconds(stage) for stage in results.run.stages]
    numbers = (results.once(scores_csv), results.headlines, results.units, seconds, results.training, results.judged)
    made_of = digest(repr((_program(), blocks, numbers, embedded and embedded.json)))
    if not redraw and _is_there(folder, made_of):
        return
    figures = html.write_figures(folder / "figures", OF_A_RUN, results)
    blocks = blocks | {"lengths": samples.lengths(results, answers)}
    parts = {key: _part(results, key, blocks.get(key, []), figures) for key in _PARTS}
    parts["samples"] = [embedded] if embedded else []
    page = html.document(
        title=folder.name,
        made_of=made_of,
        head=[html.text_html(block) for block in blocks["run"] if isinstance(block, str)],
        tiles=list(_tiles(results)),
        menu={key: name for key, (name, _) in _PARTS.items() if name and parts[key]},
        parts=parts,
        foot=Markup(
            "Made by <code>trace-bench report</code> from the files of the run. The figures are in its folder "
            "<code>figures</code> as SVG and PNG, all scores in <code>scores.csv</code>."
        ),
        data=embedded.json if embedded else None,
    )
    write_text(folder / "report.html", page)


@cache
def _program() -> str:
    """What identifies the code that makes a page."""
    sources = sorted(file for file in Path(__file__).parent.iterdir() if file.is_file())
    return version("matplotlib") + "".join(file.read_text(encoding="utf-8") for file in sources)


def _is_there(folder: Path, made_of: str) -> bool:
    """Whether the page, which is written last, was made of this, and its figures are there."""
    file = folder / "report.html"
    page = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    names = re.findall('<figure id="figure-([a-z]+)"', page)
    figures = (folder / "figures" / f"{name}.{kind}" for name in names for kind in ("svg", "png"))
    return f'<meta name="made-of" content="{made_of}">' in page and all(figure.is_file() for figure in figures)


def _part(results: Results, key: str, blocks: Sequence[Block], figures: Mapping[str, html.FigureView]) -> list[Any]:
    shown = [figures[name] for name in _PARTS[key][1] if name in figures]
    if key == "judged" and blocks:  # a section for each kind, and one figure for all
        return [html.text_html("## Answers against the base model"), *shown, *_views(blocks, demote=1)]
    first = next((i for i, block in enumerate(blocks) if isinstance(block, Table)), len(blocks))
    before, after = _views(blocks[:first]), _views(blocks[first:])
    if key == "scores" and blocks:
        stages, tasks = results.R.shape
        if stages * tasks > html.TABLE_CELLS:
            size = f"The scores of {stages} stages and {tasks} tasks are shown as an image."
            before.append(html.text_html(f"{size} The numbers are in report.md and scores.csv."))
        else:
            before.append(_matrix(results, blocks[first]))
            shown = [figure for figure in shown if figure.name != "matrix"]
        del after[0]
    return [*before, *shown, *after]


def _views(blocks: Iterable[Block], demote: int = 0) -> list[Any]:
    return [html.table_view(b) if isinstance(b, Table) else html.text_html(b, demote) for b in blocks]


def _matrix(results: Results, table: Block) -> html.TableView:
    """The scores with colours; the intervals are shown where one points at a score."""
    assert isinstance(table, Table)
    run, rows = results.run, []
    for stage, (_, *texts) in zip(run.stages, table.rows, strict=True):
        cells = []
        for i, task in enumerate(run.tasks):
            unit, (value, low, high) = results.units[task], results.cell(stage.index, i)
            own = " own" if stage.task == task else ""
            title = "" if np.isnan(low) else f"95 % interval {unit.text(low)} to {unit.text(high)}"
            colour = "none" if np.isnan(value) else html.heat(results.shades[stage.index, i])
            cells.append(html.Cell(texts[i], colour + own, title))
        rows.append(html.Row(f"{stage.number} {stage_label(stage)}", cells))
    own = "Framed: the task's own stage. " if any(s.task for s in run.stages) else ""
    meaning = html.ENDS_OF_UNITS if results.not_percent else ("0", "100")
    heads = [html.head_cell(text) for text in table.header]
    return html.TableView(heads, rows, True, f"{own}{DASH}: not evaluated.", meaning)


# --------------------------------------------------------------------------------------------------------------- tiles


def _tiles(results: Results) -> Iterable[dict[str, Any]]:
    """The headline numbers."""
    last, unit = results.run.stages[-1], results.unit
    if results.is_sequential:
        t = results.last_stage or len(results.run.tasks)
        op, bwt, forgetting = (results.sequence[name][t - 1] for name in ("OP", "BWT", "Forgetting"))
        yield _tile("OP", "mean of the tasks seen", op, False, unit, str(t))
        yield _tile("BWT", "change since the own stage", bwt, True, unit, str(t))
        yield _tile("Forgetting", "drop from the best stage", forgetting, False, unit, str(t))
    elif results.has_mean:
        yield _tile("Mean", "of the tasks", results.mean, False, unit)
    yield _tile("Δ general", "ability, mean of the suites", results.general.get(last.index, UNKNOWN))
    for name, judged in results.judged.items():
        text = "wins minus losses against the base model"
        controlled = judgements.net_win_rate_at_equal_length(judged, last)
        if not np.isnan(controlled.value):
            text += f"; at equal length {PERCENT.text(controlled.value, True)}"
        yield _tile(f"Δ {name}", text, judgements.net_win_rate(judged, last))


def _tile(
    name: str, text: str, value: Estimate, sign: bool = True, unit: Unit | None = PERCENT, index: str = ""
) -> dict[str, Any]:
    """What page.html shows of a number; `below` stands lower behind its name."""
    own = unit or PERCENT
    shown, low, high = (own.text(number, sign) for number in value)
    if missing := shown == DASH:
        text = "not measured" if unit else "the tasks have different units"
    elif not own.is_percent:
        text += f"; {own.of_changes if sign else own.name}"
    interval = "" if DASH in (shown, low) else f"{low} to {high}"
    return {"name": name, "below": index, "value": shown, "interval": interval, "text": text, "missing": missing}


# -------------------------------------------------------------------------------------------------------- several runs


def write_comparison_page(comparison: Comparison, file: Path, head: str = "") -> None:
    """Writes the page, and its figures as SVG and PNG into a folder next to it, `<name>-figures`.

    `head` is Markdown to begin with, its first line a title; by default the file's name without the ending.
    """
    head = head or f"# {file.stem}"
    folder = file.with_name(f"{file.stem}-figures")
    figures = html.write_figures(folder, OF_RUNS, comparison)
    reports = {e.name: e.run.path / "report.html" for e in comparison.entries}
    links = html.links(reports, file.parent)
    blocks: list[Any] = []
    for table in comparison.tables:
        blocks.append(html.text_html(f"## {table.title}\n\n{table.about[0].upper()}{table.about[1:]}."))
        if table is comparison.tables[0] and "runs" in figures:
            blocks.append(figures["runs"])
        heat = comparison.final_ends() if table.title.startswith("Final") else ()
        view = html.table_view(table, links, heat=heat, elsewhere="the .md and .csv")
        blocks.append({"fold": f"{len(table.rows)} runs", "table": view} if table.detail else view)
    for name, title in (("stages", "Over the stages"), ("distances", "Distance and forgetting")):
        if name in figures:
            blocks += [html.text_html(f"## {title}"), figures[name]]
    blocks.append(html.text_html("## What the numbers mean\n\n" + "\n".join(f"- {note}" for note in comparison.notes)))
    about = f"{len(comparison.entries)} runs, compared with `{comparison.against.name}`."
    foot = Markup("Made by <code>trace-bench report</code> from the files of the runs.")
    if figures:
        foot += Markup(" The figures are in the folder <code>{}</code> as SVG and PNG.").format(folder.name)
    page = html.document(
        title=head.partition("\n")[0].lstrip("# "),
        head=[html.text_html(text) for text in (head, about, *(f"> {warning}" for warning in comparison.warnings))],
        parts={"comparison": blocks},
        wide=True,
        foot=foot,
    )
    write_text(file, page)
