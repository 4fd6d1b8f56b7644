"""`trace-bench study`."""

from __future__ import annotations

import argparse

from trace_bench.cli.options import LIST, names, put_first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = "Does the runs of a study one after the other and compares them. Done steps are skipped."
    add = parser.add_argument
    put_first(
        parser,
        add("file", metavar="STUDY", help="a YAML file, or a name of `trace-bench configs`, such as replay"),
    )
    add("--full", action="store_true", help="at the scale of the paper instead of the small one")
    add("--output_dir", "--output-dir", metavar="DIR", help="default: runs/<name of the study>-<small|full>")
    add(
        "--only",
        **LIST,
        metavar="NAME",
        help="these runs only, by their names in the file or one by one, or by number from 1 on; the table has all",
    )
    add("--launch", metavar="COMMAND", help="starts the trainings, as 'accelerate launch --num_processes 8'")
    add("--dry-run", action="store_true", help="print the commands and do nothing")


def run(args: argparse.Namespace) -> int:
    """Does the runs; 1 if one of them failed."""
    from trace_bench.study import run_study

    options = {name: getattr(args, name) for name in ("full", "output_dir", "launch", "dry_run")}
    return 0 if run_study(args.file, only=names(args.only), **options) else 1
