"""The command `trace-bench`: one module a command, which is imported when its command is given."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from trace_bench.ending import command
from trace_bench.text import prepare_logging, printable
from trace_tasks.errors import TraceError, suggestion


class HiddenError(TraceError):
    """A package of the same name as one of ours is found before it."""


#: Command -> its line in the help.
COMMANDS = {
    "data": "check a data set (folder, archive or demo) and print its fingerprint",
    "data audit": "audit a data set: repeats, leaks from training to test rows, lengths, broken characters",
    "task": "make a task of your own from a file of rows",
    "configs": "list the configs and studies of the package",
    "train": "train every stage of a run with a method",
    "evaluate": "measure the missing cells of a run's matrix, with one engine for all stages",
    "import": "make a run from predictions made elsewhere: those of the official code, or lm-eval's samples",
    "merge": "merge checkpoints into one: means, WiSE-FT, MagMax, TIES, DARE",
    "judge": "judge the answers of a run: instruction following and safety against the base model",
    "annotate": "make the training data of RCL: a teacher writes reasoning paths, and the command checks them",
    "relearn": "train on a few rows of each old task after the last stage, to see if the task was lost or only hidden",
    "report": "write report.md, report.html and scores.csv from the files of a run, or compare several runs",
    "results": "make one leaderboard from the result.json files of many runs",
    "check": "check if a run has forgotten more than a limit: exit code 0 within, 1 worse, 3 cannot be told",
    "study": "train, evaluate and compare the runs of a study file",
    "status": "show the progress of a run: stages trained, step and time left in the current one, tasks evaluated",
    "tasks-path": "print the folder of the lm-eval tasks, for --include_path",
}
EPILOG = """\
the main job:
  make sequential-train                      in a clone: all the steps below, on demo data
  trace-bench train sequential --config quickstart --output_dir runs/mine
  trace-bench evaluate runs/mine             measure the missing cells; run it again to continue
  trace-bench report runs/mine               write report.md, report.html, figures/ and scores.csv
  trace-bench status runs/mine               show the progress at any time

instruction following and safety, judged from the answers to the instruct_* and safety_* tasks:
  trace-bench judge runs/mine --model JUDGE  verdicts against the base model; see trace-bench judge --help

reasoning paths for RCL, which a teacher writes:
  trace-bench annotate data/mine --model TEACHER; TRACE_REASONING=data/mine trace-bench train rcl ...

checkpoints trained elsewhere:
  trace-bench evaluate runs/theirs --model BASE --checkpoint trace_cstance=PATH --checkpoint trace_fomc=PATH
  trace-bench evaluate runs/general --model BASE --checkpoint v1=PATH --tasks none --general general

the tasks alone, with plain lm-eval:
  TRACE_DATA=demo lm_eval run --model hf --model_args pretrained=MODEL --tasks 'trace_*' \\
      --include_path $(trace-bench tasks-path)
"""
_MEMORY = (
    "In --engine-args, lower batch_size (hf), or max_num_seqs, max_model_len or gpu_memory_utilization (vllm). Then "
    "run the command again."
)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    given = sys.argv[1:] if argv is None else argv
    line = None if argv is None else shlex.join(["trace-bench", *argv])
    with command(next(iter(given), ""), line, _MEMORY):
        if given[:2] == ["data", "audit"]:
            given = ["data audit", *given[2:]]
        args, module = _parse(given)
        prepare_logging()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of NUMA whenever an engine starts on a CPU
        if code := module.run(args):
            sys.exit(code)


#: The commands that other packages have, and where; and one whose name is a word of Python.
ELSEWHERE = {
    **{name: f"trainers.commands.{name}" for name in ("train", "relearn")},
    **{name: f"judges.commands.{name}" for name in ("judge", "annotate")},
    "import": "trace_bench.cli.import_",
}


def module_of(name: str) -> Any:
    """The module of a command of this package, with add_arguments(parser) and run(args) -> exit code or None."""
    module = ELSEWHERE.get(name) or f"trace_bench.cli.{name.replace('-', '_').replace(' ', '_')}"
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    place = Path(next(iter(spec.submodule_search_locations or ()), spec.origin or "")) if spec else Path()
    if place.parent.resolve() != Path(__file__).parents[2].resolve():
        raise HiddenError(
            f"{place} has the same name as the package {package} of trace-bench and hides it. Rename it, or start "
            "`trace-bench` from a different folder without PYTHONPATH."
        )
    return importlib.import_module(module)


def _parse(given: list[str]) -> tuple[argparse.Namespace, Any]:
    """The arguments, and the module of the command."""
    parser = argparse.ArgumentParser(
        prog="trace-bench",
        description="TRACE: continual learning of aligned language models, measured after every stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version() if "--version" in given else "")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, line in COMMANDS.items():
        own = commands.add_parser(name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if given[:1] == [name]:
            module = module_of(name)
            module.add_arguments(own)
    args, unknown = parser.parse_known_args(given)
    if unknown:  # often --test_rows, as training has it; the command's own parser shows the command's usage
        own = commands.choices[args.command]
        near = suggestion(unknown[0].partition("=")[0], re.findall(r"(?<!\S)--[\w-]+", own.format_help()))
        own.error(f"unrecognized arguments: {' '.join(unknown)}.{near}")
    return args, module


def _version() -> str:
    from trace_bench.versions import package_versions

    versions = package_versions(["trace-bench", "lm-eval", "transformers", "trl", "peft", "torch", "vllm"])
    return "trace-bench " + ", ".join(f"{n} {v}" for n, v in versions.items()).removeprefix("trace-bench ")


def show(text: str, end: str = "\n") -> None:
    """Prints text that may come from elsewhere, such as names."""
    print(printable(text), end=end)
