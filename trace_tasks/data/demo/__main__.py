"""Writes the demo data: `python -m trace_tasks.data.demo OUT [--seed N] [--rows TRAIN EVAL TEST]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trace_tasks.data.demo import ROWS, write_demo
from trace_tasks.errors import TraceError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser("python -m trace_tasks.data.demo", description="Write the TRACE demo data.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the rows (default 0)")
    parser.add_argument(
        "--rows",
        type=int,
        nargs=3,
        metavar=("TRAIN", "EVAL", "TEST"),
        default=ROWS,
        help=f"rows of each task (default {' '.join(map(str, ROWS))}); the sets for replay and judges stay as they are",
    )
    args = parser.parse_args(argv)
    if min(args.rows) < 1:
        parser.error("--rows: use numbers of at least 1")
    try:
        write_demo(args.out, args.seed, tuple(args.rows))
    except TraceError as e:
        sys.exit(f"error: {e}")
    print(f"wrote the demo tasks, their reasoning variant and the further sets to {args.out}")


if __name__ == "__main__":
    main()
