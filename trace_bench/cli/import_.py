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
        "Makes a run of predictions that were made elsewhere. They are scored here; the scores in their files\n"
        "are not looked at. Prompts and labels have to be those of TRACE_DATA; where it is not set they are taken\n"
        "as they are, and the report says so."
    )
    add = parser.add_argument
    put_first(parser, add("path", metavar="RUN", help="the run directory"))
    add("--official", metavar="FOLDER", help="results-ROUND-NUMBER-TASK.json of the official code")
    add(
        "--samples",
        action="append",
        metavar="NAME=FOLDER",
        help="samples_*.jsonl of lm_eval --log_samples, a folder for each model; repeat in the order of training; "
        "NAME = the task of its stage, or any name; base = the model before the first training",
    )
    add("--tasks", **LIST, metavar="TASK", help="with --samples: columns of the matrix, or an order")
    add("--model", default="unknown", help="the base model, where it is known")
    add("--data", help="the data that they were made from (default: TRACE_DATA)")


def run(args: argparse.Namespace) -> None:
    """Reads, scores and writes."""
    from trace_tasks import data

    if args.official and args.tasks:
        raise RunError("--tasks: the numbers in the names of the official files say the order. Leave it out.")
    if not args.official and not args.samples:
        raise RunError("Nothing is imported: name predictions with --official FOLDER or --samples NAME=FOLDER.")
    folders = pairs("--samples", args.samples or [])
    from trace_bench.evaluate import imported

    stages: imported.Stages = {}
    tasks = data.expand_orders(names(args.tasks) or ()) or None
    if args.official:
        stages, tasks = imported.read_official(Path(args.official))
    for name, folder in folders.items():
        if name in stages:
            raise RunError(f"--samples {name}: the official files have a stage of that name. Give it another.")
        stages[name] = imported.read_samples(Path(folder), tasks)
    there = {task for found in stages.values() for task in found}
    if tasks is None:
        stages_first = [name for name in stages if name in there]
        tasks = list(dict.fromkeys([*stages_first, *(t for t in data.FOLDERS if t in there), *sorted(there)]))
    made = imported.import_run(args.path, stages, tasks, model=args.model, data_path=args.data)
    cells = sum(map(len, stages.values()))
    models = sum(map(bool, stages.values()))
    absent = ", ".join(task for task in made.tasks if task not in there)
    none = f", none of {absent}" if absent else ""
    show(f"imported {cells} cells of {models} models{none}: trace-bench report {word(made.path)}")
