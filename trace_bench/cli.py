"""The command `trace-bench`: thin, and quick to start, since what is heavy is imported where it is used."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trace_bench.ending import command
from trace_bench.text import prepare_logging, printable

if TYPE_CHECKING:
    from pathlib import Path

    from judges.client import Judge, Request, Usage
    from trace_bench.run import Run

EPILOG = """\
the main job:
  make sequential-train                      train eight stages, evaluate the matrix, write the report (demo data)
  python -m trainers.sequential --config trainers/configs/quickstart.yaml --output_dir runs/mine
  trace-bench evaluate runs/mine             fill the missing cells; interrupted, it goes on where it was
  trace-bench report runs/mine               report.md, report.html, figures/ and scores.csv
  trace-bench status runs/mine               how far it is, while it goes on

instruction following and safety, from the answers to the instruct_* and safety_* tasks:
  trace-bench judge runs/mine --model JUDGE  verdicts against the base model; see trace-bench judge --help

reasoning paths for RCL, written by a teacher and checked:
  trace-bench annotate data/mine --model TEACHER; TRACE_REASONING=data/mine python -m trainers.rcl ...

checkpoints trained elsewhere:
  trace-bench evaluate runs/theirs --model BASE --checkpoint trace_cstance=PATH --checkpoint trace_fomc=PATH
  trace-bench evaluate runs/general --model BASE --checkpoint v1=PATH --tasks none --general general

the tasks alone, with plain lm-eval:
  TRACE_DATA=demo lm_eval run --model hf --model_args pretrained=MODEL --tasks 'trace_*' \\
      --include_path $(trace-bench tasks-path)
"""
JUDGE_EPILOG = """\
before money is spent:
  trace-bench judge --calibrate --model JUDGE             accuracy and bias on planted pairs (384 requests)
  trace-bench judge runs/mine --model JUDGE --dry-run --price-in 2.5 --price-out 10

OpenAI; the key is read from the environment and written nowhere:
  OPENAI_API_KEY=... trace-bench judge runs/mine --model gpt-4o --batch

a server of your own, such as `vllm serve MODEL --host 127.0.0.1`, or no server at all:
  trace-bench judge runs/mine --model MODEL --base-url http://localhost:8000/v1
  trace-bench judge runs/mine --model FOLDER --local

models that take other parameters:
  trace-bench judge runs/mine --model o3 --sampling '{"max_completion_tokens": 4096}'

