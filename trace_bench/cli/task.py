"""`trace-bench task`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trace_bench.cli import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Makes a task of your own from a file of rows: writes its YAML next to the file, loads it as a run would,\n"
        "and shows three rows as the model sees them. It knows these columns:\n"
        "  prompt, answer                     also question/input/text and target/output/response/label\n"
        '  messages                           [{"role": "user", "content": ...}, ..., {"role": "assistant", ...}]\n'
        '  conversations                      ShareGPT\'s form of messages, with "from" and "value"\n'
        "  prompt, completion                 TRL's form: the messages in two lists\n"
        "  instruction, input, output         Alpaca's form; input may be empty\n"
        "The file is .jsonl, .json (a list), .csv or .parquet."
    )
    parser.epilog = (
        "  trace-bench task new data/mine.jsonl --test data/mine-test.jsonl\n"
        "  TRACE_TASKS=data trace-bench train sequential --config quickstart --tasks mine --output_dir runs/mine"
    )
    add = parser.add_argument
    add("action", choices=["new"], help="what to do")
    add("file", type=Path, metavar="FILE", help="the training rows")
    add("--test", type=Path, metavar="FILE", help="the test rows (default: the last fifth of FILE)")
    add("--name", help="the task's name (default: the file's name)")


def run(args: argparse.Namespace) -> None:
    """Writes the task and shows three rows."""
    from trace_bench.own_task import make_task

    show(make_task(args.file, args.test, args.name))
