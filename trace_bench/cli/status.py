"""`trace-bench status`."""

from __future__ import annotations

import argparse

from trace_bench.cli import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = "Shows the progress of a run from its files, during the run or after it."
    parser.add_argument("path", metavar="RUN", help="the run directory")


def run(args: argparse.Namespace) -> None:
    """Shows the state of a run."""
    from trace_bench.run import Run
    from trace_bench.status import status

    show(status(Run.open(args.path)))
