"""`trace-bench train`: trains with any method, ours by its name, another one by its file or module."""

from __future__ import annotations

import argparse
import itertools
import runpy
import sys
from contextlib import suppress

import yaml

from trace_bench import packaged
from trace_bench.cli.options import names
from trace_bench.tasks import check_names
from trace_tasks.data import expand_orders
from trainers import help as help_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.usage = "trace-bench train METHOD --config CONFIG --output_dir RUN [--OPTION VALUE ...]"
    parser.description = (
        "Trains every stage of a run. Run the same command again to continue.\n\n"
        f"METHOD  {', '.join(packaged.methods())};\n"
        "        your own file, path/to/my_method.py, or your own module, my_package.my_method\n"
        "CONFIG  a YAML file, or a name from `trace-bench configs`\n\n"
        "`trace-bench train METHOD --help` lists the options of a method. --like RUN copies the settings of a run,\n"
        "for example to train the bounds of a report; options after it override them."
    )
    parser.epilog = (
        "  trace-bench train sequential --config quickstart --output_dir runs/mine\n"
        "  trace-bench train my_method.py --config quickstart --output_dir runs/mine --strength 2\n"
        "  accelerate launch --num_processes 8 -m trace_bench train sequential --config ... --output_dir runs/mine"
    )
    parser.add_argument("method", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _tasks(options: list[str]) -> list[str]:
    """The tasks that the options name, or else the config that they name."""
    listed: list[str] = []
    if "--tasks" in options:
        listed = list(
            itertools.takewhile(lambda word: not word.startswith("--"), options[options.index("--tasks") + 1 :])
        )
    elif "--config" in options[:-1]:
        name = options[options.index("--config") + 1]
        content = packaged.find("config", name, packaged.configs()).read_text(encoding="utf-8", errors="replace")
        with suppress(yaml.YAMLError, AttributeError):
            found = yaml.safe_load(content).get("tasks") or []
            listed = found if isinstance(found, list) else [found]
    return expand_orders(names([str(text) for text in listed]) or ())


def run(args: argparse.Namespace) -> None:
    """Runs the file of the method as a program."""
    file = packaged.find_method(args.method)
    if {"-h", "--help"} & set(args.options) and help_page.show(file, f"trace-bench train {args.method}"):
        return
    check_names(_tasks(args.options))  # before the libraries are imported, which takes seconds
    sys.argv = [str(file), *args.options]
    if file.parent == packaged.TRAINERS:
        runpy.run_module(f"trainers.{file.stem}", run_name="__main__", alter_sys=True)
    else:
        sys.path.append(str(file.parent))  # behind all others, so that a file there cannot hide a package
        runpy.run_path(str(file), run_name="__main__")
