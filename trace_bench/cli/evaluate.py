"""`trace-bench evaluate`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import Any

from trace_bench.cli.options import LIST, indices, json_object, names, options, pairs, positive, put_first
from trace_bench.manifest import ALLOWED
from trace_bench.run import Run, RunError

#: Options that a run has in its manifest, so that they go with --checkpoint only; the first need tasks.
_OF_TASKS = ("test_rows", "max_prompt_length", "max_new_tokens", "chat_template", "chat_template_args")
_OF_CHECKPOINTS = ("tasks", "chain", "renamed_base", *_OF_TASKS)
#: Options that say what is asked for: the processes of --devices get them as well.
_ASKED = ("stages", "cells", "backend", "engine_args", "likelihood", "data", "given")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = "Evaluates every trained stage on the tasks seen so far. Done cells are skipped."
    add = parser.add_argument
    put_first(parser, add("path", metavar="RUN", help="the run directory"))
    add("--stages", **LIST, metavar="N", help="stage numbers, such as 0,3,8 (default: all trained stages)")
    add("--cells", choices=ALLOWED["cells"], help="tasks to measure at each stage (default: the run's, or seen)")
    add("--backend", choices=ALLOWED["backend"], help="inference engine (default: the run's, or vllm)")
    add(
        "--engine-args",
        metavar="JSON",
        help="engine arguments, added to the run's own, such as '{\"max_model_len\": 4096}'; null removes one",
    )
    add(
        "--likelihood",
        action=argparse.BooleanOptionalAction,
        help="--likelihood: measure the likelihood of the reference answers for old cells too, without generating "
        "again; --no-likelihood: for no cells (default: for new cells)",
    )
    add("--data", help="the folder of the data, if it was moved")
    add("--follow", action="store_true", help="wait for stages in training, and evaluate each when it is trained")
    add(
        "--devices",
        **LIST,
        metavar="GPU",
        help="one process on each device, which takes the next free stage: all, 0,1,3, or cpu,cpu for two on the CPU",
    )
    add("--share", action="store_true", help="share the stages with other processes, such as those of a cluster job")
    add = parser.add_argument_group(
        "in addition to the matrix (default: what the run's configuration says)"
    ).add_argument
    add("--general", **LIST, metavar="SUITE", help="general-ability suites: general (the paper's six), or names")
    stages = ALLOWED["general_stages"]
    add("--general-stages", choices=stages, help="last: stage 0 and the last (default); all: every stage")
    add("--general-rows", type=positive, help="at least this many rows of each suite, equally from each subtask")
    add("--given", type=positive, metavar="K", help="also measure old tasks with the first K reference tokens given")
    add("--judged", **LIST, metavar="SET", help="prompts for judges: instruct, safety or names; same stages")
    add("--judged-rows", type=positive, help="number of prompts of each set (the first)")
    add("--judged-max-new-tokens", type=positive, help="most tokens of an answer to them (512)")
    add(
        "--distance",
        action="store_true",
        default=None,
        help="KL divergence of each stage from the base model, on its own task's prompts and on neutral questions",
    )
    _add_checkpoints(parser)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("checkpoints trained elsewhere").add_argument
    add(
        "--checkpoint",
        action="append",
        metavar="NAME=PATH",
        help="an adapter or full model; repeat it in the order of training; NAME is the task of the stage, or any "
        "name; to add one later, give only the new one",
    )
    add("--drop", **LIST, metavar="NAME", help="remove checkpoints and their measurements from the run")
    add("--model", help="the base model: hub id, folder, or SmolLM2-135M-Instruct; for any run: its new folder")
    add("--chain", action="store_true", help="each adapter was trained on the base with all earlier ones merged in")
    add("--renamed-base", action="store_true", help="--model is the base under another name than the adapters give")
    add("--tasks", **LIST, metavar="TASK", help="columns of the matrix: names, an order (default: order1), or none")
    add("--test-rows", type=positive, help="number of test rows of each task (the first)")
    add("--max-prompt-length", type=positive, help="most tokens of a prompt, which is cut on the left (1024)")
    add("--max-new-tokens", type=positive, help="most tokens of an answer (default: each task's own)")
    add("--chat-template", action="store_true", help="put prompts into the model's chat template")
    add("--chat-template-args", metavar="JSON", help="variables of it, such as '{\"enable_thinking\": false}'")


def run(args: argparse.Namespace) -> None:
    """Evaluates the missing cells of a run, or of checkpoints from elsewhere."""
    from trace_bench import checks, evaluate

    devices = evaluate.find_devices(names(args.devices) or ()) if args.devices else []
    engine_args, stages = json_object("--engine-args", args.engine_args), indices(args.stages)
    extra = {name: value for name in evaluate.EXTRA_SETTINGS if (value := getattr(args, name)) is not None}
    extra |= {name: names(extra[name]) for name in ("general", "judged") if name in extra}
    if args.follow and (args.checkpoint or args.drop):
        raise RunError("--follow does not work with --checkpoint or --drop: it is for a run that this program trains.")
    if args.drop:
        dropped = names(args.drop) or []
        left = evaluate.drop(args.path, dropped)
        rest = len(left.stages) - 1
        print(f"dropped {', '.join(dropped)}; the run now has {rest} checkpoint{'s' * (rest != 1)}")
        if not args.checkpoint:
            return
    if not args.checkpoint and (wrong := [name for name in _OF_CHECKPOINTS if getattr(args, name)]):
        raise RunError(f"{options(wrong)}: only with --checkpoint. An existing run takes these from its manifest.")
    if args.model and not args.checkpoint:
        checks.move_base(Run.open(args.path), args.model)
    for library in ("HF_HUB", "HF_DATASETS"):  # the bar of the cells is enough
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    asked = {"stages": stages, "cells": args.cells, "backend": args.backend, "engine_args": engine_args}
    asked |= {"data_path": args.data, "extra": extra, "likelihood": args.likelihood, "given": args.given}
    run = _run_of_checkpoints(args, extra, engine_args) if args.checkpoint else None
    if devices:
        words = _options(args, (*_ASKED, *evaluate.EXTRA_SETTINGS))
        done = evaluate.evaluate_on(args.path, devices, words, follow=args.follow, **asked)
    elif args.follow:
        done = evaluate.follow(args.path, share=args.share, **asked)
    else:
        done = evaluate.evaluate(run or Run.open(args.path), share=args.share, **asked)
    if not done:
        print("nothing to evaluate: every cell is done" + ", or in work by another process" * args.share)


def _options(args: argparse.Namespace, keys: Iterable[str]) -> list[str]:
    """Options that were given, as they are written on the command line."""
    words: list[str] = []
    for key in keys:
        value = getattr(args, key)
        if isinstance(value, bool):
            words.append(options([key]) if value else f"--no-{key}")
        elif value is not None:
            words += [options([key]), *map(str, value if isinstance(value, list) else [value])]
    return words


def _run_of_checkpoints(args: argparse.Namespace, extra: dict[str, Any], engine_args: dict[str, Any] | None) -> Run:
    """The run of the checkpoints that --checkpoint names: a new one, or one to which they are added."""
    from trace_bench.tasks import check_names
    from trace_tasks import data

    checkpoints = pairs("--checkpoint", args.checkpoint)
    args.chat_template_args = json_object("--chat-template-args", args.chat_template_args)
    given = {name: value for name in ("model", *_OF_CHECKPOINTS, "backend") if (value := getattr(args, name))}
    if "tasks" in given:
        listed = names(given["tasks"])
        given["tasks"] = [] if listed == ["none"] else data.expand_orders(listed or ())
        check_names(given["tasks"])  # before the libraries are imported, which takes seconds
    from trace_bench import evaluate

    there = evaluate.measured_run(args.path)
    if there is not None:  # what is not given is as in the run
        manifest = there.manifest
        known = {"model": manifest["model"]["name"], "tasks": manifest["tasks"], **manifest["config"]}
        known |= {name: manifest.get(name, False) for name in ("chain", "renamed_base")}
    elif "model" not in given:
        raise RunError("--checkpoint needs --model BASE: name the base model that the checkpoints were trained from.")
    elif given.get("tasks") == [] and not {"general", "judged", "distance"} & extra.keys():
        raise RunError("--tasks none leaves nothing to measure: add --general, --judged or --distance.")
    else:
        known = {"chain": False, "renamed_base": False, "tasks": data.ORDERS["order1"]}
        # Recorded for later checkpoints: all of them need the same, or their differences mean nothing.
        known |= {"backend": "vllm", "test_rows": None, "max_prompt_length": 1024, "max_new_tokens": None}
        known |= {"chat_template": False, "general_stages": "last", **extra}
        if given.get("tasks") == [] and args.general_stages is None:
            known["general_stages"] = "all"  # else nothing would be measured of a checkpoint in between
        known |= {"engine_args": engine_args} if engine_args else {}
    settings = {**known, **given}
    # Answers to be judged and neutral questions are in the template, too.
    for_tasks = [name for name in ("data", *_OF_TASKS) if getattr(args, name) and name != "chat_template_args"]
    if settings["tasks"] == [] and for_tasks:
        raise RunError(
            f"{options(for_tasks)}: only for tasks, and --tasks is none. For the others use --general-rows, "
            "--judged-rows and --judged-max-new-tokens."
        )
    own = {name: settings.pop(name) for name in ("model", "tasks", "chain", "renamed_base")}
    return evaluate.external_run(args.path, checkpoints, settings=settings, data_path=args.data, **own)
