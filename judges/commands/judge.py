"""`trace-bench judge`."""

from __future__ import annotations

import argparse

from judges import JudgeError
from judges.commands.asking import add_asking, make_judge, print_estimate, print_usage, refuse_useless
from trace_bench.cli import show
from trace_bench.cli.options import LIST, indices, names, positive, put_first

DESCRIPTION = """\
Judges the answers that `trace-bench evaluate` wrote for the tasks instruct_* and safety_*. It compares each
stage with the base model, each pair in both orders, and judges each answer alone. Replies are kept in
judge-cache.jsonl next to the run, so that nothing is asked or paid twice."""
EPILOG = """\
before you spend money:
  trace-bench judge --calibrate --model JUDGE             accuracy and bias on planted pairs (384 requests)
  trace-bench judge runs/mine --model JUDGE --dry-run --price-in 2.5 --price-out 10 --currency USD

with OpenAI (the key is read from OPENAI_API_KEY and never written), a server, or a model in this process:
  trace-bench judge runs/mine --model gpt-4o --batch
  trace-bench judge runs/mine --model MODEL --base-url http://localhost:8000/v1
  trace-bench judge runs/mine --model FOLDER --local

for models that take other parameters, or that think: give them more tokens, or turn thinking off (--local, vLLM):
  --sampling '{"max_completion_tokens": 4096}'            --sampling '{"temperature": 0, "max_tokens": 8192}'
  --sampling '{"temperature": 0, "max_tokens": 1024, "chat_template_kwargs": {"enable_thinking": false}}'

Results: stages/*/judge/SUITE.json and .jsonl, and two sections of `trace-bench report runs/mine`.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the options of `trace-bench judge`."""
    p.description, p.epilog = DESCRIPTION, EPILOG
    run = p.add_argument("path", metavar="RUN", nargs="?", help="the run directory; not needed to calibrate")
    put_first(p, run, "--model NAME_OR_PATH")
    add_asking(p, "judge", '{"temperature": 0, "max_tokens": 1024}')
    p.add_argument("--stages", **LIST, metavar="N", help="stage numbers, such as 0,3,8 (default: all with answers)")
    p.add_argument("--suites", **LIST, metavar="SUITE", help="names, such as instruct_lima,safety_cona (default: all)")
    p.add_argument("--limit", type=positive, metavar="N", help="number of answers of each suite (the first)")
    p.add_argument(
        "--calibrate", action="store_true", help="measure the judge itself, on planted pairs with known verdicts"
    )


def run(args: argparse.Namespace) -> None:
    """Judges a run, or calibrates a judge."""
    from pathlib import Path

    from judges import calibrate, judging
    from trace_bench.run import Run
    from trace_bench.waiting import locked
    from trace_tasks.data.files import check_writable

    if not args.path and not args.calibrate:
        if args.stages or args.suites:
            args.missing()
        raise JudgeError("No run is given: trace-bench judge RUN --model ... (only --calibrate needs no run).")
    stages = indices(args.stages)
    refuse_useless(args, "calibrate", "stages", "suites", "limit")
    run = Run.open(args.path) if args.path else None
    folder = run.path.absolute().parent if run else Path("runs" if Path("runs").is_dir() else ".")
    judge = make_judge(args, judging.cache_file(folder))
    if args.calibrate or run is None:
        if args.dry_run:
            print_estimate(args, judge, calibrate.planted_requests())
        else:
            show(calibrate.write_calibration(judge, folder))
            print_usage(args, "calibrated", judge.usage)
        return
    jobs = judging.plan(run, judge, stages=stages, suites=names(args.suites), limit=args.limit)
    if not jobs:
        print("nothing to judge: every suite is done")
    elif args.dry_run:
        print_estimate(args, judge, judging.requests_of(jobs))
    else:
        with locked(run.path, "judge"):
            check_writable(run.path)
            results = judging.judge_jobs(jobs, judge, limit=args.limit)
        print_usage(args, judging.summary(results, judge.sampling), judge.usage)
