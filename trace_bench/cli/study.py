"""`trace-bench study`."""

from __future__ import annotations

import argparse

from trace_bench.cli.options import LIST, names, put_first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = "Trains, evaluates and compares the runs of a study, in order. Skips steps that are done."
    add = parser.add_argument
    put_first(
        parser,
        add("file", metavar="STUDY", help="a YAML file, or a name from `trace-bench configs`, such as replay"),
    )
    add("--full", action="store_true", help="at the scale of the paper instead of the small one")
    add("--output_dir", "--output-dir", metavar="DIR", help="default: runs/<name of the study>-<small|full>")
    add(
        "--only",
        **LIST,
        metavar="NAME",
        help="do only these runs: names from the file, names of single runs, or numbers from 1; the table has all runs",
    )
    add("--launch", metavar="COMMAND", help="command in front of each training: 'accelerate launch --num_processes 8'")
    add("--dry-run", action="store_true", help="check the options and print the commands without running them")


def run(args: argparse.Namespace) -> int:
    """Does the runs; 1 if one of them failed."""
    from trace_bench.study import run_study

    options = {name: getattr(args, name) for name in ("full", "output_dir", "launch", "dry_run")}
    return 0 if run_study(args.file, only=names(args.only), **options) else 1
