"""`trace-bench judge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from judges.commands.asking import add_asking, make_judge, print_estimate, print_usage, refuse_useless
from trace_bench.cli import show
from trace_bench.cli.options import indices, names, positive

EPILOG = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Judges the answers that `trace-bench evaluate` wrote for the tasks instruct_* and safety_*: each\n"
        "stage against the base model, pair by pair in both orders, and each answer by itself. Replies are\n"
        "kept in judge-cache.jsonl beside the run, so that nothing is asked or paid twice."
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("path", metavar="RUN", nargs="?", help="the run directory; not needed to calibrate")
    add_asking(parser, "judge", '{"temperature": 0, "max_tokens": 1024}')
    add("--stages", help="indices, such as 0,3,8 (default: all that have answers)")
    add("--suites", help="names with commas, such as instruct_lima,safety_cona (default: all)")
    add("--limit", type=positive, metavar="N", help="first so many answers of each suite")
    add("--calibrate", action="store_true", help="ask about planted pairs instead: what is this judge worth?")


def run(args: argparse.Namespace) -> int:
    """Judges the answers of a run, or measures the judge."""
    from judges import JudgeError, calibrate, judging
    from judges.client import SAMPLING
    from trace_bench.run import Run, locked

    stages = indices(args.stages)
    if not args.path and not args.calibrate:
        raise JudgeError("Name the run to judge: trace-bench judge RUN --model ...; only --calibrate needs none.")
    refuse_useless(args, "calibrate", "stages", "suites", "limit")
    chosen = Run.open(args.path) if args.path else None
    folder = chosen.path.parent if chosen else Path("runs" if Path("runs").is_dir() else ".")
    judge = make_judge(args, judging.cache_file(folder), SAMPLING)
    suites = names(args.suites)
    jobs = []
    if chosen and not args.calibrate:
        jobs = judging.plan(chosen, judge, stages=stages, suites=suites, limit=args.limit)
        if not jobs:
            print("nothing to judge: every suite is done")
            return 0

    if args.dry_run:
        planted = [{"messages": m} for m in calibrate.planted_messages() if args.calibrate]
        print_estimate(args, judge, [r for job in jobs for r in job.requests] or planted)
        return 0
    if args.calibrate:
        show(calibrate.write_calibration(judge, folder))
        what = "calibrated"
    else:
        assert chosen is not None
        with locked(chosen.path, "judge"):
            results = judging.judge_jobs(jobs, judge, limit=args.limit)
        what = judging.summary(results, judge.sampling)
    print_usage(args, what, judge.usage)
    return 0
