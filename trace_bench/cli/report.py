"""`trace-bench report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trace_bench.cli import show
from trace_tasks.errors import TraceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Writes report.md, report.html, figures/, scores.csv and result.json of each run. Several runs are compared."
    )
    add = parser.add_argument
    add("paths", metavar="RUN", nargs="+", help="a run directory")
    add("--baseline", metavar="RUN", help="the run that the others are compared with (default: the first)")
    add("--output", metavar="FILE", help="also write the comparison to this file: FILE.html, .md, .csv or .tex")
    add(
        "--without-leaked",
        metavar="AUDIT.json",
        help="leave leaked test rows out of all scores; FILE is from `trace-bench data audit --output FILE`",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the reports and shows where they are, or the comparison."""
    from trace_bench.report import check_output, write_comparison, write_report, write_reports
    from trace_bench.report.leaks import without_leaked
    from trace_bench.run import Run

    check_output(args.output)

    def open_run(path: str) -> Run:
        run = Run.open(path)
        return without_leaked(run, Path(args.without_leaked)) if args.without_leaked else run

    paths: dict[Path, str] = {}
    for path in args.paths:  # a run once, however its path is written
        paths.setdefault(Path(path).resolve(), path)
    runs = list(map(open_run, paths.values()))
    baseline = open_run(args.baseline) if args.baseline else None
    if len(runs) == 1 and not args.output and baseline is None:
        show(write_report(runs[0]))
        return
    results = []
    for made in write_reports(runs):
        if isinstance(made, TraceError):
            raise made
        results.append(made[1])
    show(write_comparison(results, args.output, baseline), end="")
