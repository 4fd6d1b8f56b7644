"""`trace-bench relearn`: what a few rows of each old task bring back at the end of a run."""

from __future__ import annotations

import argparse

from trace_bench.cli.options import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Shows if an old task was lost or only hidden. Trains each old task again on a few of its rows: from the\n"
        "last stage, and from the base model as a control. Measures the task on its test rows each time. What comes\n"
        "back beyond the control was hidden, not lost. The learning rate, the batch and all other settings are those\n"
        "of the run. Needs the scores of the run. `trace-bench report RUN` then shows the result. Run the same\n"
        "command again to continue."
    )
    add = parser.add_argument
    add("path", metavar="RUN", help="the run directory")
    add("--rows", type=positive, default=10, help="number of training rows of each task, the first ones (10)")
    add("--steps", type=positive, default=10, help="number of optimizer steps on them (10)")


def run(args: argparse.Namespace) -> None:
    """Trains and measures what is not there yet."""
    from trainers.relearn import relearn

    relearn(args.path, args.rows, args.steps)
