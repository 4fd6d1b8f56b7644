"""`trace-bench check`."""

from __future__ import annotations

import argparse
import json
import math

from trace_bench.cli import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Checks if the last stage of a run has lost more than the limits allow. Reads only the files of the run, so\n"
        "that CI can run it after each fine-tuning."
    )
    parser.epilog = """\
exit codes:
  0  within: the whole 95 % interval of the mean is within the limit
  1  worse: the whole interval of the mean, of a task or of a suite is beyond the limit
  2  an error: for example, what a limit is for is not measured
  3  cannot be told: there are too few test rows; the line says how many are needed

A limit applies to the mean. A single task or suite that is worse makes the check fail, but only --each requires every
one to be within. Holm's correction covers all lines (one-sided, 5 %; a mean has the same share as all its tasks), so
at most one check in twenty says "worse" if nothing is beyond its limit. docs/gate.md has the rules.
"""
    add = parser.add_argument
    add("path", metavar="RUN", help="the run directory")
    limit = "the largest allowed loss of %s, in points"
    add("--max-forgetting", type=points, metavar="POINTS", help=limit % "tasks")
    add("--max-general-drop", type=points, metavar="POINTS", help=limit % "the general suites")
    add(
        "--against",
        metavar="RUN2",
        help="measure the drops since the last stage of this run, on the same test rows (default: since each task's "
        "own stage; suites: since the base model; external checkpoints: since the base and the checkpoint before)",
    )
    add("--each", action="store_true", help="exit with 0 only if every task and suite is within, not just the mean")
    add("--json", action="store_true", help="print one JSON object")


def points(text: str) -> float:
    """A limit: a number from 0 on."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: use a number of points that is 0 or more")
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
