"""`trace-bench tasks-path`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--install", action="store_true", help="let lm-eval in this environment find them without --include_path"
    )


def run(args: argparse.Namespace) -> None:
    """Shows the folder of the tasks."""
    from trace_tasks.data import TASKS_PATH

    if args.install:
        _install(TASKS_PATH)
    print(TASKS_PATH)


def _install(tasks: Path) -> None:
    """Writes a stub for each task into lm-eval's own folder: it looks nowhere else, and follows no links."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        sys.exit("error: lm-eval is not installed in this environment.")
    folder = Path(spec.origin).parent / "tasks" / "trace_bench"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for task in tasks.glob("*.yaml"):
        text = task.read_text(encoding="utf-8")
        # A group's task list is not inherited by an include, so a group is written out.
        stub = text if "\ngroup:" in f"\n{text}" else f"include: {task}\n"
        (folder / task.name).write_text(stub, encoding="utf-8")
