"""`trace-bench results`."""

from __future__ import annotations

import argparse

from trace_bench.cli import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Makes a leaderboard from the result files below a folder: the result.json that `trace-bench report` writes\n"
        "for each run, or copies of it under any name. Runs with the same protocol are in one table."
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder of runs or of result files")
    parser.add_argument("--output", metavar="FILE", help="write the leaderboard to this file: FILE.html, .md or .csv")


def run(args: argparse.Namespace) -> None:
    """Shows the leaderboard, or writes it."""
    from trace_bench.report.leaderboard import ENDINGS, leaderboard, write_leaderboard
    from trace_bench.report.write import check_output

    check_output(args.output, ENDINGS)
    board = leaderboard(args.folder)
    if args.output:
        write_leaderboard(board, args.output)
        runs = sum(len(group.lines) for group in board.groups)
        show(f"{args.output}: {runs} runs under {len(board.groups)} protocols")
    else:
        show(board.markdown(), end="")
    for line in board.skipped:
        show(f"left out: {line}")
