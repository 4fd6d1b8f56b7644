"""Writes the report of a run and the comparison of several, from their files alone, in seconds and without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from trace_bench.report.comparison import Comparison, compare
from trace_bench.report.page import write_comparison_page, write_page
from trace_bench.report.record import scores_csv
from trace_bench.report.result_file import FILE, result
from trace_bench.report.results import Results
from trace_bench.report.sections import sections
from trace_bench.report.tables import Table, markdown, percent
from trace_bench.run import WRITTEN, Run, RunError
from trace_bench.text import markdown_text
from trace_tasks.data.files import check_writable, refuse_links, write_json, write_text
from trace_tasks.errors import TraceError

_FORMS = {".md": Comparison.markdown, ".csv": Comparison.csv, ".tex": Comparison.latex}
ENDINGS = (*_FORMS, ".html")
#: Reports per process from which on starting a process pays off.
_ENOUGH = 4


def write_report(run: Run, others: Iterable[Run] = ()) -> str:
    """Writes report.md, report.html, figures/, scores.csv and result.json; returns a one-line summary.

    Args:
        run: The run.
        others: Other runs, which the report shows if they are bounds of this one.
    """
    return _write(Results(run), [Results(other) for other in others])


def write_reports(runs: Sequence[Run]) -> list[tuple[str, Results] | TraceError]:
    """Writes the reports of runs that are compared, in parallel processes. An up-to-date page is not drawn again.

    Returns:
        For each run its one-line summary and its numbers, or the error.
    """
    processes = max(1, min(os.cpu_count() or 1, len(runs) // _ENOUGH))
    shares = [range(first, len(runs), processes) for first in range(processes)]
    if processes == 1:
        return _write_share(runs, *shares)
    # Spawned, since a process with threads (numerical libraries) cannot be forked safely.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        made = list(pool.map(partial(_write_share, runs), shares))
    return [made[number % processes][number // processes] for number in range(len(runs))]


def _write_share(runs: Sequence[Run], numbers: Iterable[int]) -> list[tuple[str, Results] | TraceError]:
    """Writes the reports of runs[i] for i in `numbers`, in one process."""
    together = list(map(Results, runs))
    made: list[tuple[str, Results] | TraceError] = []
    for number in numbers:
        try:
            made.append((_write(together[number], together, redraw=False), together[number]))
        except TraceError as e:
            made.append(e)
    return made


def _write(results: Results, others: Iterable[Results], *, redraw: bool = True) -> str:
    run = results.run
    refuse_links(run.path, *WRITTEN)
    check_writable(run.path)
    parts = sections(results, others)
    texts = [markdown(b) if isinstance(b, Table) else markdown_text(b) for blocks in parts.values() for b in blocks]
    write_text(run.path / "scores.csv", results.once(scores_csv))
    write_json(run.path / FILE, result(results))
    write_text(run.path / "report.md", "\n\n".join(texts) + "\n")
    write_page(results, parts, redraw=redraw)
    return f"{run.path}/report.md: {_summary(results)}"


def _summary(results: Results) -> str:
    run, unit = results.run, results.unit
    cells = len(results.cells_of(run.tasks))
    which = run.manifest["config"].get("cells", "seen")
    asked = max(cells, sum(len(run.seen_tasks(stage, which)) for stage in run.stages))
    line = f"{cells} cells of {asked}" if run.tasks else f"{len(results.cells)} cells"
    what = "" if unit is None or unit.is_percent else f" ({unit.name})"
    t = results.last_stage
    if t and unit:
        op, bwt = (results.sequence[name][t - 1].value for name in ("OP", "BWT"))
        line += f"; OP_{t} {unit.text(op)}, BWT_{t} {unit.text(bwt, sign=True)}{what}"
    elif not results.is_sequential and results.has_mean and unit and not np.isnan(results.final).any():
        line += f"; mean of the tasks {unit.text(results.mean.value)}{what}"
    if results.has_mean and unit is None:
        line += "; no mean over tasks of different units"
    delta = results.general.get(run.stages[-1].index)
    if delta:
        line += f"; general ability {percent(delta.value, sign=True)}"
    return line + ("; without leaked rows" if run.left_out else "")


def write_comparison(
    runs: Sequence[Run | Results], output: str | Path | None = None, baseline: Run | None = None
) -> str:
    """Compares runs (see `compare`), writes the comparison in the format of the output's ending; returns Markdown.

    Raises:
        RunError: if `output` has another ending than `ENDINGS`.
    """
    check_output(output)
    comparison = compare(runs, baseline)
    if output is not None and Path(output).suffix == ".html":
        write_comparison_page(comparison, Path(output))
    elif output is not None:
        write_text(Path(output), _FORMS[Path(output).suffix](comparison))
    return comparison.markdown()


def check_output(output: str | Path | None, endings: tuple[str, ...] = ENDINGS) -> None:
    """Refuses an output file with another ending, or in a folder that cannot be written to.

    Raises:
        RunError: if its name does not end in one of the endings.
    """
    if output is not None and Path(output).suffix not in endings:
        raise RunError(f"--output {output} has no known ending: name a file that ends in {', '.join(endings)}.")
    if output is not None:
        check_writable(Path(output).parent)
