"""`trace-bench import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trace_bench.cli import show
from trace_bench.cli.options import LIST, names, pairs, put_first
from trace_bench.run import RunError
from trace_bench.text import word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Makes a run from predictions that were made elsewhere. This program scores them and ignores the scores in\n"
        "their files. Prompts and labels must be those of TRACE_DATA. If it is not set, they are taken as they\n"
        "are, and the report says so."
    )
    add = parser.add_argument
    put_first(parser, add("path", metavar="RUN", help="the run directory"))
    add("--official", metavar="FOLDER", help="results-ROUND-NUMBER-TASK.json of the official code")
    add(
        "--samples",
        action="append",
        metavar="NAME=FOLDER",
        help="samples_*.jsonl of lm_eval --log_samples, a folder for each model; repeat it in the order of training; "
        "NAME is the task of the stage, or any name, or base for the model before training",
    )
    add("--tasks", **LIST, metavar="TASK", help="with --samples: columns of the matrix, or an order")
    add("--model", default="unknown", help="the base model, if you know it")
    add("--data", help="the data that the predictions were made on (default: TRACE_DATA)")


def run(args: argparse.Namespace) -> None:
    """Reads, scores and writes."""
    from trace_tasks import data

    if args.official and args.tasks:
        raise RunError("--tasks does not work with --official: the file names give the order. Leave it out.")
    if not args.official and not args.samples:
        raise RunError("There is nothing to import: add --official FOLDER or --samples NAME=FOLDER.")
    folders = pairs("--samples", args.samples or [])
    from trace_bench.evaluate import imported

    stages: imported.Stages = {}
    tasks = data.expand_orders(names(args.tasks) or ()) or None
    if args.official:
        stages, tasks = imported.read_official(Path(args.official))
    for name, folder in folders.items():
        if name in stages:
            raise RunError(f"--samples {name}: the official files have a stage of that name. Use a different name.")
        stages[name] = imported.read_samples(Path(folder), tasks)
    there = {task for found in stages.values() for task in found}
    if tasks is None:
        stages_first = [name for name in stages if name in there]
        tasks = list(dict.fromkeys([*stages_first, *(t for t in data.FOLDERS if t in there), *sorted(there)]))
    made = imported.import_run(args.path, stages, tasks, model=args.model, data_path=args.data)
    cells = sum(map(len, stages.values()))
    models = sum(map(bool, stages.values()))
    absent = ", ".join(task for task in made.tasks if task not in there)
    none = f", none for {absent}" if absent else ""
    show(f"imported {cells} cells of {models} models{none}. Next: trace-bench report {word(made.path)}")
