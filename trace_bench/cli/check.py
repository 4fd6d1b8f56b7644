"""`trace-bench check`."""

from __future__ import annotations

import argparse
import json
import math

from trace_bench.cli import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Holds what the last stage of a run has lost against limits, from its files alone: for the CI of whoever "
        "fine-tunes every week."
    )
    parser.epilog = """\
exit codes:
  0  within: the whole 95 % interval of the mean is within the limit
  1  worse: the whole interval of the mean, of a task or of a suite is beyond the limit
  2  an error, or something that was asked for is not measured
  3  cannot be told at this many test rows; the line says how many are needed

A limit is one for the mean. A single task or suite can fail the check, and need not prove itself (--each: it has to).
All lines are tested together (Holm's correction, one-sided, 5 %; a mean has as large a share as all of its tasks):
where nothing is beyond its limit at most one check in twenty says so. docs/gate.md has the rules.
"""
    add = parser.add_argument
    add("path", metavar="RUN", help="the run directory")
    limit = "the most that %s may have lost, in points"
    add("--max-forgetting", type=points, metavar="POINTS", help=limit % "tasks")
    add("--max-general-drop", type=points, metavar="POINTS", help=limit % "the general suites")
    add(
        "--against",
        metavar="RUN2",
        help="measure the drops from the last stage of this run, on the same test rows (default: from the stage of "
        "each task and from the base model; of checkpoints from elsewhere from the base model and the one before)",
    )
    add("--each", action="store_true", help="0 only if each task and suite is within, and not their mean alone")
    add("--json", action="store_true", help="print one JSON object")


def points(text: str) -> float:
    """A limit: a number from 0 on."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: use a number of points from 0 on")
    return number


def run(args: argparse.Namespace) -> int:
    """Shows the lines and returns the exit code of the verdict."""
    from trace_bench.report.gate import check
    from trace_bench.run import Run

    found = check(
        Run.open(args.path),
        max_forgetting=args.max_forgetting,
        max_general_drop=args.max_general_drop,
        against=Run.open(args.against) if args.against else None,
        each=args.each,
    )
    show(json.dumps(found.json(), indent=2) if args.json else found.text)
    return found.exit_code
