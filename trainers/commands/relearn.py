"""`trace-bench relearn`: what a few rows of each old task bring back at the end of a run."""

from __future__ import annotations

import argparse

from trace_bench.cli.options import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Was it gone, or hidden? Trains each old task again on a few of its rows, from the last stage, and, as the\n"
        "control, from the base model; each time the task is measured on its test rows. What comes back beyond the\n"
        "control was hidden, not gone. The learning rate, the batch and all else are as in the run. Needs the scores\n"
        "of the run; `trace-bench report RUN` then shows the result. The same command again goes on where it was."
    )
    add = parser.add_argument
    add("path", metavar="RUN", help="the run directory")
    add("--rows", type=positive, default=10, help="training rows of each task, the first ones (10)")
    add("--steps", type=positive, default=10, help="optimizer steps on them (10)")


def run(args: argparse.Namespace) -> None:
    """Trains and measures what is not there yet."""
    from trainers.relearn import relearn

    relearn(args.path, args.rows, args.steps)