models that think, which need room, or their thinking turned off (--local and vLLM's server):
  trace-bench judge runs/mine --model FOLDER --local --sampling '{"temperature": 0, "max_tokens": 8192}'
  ... --sampling '{"temperature": 0, "max_tokens": 1024, "chat_template_kwargs": {"enable_thinking": false}}'

Results: stages/*/judge/SUITE.json and .jsonl, and two sections in `trace-bench report runs/mine`.
"""
ANNOTATE_EPILOG = """\
before money is spent:
  trace-bench annotate data/mine --model TEACHER --dry-run --price-in 2.5 --price-out 10
  trace-bench annotate data/try --model TEACHER --rows 20         and read data/try/review.csv

OpenAI; the key is read from the environment and written nowhere:
  OPENAI_API_KEY=... TRACE_DATA=... trace-bench annotate data/mine --model gpt-4o --batch

a server of your own, such as `vllm serve MODEL --host 127.0.0.1`, or no server at all:
  trace-bench annotate data/mine --model MODEL --base-url http://localhost:8000/v1
  trace-bench annotate data/mine --model FOLDER --local

models that take other parameters, or think aloud:
  trace-bench annotate data/mine --model o3 --sampling '{"max_completion_tokens": 4096}'

prompts of your own, such as DIR/fomc.yaml, in the form of judges/teacher/fomc.yaml:
  trace-bench annotate data/mine --model TEACHER --tasks trace_fomc --prompts DIR

then:
  TRACE_REASONING=data/mine python -m trainers.rcl --config trainers/configs/llama2_7b_lora.yaml --output_dir runs/mine

Results: the official reasoning layout, annotation.md and .json, review.csv for people. Interrupted, it goes on.
"""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    given = sys.argv[1:] if argv is None else argv
    with command(next(iter(given), ""), None if argv is None else shlex.join(["trace-bench", *argv])):
        _main(given)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="trace-bench",
        description="TRACE: continual learning of aligned language models, measured after every stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser("data", help="check a data set (folder, archive or demo) and print its fingerprint")
    p.add_argument("source", nargs="?", help="folder, archive, or demo; default: TRACE_DATA")
    p.set_defaults(run=_data)

    p = commands.add_parser(
        "data audit",
        help="audit a data set: repeats, leaks from training to test rows, lengths, broken characters",
        description="Reads a data set, of which parts may be missing, and reports what its scores depend on: repeated\n"
        "rows, contradicting answers, test rows that are trained on, balance, lengths, broken characters and\n"
        "numbers, rows of the other variant. The reasoning variant in or beside it is audited as reasoning_*.\n"
        "Test rows are also looked for in the training rows of other tasks, and of the data sets after --against.",
        epilog="With --output, `trace-bench report RUN --without-leaked FILE.json` makes the scores of a run without\n"
        "the leaked test rows. A folder called audit is ./audit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", nargs="?", help="folder, archive, or demo; default: TRACE_DATA")
    p.add_argument(
        "--against", nargs="+", default=[], metavar="SOURCE", help="other data sets, such as the 5000 variant"
    )
    p.add_argument("--tokenizer", metavar="MODEL", help="hub id or local folder (default: the quickstart model's)")
    p.add_argument("--max-prompt-length", type=_positive, default=1024, metavar="N", help="tokens of a prompt (1024)")
    p.add_argument("--max-answer-length", type=_positive, default=512, metavar="N", help="tokens of an answer (512)")
    p.add_argument("--output", metavar="FILE.json", help="write all of it there, with the numbers of the rows")
    p.set_defaults(run=_audit)

    p = commands.add_parser(
        "evaluate",
        help="fill the cells of a run's matrix, one engine for all stages",
        description="Evaluates every trained stage on the tasks seen so far. Done cells are skipped.",
    )
    p.add_argument("path", metavar="RUN", help="the run directory")
    p.add_argument("--stages", help="indices, such as 0,3,8 (default: all that are trained)")
    p.add_argument("--cells", choices=["seen", "all", "own"], help="tasks of each stage (default: the run's, seen)")
    p.add_argument("--backend", choices=["vllm", "hf"], help="inference engine (default: the run's, vllm)")
    p.add_argument(
        "--engine-args",
        metavar="JSON",
        help="for the engine, beside the run's own, such as '{\"max_model_len\": 4096}'; null takes one away",
    )
    p.add_argument("--data", help="where the data is now, if it was moved")
    g = p.add_argument_group("besides the matrix (default: what the run's configuration says)")
    g.add_argument("--general", metavar="SUITES", help="general (the paper's six) or names of suites, with commas")
    g.add_argument("--general-stages", choices=["last", "all"], help="stage 0 and the last (the default), or all")
    g.add_argument(
        "--general-rows", type=_positive, help="at least so many rows of each suite, as many of each subtask"
    )
    g.add_argument("--judged", metavar="SETS", help="instruct, safety or names of sets, with commas; same stages")
    g.add_argument("--judged-rows", type=_positive, help="first so many prompts of each set")
    g.add_argument("--judged-max-new-tokens", type=_positive, help="the most tokens of an answer (512)")
    g = p.add_argument_group("checkpoints trained elsewhere")
    g.add_argument(
        "--checkpoint",
        action="append",
        metavar="NAME=PATH",
        help="an adapter or full model; repeat in the order of training; NAME = the task of its stage, or any name; a "
        "run of checkpoints takes further ones later, by themselves",
    )
    g.add_argument("--model", help="the base model: hub id, local folder, or SmolLM2-135M-Instruct")
    g.add_argument(
        "--chain", action="store_true", help="each adapter was trained on the base with those before it merged in"
    )
    g.add_argument(
        "--renamed-base", action="store_true", help="--model is a copy of the base that the adapters name otherwise"
    )
    g.add_argument("--tasks", help="columns of the matrix: names with commas, order1 (the default), order2, or none")
    g.add_argument("--test-rows", type=_positive, help="first so many test rows of each task")
    g.add_argument("--max-prompt-length", type=_positive, help="tokens of a prompt, cut on the left (1024)")
    g.add_argument("--max-new-tokens", type=_positive, help="the most tokens of an answer (default: each task's own)")
    g.add_argument("--chat-template", action="store_true", help="put prompts into the model's chat template")
    g.add_argument("--chat-template-args", metavar="JSON", help="its variables, such as '{\"enable_thinking\": false}'")
    p.set_defaults(run=_evaluate)

    p = commands.add_parser(
        "judge",
        help="judge the answers of a run: instruction following and safety against the base model",
        description="Judges the answers that `trace-bench evaluate` wrote for the tasks instruct_* and safety_*: each\n"
        "stage against the base model, pair by pair in both orders, and each answer by itself. Replies are\n"
        "kept in judge-cache.jsonl beside the run, so that nothing is asked or paid twice.",
        epilog=JUDGE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("path", metavar="RUN", nargs="?", help="the run directory; not needed to calibrate")
    _add_asking(p, "judge", '{"temperature": 0, "max_tokens": 1024}')
    p.add_argument("--stages", help="indices, such as 0,3,8 (default: all that have answers)")
    p.add_argument("--suites", help="names with commas, such as instruct_lima,safety_cona (default: all)")
    p.add_argument("--limit", type=_positive, metavar="N", help="first so many answers of each suite")
    p.add_argument(
        "--calibrate", action="store_true", help="ask about planted pairs instead: what is this judge worth?"
    )
    p.set_defaults(run=_judge)

    p = commands.add_parser(
        "annotate",
        help="make the training data of RCL: a teacher writes reasoning paths, which are checked",
        description="A teacher writes a reasoning path for each training example. Paths whose own answer is right are\n"
        "kept, with the answer of the data; the others are tried again. OUT gets the official reasoning\n"
        "layout. Replies are kept in OUT/annotate-cache.jsonl, so that nothing is asked or paid twice.",
        epilog=ANNOTATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("out", metavar="OUT", help="the folder to write")
    _add_asking(p, "teacher", '{"temperature": 0.7, "max_tokens": 1024}')
    p.add_argument("--data", help="the plain data: folder, archive, or demo (default: TRACE_DATA)")
    p.add_argument("--tasks", help="names with commas, such as trace_fomc,trace_py150, or order1 (all that there are)")
    p.add_argument("--rows", type=_positive, metavar="N", default=500, help="first so many different prompts (500)")
    p.add_argument("--attempts", type=_positive, metavar="N", default=3, help="the most tries of each row (3)")
    p.add_argument(
        "--rejected",
        choices=["drop", "keep"],
        default="drop",
        help="rows without an accepted path: left out (drop), or written with the answer alone (keep)",
    )
    p.add_argument("--show-answers", action="store_true", help="let the teacher see the right answers of all tasks")
    p.add_argument("--prompts", metavar="DIR", help="teacher's prompts of your own, TASK.yaml each")
    p.set_defaults(run=_annotate)

    p = commands.add_parser(
        "report",
        help="write report.md, report.html and scores.csv from the files of a run, and compare several runs",
        description="Writes report.md, report.html, figures/ and scores.csv of each run. Several runs are compared.",
    )
    p.add_argument("paths", metavar="RUN", nargs="+", help="a run directory")
    p.add_argument("--baseline", metavar="RUN", help="the run that the others are set against (default: the first)")
    p.add_argument("--output", metavar="FILE", help="write the comparison there too: FILE.html, .md, .csv or .tex")
    p.add_argument(
        "--without-leaked",
        metavar="AUDIT.json",
        help="leave test rows that are trained on out of all scores; a file of `trace-bench data audit --output`",
    )
    p.set_defaults(run=_report)

    p = commands.add_parser(
        "study",
        help="train, evaluate and compare the runs of a study file",
        description="Does the runs of a study one after the other and compares them. Done steps are skipped.",
    )
    p.add_argument("file", metavar="FILE.yaml", help="such as trainers/configs/studies/replay.yaml")
    p.add_argument("--full", action="store_true", help="at the scale of the paper instead of the small one")
    p.add_argument("--output_dir", "--output-dir", metavar="DIR", help="default: runs/<name of the study>-<small|full>")
    p.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="these runs only, by name or by number from 1 on; the table has all that are there",
    )
    p.add_argument("--launch", metavar="COMMAND", help="starts the trainings, as 'accelerate launch --num_processes 8'")
    p.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    p.set_defaults(run=_study)

    p = commands.add_parser(
        "status",
        help="how far a run is: stages trained, step and time left of the one in training, tasks evaluated",
        description="Says how far a run is, from its files alone, while it goes on or afterwards.",
    )
    p.add_argument("path", metavar="RUN", help="the run directory")
    p.set_defaults(run=_status)

    p = commands.add_parser("tasks-path", help="print the folder of the lm-eval tasks, for --include_path")
    p.add_argument(
        "--install",
        action="store_true",
        help="make lm-eval of this environment find them without --include_path",
    )
    p.set_defaults(run=_tasks_path)

    p = commands.add_parser("model-path", help="print the folder of a model, preparing the quickstart model if asked")
    p.add_argument("name", nargs="?", default="SmolLM2-135M-Instruct")
    p.set_defaults(run=_model_path)

    if argv[:2] == ["data", "audit"]:
        argv = ["data audit", *argv[2:]]
    args = parser.parse_args(argv)
    prepare_logging()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a line on NUMA whenever an engine starts on a CPU
    from judges import JudgeError
    from trace_bench.engine import EngineError
    from trace_bench.models import ModelError
    from trace_bench.run import RunError, advice
    from trace_bench.study import StudyError
    from trace_bench.versions import VersionError
    from trace_tasks.data import DataError
    from trace_tasks.tokens import PromptError

    try:
        args.run(args)
    except (DataError, EngineError, JudgeError, ModelError, PromptError, RunError, StudyError, VersionError) as e:
        sys.exit(printable(f"error: {e}"))
    except Exception as e:  # a full disk, no permission, no memory: from whatever library
        line = advice(e, _MEMORY)
        if line is None:
            raise
        sys.exit(printable(f"error: {line}"))


_MEMORY = (
    "Give --engine-args a smaller batch_size (hf), or max_num_seqs, max_model_len or gpu_memory_utilization (vllm), "
    "and run the command again."
)


_OF_TASKS = ("test_rows", "max_prompt_length", "max_new_tokens", "chat_template", "chat_template_args")
_OF_CHECKPOINTS = ("model", "tasks", "chain", "renamed_base", *_OF_TASKS)


def _show(text: str, end: str = "\n") -> None:
    """Prints what may hold names and texts from elsewhere."""
    print(printable(text), end=end)


def _options(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: use a number of at least 1")
    return number


def _price(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: use the price of a million tokens, such as 2.5")
    return number


def _json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """Reads an option that is a JSON object; None if it is not given."""
    import json

    from trace_bench.run import RunError

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(text, parse_constant=refuse) if text else None
    except (ValueError, RecursionError) as e:
        raise RunError(f"{option} must be a JSON object: {e}") from e
    if value is not None and not isinstance(value, dict):
        raise RunError(f"{option} must be a JSON object: {text} is none")
    return value


def _indices(stages: str | None) -> list[int] | None:
    """Reads --stages; None if it is not given."""
    from trace_bench.run import RunError

    try:
        return [int(s) for s in stages.split(",")] if stages else None
    except ValueError as e:
        raise RunError(f"--stages numbers are written with commas, such as 0,3,8: {e}") from e


def _data(args: argparse.Namespace) -> None:
    from trace_tasks import data

    good, problems = [], []
    for root in data.find_all_data(args.source):
        reasoning = data.is_reasoning(root)
        variable, names = ("TRACE_REASONING", data.REASONING) if reasoning else ("TRACE_DATA", data.FOLDERS)
        there = {task: root / folder for task, folder in names.items() if (root / folder).is_dir()}
        complete, problem = _complete(there, data.SPLITS)
        tested, _ = _complete(there, ["test"])
        _show(f"{root}\n{'task':<22}{'train':>8}{'eval':>8}{'test':>8}  fingerprint")
        for task, rows in tested.items():
            sizes = "".join(f"{rows.get(split, '-'):>8}" for split in data.SPLITS)
            _show(f"{task:<22}{sizes}  {data.folder_fingerprint(there[task])}")
        if data.is_demo(root):
            print("Demo data made by this program: for trials, not comparable with TRACE.")
        export = f"  export {variable}={root}"
        part = [f"Complete: {len(complete)} of {len(names)} tasks."]
        if complete:
            part += [f"Train and evaluate them with:\n{export}\n  --tasks {' '.join(complete)}"]
        if len(tested) > len(complete):
            part += [f"With test rows, to evaluate checkpoints on:\n{export}\n  --tasks {','.join(tested)}"]
        if not complete or len(tested) < len(there):
            problems.append("\n".join([f"{root} cannot be used as it is.", problem, *part]))
        elif len(complete) < len(names):
            absent = [task for task in names if task not in there]
            part += [f"Not there: {', '.join(absent)}."] if absent else []
            _show("\n".join([*([problem] if problem else []), *part]))
        elif reasoning:
            _show(
                f"The variant with reasoning, for the tasks reasoning_*, beside the plain rows. Use it with:\n{export}"
            )
        else:
            good.append(export)
    if good:
        print("Complete. Use it with:" if len(good) == 1 else "Complete. Use one of them with:")
        _show("\n".join(good))
    if problems:
        raise data.DataError("\n".join(problems))


def _complete(folders: dict[str, Path], needed: Sequence[str]) -> tuple[dict[str, dict[str, int]], str]:
    """The rows of each task that has all that is needed of it, and what is wrong with the others."""
    from trace_tasks import data

    try:
        return data.check_folders(folders, needed), ""
    except data.DataError as e:
        alone = [_complete({task: folder}, needed)[0] for task, folder in folders.items()] if len(folders) > 1 else []
        return {task: sizes for good in alone for task, sizes in good.items()}, str(e)


def _audit(args: argparse.Namespace) -> None:
    from pathlib import Path

    from trace_bench.models import open_tokenizer
    from trace_tasks import data
    from trace_tasks.data import audit, audit_text
    from trace_tasks.data.files import write_json

    if args.output and not args.output.endswith(".json"):
        raise data.DataError(f"--output {args.output}: name a file that ends in .json.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    root = data.find_data(args.source)
    report = audit.audit(
        root,
        open_tokenizer(args.tokenizer),
        max_prompt_length=args.max_prompt_length,
        max_answer_length=args.max_answer_length,
        against=[root for source in args.against for root in data.find_all_data(source)],
    )
    _show(audit_text.as_text(report))
    if args.output:
        write_json(Path(args.output), report)
        _show(f"All of it, with the numbers of the rows: {args.output}")
    if report["unreadable"]:
        raise data.DataError("\n".join(report["unreadable"]))


def _checkpoints_run(args: argparse.Namespace, besides: dict[str, Any], engine_args: dict[str, Any] | None) -> Run:
    """The run of the checkpoints that --checkpoint names, begun or with them added."""
    from trace_bench.evaluate import external_run, measured_run
    from trace_bench.run import RunError
    from trace_tasks import data

    pairs = [c.partition("=") for c in args.checkpoint]
    if not all(name and path for name, _, path in pairs):
        raise RunError(f"--checkpoint {' '.join(args.checkpoint)}: write each as NAME=PATH.")
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise RunError(f"--checkpoint: each NAME can be given once; found {', '.join(names)}.")
    args.chat_template_args = _json_object("--chat-template-args", args.chat_template_args)
    given = {name: value for name in (*_OF_CHECKPOINTS, "backend") if (value := getattr(args, name))}
    if "tasks" in given:
        listed = [] if given["tasks"] == "none" else given["tasks"].split(",")
        given["tasks"] = [t for name in listed for t in data.ORDERS.get(name, [name])]
    run = measured_run(args.path)
    if run is not None:  # further checkpoints: what is not given is the run's own
        manifest = run.manifest
        known = {"model": manifest["model"]["name"], "tasks": manifest["tasks"], **manifest["config"]}
        known |= {name: manifest.get(name, False) for name in ("chain", "renamed_base")}
    elif "model" not in given:
        raise RunError("--checkpoint needs --model: the base model that the checkpoints were trained from.")
    elif given.get("tasks") == [] and not {"general", "judged"} & besides.keys():
        raise RunError("--tasks none leaves nothing to measure: say what with --general, --judged, or both.")
    else:
        # As the run's own, for checkpoints that come later: a delta needs the same at all of them.
        known = {"backend": "vllm", "tasks": data.ORDERS["order1"], "test_rows": None, "max_prompt_length": 1024}
        known |= {"max_new_tokens": None, "chat_template": False, "general_stages": "last", **besides}
        if given.get("tasks") == [] and args.general_stages is None:
            known["general_stages"] = "all"  # a checkpoint in between would have nothing
        known |= {"engine_args": engine_args} if engine_args else {}
        known |= {"chain": False, "renamed_base": False}
    settings = {**known, **given}
    for_tasks = [name for name in ("data", *_OF_TASKS) if getattr(args, name)]
    if settings["tasks"] == [] and for_tasks:
        raise RunError(
            f"{_options(for_tasks)}: for tasks, and there are none. The others have --general-rows, --judged-rows "
            "and --judged-max-new-tokens."
        )
    return external_run(
        args.path,
        {name: path for name, _, path in pairs},
        model=settings.pop("model"),
        tasks=settings.pop("tasks"),
        chain=settings.pop("chain"),
        renamed_base=settings.pop("renamed_base"),
        settings=settings,
        data_path=args.data,
    )


def _evaluate(args: argparse.Namespace) -> None:
    from trace_bench.evaluate import BESIDES, evaluate
    from trace_bench.run import Run, RunError

    engine_args, stages = _json_object("--engine-args", args.engine_args), _indices(args.stages)
    besides = {name: value for name in BESIDES if (value := getattr(args, name)) is not None}
    besides |= {name: besides[name].split(",") for name in ("general", "judged") if name in besides}
    if args.checkpoint:
        run = _checkpoints_run(args, besides, engine_args)
    else:
        wrong = [n for n in _OF_CHECKPOINTS if getattr(args, n)]
        if wrong:
            raise RunError(f"{_options(wrong)}: only with --checkpoint; a run has these in its manifest.")
        run = Run.open(args.path)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for library in ("HF_HUB", "HF_DATASETS"):  # the bar of the cells is enough
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    done = evaluate(
        run,
        stages=stages,
        cells=args.cells,
        backend=args.backend,
        engine_args=engine_args,
        data_path=args.data,
        besides=besides,
    )
    if not done:
        print("nothing to evaluate: every cell is done")


def _add_asking(p: argparse.ArgumentParser, who: str, sampling: str) -> None:
    """Adds the options of a command that asks a model: which one, where, how, and at which price."""
    g = p.add_argument_group(f"the {who}")
    g.add_argument("--model", required=True, metavar="NAME_OR_PATH", help=f"the {who}, as the endpoint calls it")
    g.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible endpoint (default: OPENAI_BASE_URL, OpenAI)")
    g.add_argument("--local", action="store_true", help=f"run the {who} here in vLLM: a hub id or a local folder")
    g.add_argument("--engine-args", metavar="JSON", help="for --local, such as '{\"tensor_parallel_size\": 8}'")
    g.add_argument("--concurrency", type=_positive, metavar="N", help="the most requests at a time (8)")
    g.add_argument("--sampling", metavar="JSON", help=f"parameters of each request ('{sampling}')")
    g.add_argument("--batch", action="store_true", help="use the Batch API: within a day, cheaper; resumable")
    g.add_argument("--price-in", type=_price, metavar="X", help="price of a million prompt tokens, to show the cost")
    g.add_argument("--price-out", type=_price, metavar="Y", help="price of a million reply tokens")
    g.add_argument("--dry-run", action="store_true", help="count requests, tokens and cost, and ask nothing")


def _refuse_useless(args: argparse.Namespace, switch: str, *useless: str) -> None:
    """Refuses options that do nothing beside another one."""
    from judges import JudgeError

    given = [f"--{n.replace('_', '-')}" for n in useless if getattr(args, switch) and getattr(args, n)]
    if given:
        raise JudgeError(f"{', '.join(given)}: does nothing with --{switch}. Leave it out.")


def _make_judge(args: argparse.Namespace, cache: Path, sampling: dict[str, Any]) -> Judge:
    """The model that the options of `_add_asking` name; `sampling` where they give none."""
    from judges import JudgeError
    from judges.client import Client
    from trace_bench import versions

    versions.check()
    if (args.price_in is None) != (args.price_out is None):
        raise JudgeError("--price-in and --price-out belong together: the prices of a million tokens.")
    _refuse_useless(args, "local", "base_url", "concurrency", "batch")
    given = _json_object("--sampling", args.sampling)
    sampling = sampling if given is None else given
    if args.engine_args and not args.local:
        raise JudgeError("--engine-args is for the engine of --local. Leave it out.")
    if args.local:
        from judges.local import LocalJudge

        engine_args = _json_object("--engine-args", args.engine_args)
        return LocalJudge(args.model, cache=cache, sampling=sampling, engine_args=engine_args)
    return Client(
        args.model,
        cache=cache,
        base_url=args.base_url,
        sampling=sampling,
        concurrency=args.concurrency or 8,
        batch=args.batch,
    )


def _cost(args: argparse.Namespace, usage: Usage) -> str:
    return "" if args.price_in is None else f", cost {usage.cost(args.price_in, args.price_out):.2f}"


def _print_estimate(args: argparse.Namespace, judge: Judge, requests: list[Request]) -> None:
    from judges.client import CHARACTERS_PER_TOKEN, TOKENS_PER_REPLY

    guess = judge.estimate(requests)
    _show(
        f"{guess.sent} requests to send to {judge.endpoint}, {guess.cached} in the cache; about "
        f"{guess.prompt_tokens:,} prompt tokens (characters / {CHARACTERS_PER_TOKEN}) and "
        f"{guess.completion_tokens:,} reply tokens (at most {TOKENS_PER_REPLY} each){_cost(args, guess)}"
    )


def _print_usage(args: argparse.Namespace, what: str, usage: Usage) -> None:
    _show(
        f"{what}: {usage.sent} requests sent, {usage.cached} from the cache, {usage.failed} failed; "
        f"{usage.prompt_tokens:,} prompt and {usage.completion_tokens:,} reply tokens{_cost(args, usage)}"
    )


def _judge(args: argparse.Namespace) -> None:
    from pathlib import Path

    from judges import JudgeError, calibrate, judging
    from judges.client import SAMPLING
    from trace_bench.run import Run, locked

    stages = _indices(args.stages)
    if not args.path and not args.calibrate:
        raise JudgeError("Name the run to judge: trace-bench judge RUN --model ...; only --calibrate needs none.")
    _refuse_useless(args, "calibrate", "stages", "suites", "limit")
    run = Run.open(args.path) if args.path else None
    folder = run.path.parent if run else Path("runs" if Path("runs").is_dir() else ".")
    judge = _make_judge(args, judging.cache_file(folder), SAMPLING)
    suites = [s for s in args.suites.split(",") if s] if args.suites else None
    jobs = []
    if run and not args.calibrate:
        jobs = judging.plan(run, judge, stages=stages, suites=suites, limit=args.limit)
        if not jobs:
            print("nothing to judge: every suite is done")
            return

    if args.dry_run:
        planted = [{"messages": m} for m in calibrate.planted_messages() if args.calibrate]
        _print_estimate(args, judge, [r for job in jobs for r in job.requests] or planted)
        return
    if args.calibrate:
        _show(calibrate.write_calibration(judge, folder))
        what = "calibrated"
    else:
        assert run is not None
        with locked(run.path, "judge"):
            results = judging.judge_jobs(jobs, judge, limit=args.limit)
        what = judging.summary(results, judge.sampling)
    _print_usage(args, what, judge.usage)


def _annotate(args: argparse.Namespace) -> None:
    from pathlib import Path

    from judges import annotate
    from trace_bench.run import locked
    from trace_tasks.data import find_data

    out = Path(args.out)
    teacher = _make_judge(args, annotate.cache_file(out), annotate.SAMPLING)
    plan = annotate.plan(
        out,
        teacher,
        find_data(args.data),
        tasks=[t for t in args.tasks.split(",") if t] if args.tasks else None,
        rows=args.rows,
        attempts=args.attempts,
        rejected=args.rejected,
        show_answers=args.show_answers,
        prompts=Path(args.prompts) if args.prompts else None,
    )
    if args.dry_run:
        print(f"The first of at most {args.attempts} attempts; later ones ask about rejected rows only:")
        _print_estimate(args, teacher, plan.first_requests)
        return
    with locked(out, "annotate"):
        results = annotate.annotate(plan, teacher).values()
    asked, accepted = sum(r["rows"] for r in results), sum(r["accepted"] for r in results)
    rest = {"drop": "the others left out", "keep": "the others kept with their answers alone"}[args.rejected]
    what = f"{out}: {accepted} of {asked} rows accepted ({100 * accepted / asked:.1f} %), {rest}"
    _print_usage(args, what, teacher.usage)


def _report(args: argparse.Namespace) -> None:
    from pathlib import Path

    from trace_bench.comparison import check_output, write_comparison
    from trace_bench.leaks import without_leaked
    from trace_bench.report import write_report
    from trace_bench.run import Run

    check_output(args.output)

    def open_run(path: str) -> Run:
        run = Run.open(path)
        return without_leaked(run, Path(args.without_leaked)) if args.without_leaked else run

    runs = [open_run(path) for path in dict.fromkeys(args.paths)]
    baseline = open_run(args.baseline) if args.baseline else None
    lines = [write_report(run) for run in runs]
    if len(runs) == 1 and not args.output and baseline is None:
        _show(lines[0])
    else:
        _show(write_comparison(runs, args.output, baseline), end="")


def _study(args: argparse.Namespace) -> None:
    from trace_bench.study import run_study

    if not run_study(
        args.file,
        full=args.full,
        output_dir=args.output_dir,
        only=args.only,
        launch=args.launch,
        dry_run=args.dry_run,
    ):
        sys.exit(1)


def _status(args: argparse.Namespace) -> None:
    from trace_bench.run import Run
    from trace_bench.status import status

    _show(status(Run.open(args.path)))


def _tasks_path(args: argparse.Namespace) -> None:
    from trace_tasks.data import TASKS_PATH

    if args.install:
        # lm-eval looks for tasks in its own folder only and follows no links: a stub there includes each of ours.
        import importlib.util
        from pathlib import Path

        spec = importlib.util.find_spec("lm_eval")
        if spec is None or spec.origin is None:
            sys.exit("error: lm-eval is not installed in this environment.")
        folder = Path(spec.origin).parent / "tasks" / "trace_bench"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.yaml"):
            old.unlink()
        for task in TASKS_PATH.glob("*.yaml"):
            text = task.read_text(encoding="utf-8")
            # A group's task list is not inherited by an include, so a group is written out.
            stub = text if "\ngroup:" in f"\n{text}" else f"include: {task}\n"
            (folder / task.name).write_text(stub, encoding="utf-8")
    print(TASKS_PATH)


def _model_path(args: argparse.Namespace) -> None:
    from trace_bench.models import resolve_model

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(resolve_model(args.name))


if __name__ == "__main__":
    main()
