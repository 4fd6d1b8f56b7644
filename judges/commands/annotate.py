"""`trace-bench annotate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from judges.commands.asking import add_asking, make_judge, print_estimate, print_usage
from trace_bench.cli.options import names, positive

EPILOG = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "A teacher writes a reasoning path for each training example. Paths whose own answer is right are\n"
        "kept, with the answer of the data; the others are tried again. OUT gets the official reasoning\n"
        "layout. Replies are kept in OUT/annotate-cache.jsonl, so that nothing is asked or paid twice."
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("out", metavar="OUT", help="the folder to write")
    add_asking(parser, "teacher", '{"temperature": 0.7, "max_tokens": 1024}')
    add("--data", help="the plain data: folder, archive, or demo (default: TRACE_DATA)")
    add("--tasks", help="names with commas, such as trace_fomc,trace_py150, or order1 (all that there are)")
    add("--rows", type=positive, metavar="N", default=500, help="first so many different prompts (500)")
    add("--attempts", type=positive, metavar="N", default=3, help="the most tries of each row (3)")
    add(
        "--rejected",
        choices=["drop", "keep"],
        default="drop",
        help="rows without an accepted path: left out (drop), or written with the answer alone (keep)",
    )
    add("--show-answers", action="store_true", help="let the teacher see the right answers of all tasks")
    add("--prompts", metavar="DIR", help="teacher's prompts of your own, TASK.yaml each")


def run(args: argparse.Namespace) -> int:
    """Writes the reasoning data."""
    from judges import annotate
    from trace_bench.run import locked
    from trace_tasks.data import find_data

    out = Path(args.out)
    teacher = make_judge(args, annotate.cache_file(out), annotate.SAMPLING)
    plan = annotate.plan(
        out,
        teacher,
        find_data(args.data),
        tasks=names(args.tasks),
        rows=args.rows,
        attempts=args.attempts,
        rejected=args.rejected,
        show_answers=args.show_answers,
        prompts=Path(args.prompts) if args.prompts else None,
    )
    if args.dry_run:
        print(f"The first of at most {args.attempts} attempts; later ones ask about rejected rows only:")
        print_estimate(args, teacher, plan.first_requests)
        return 0
    with locked(out, "annotate"):
        results = annotate.annotate(plan, teacher).values()
    asked, accepted = sum(r["rows"] for r in results), sum(r["accepted"] for r in results)
    rest = {"drop": "the others left out", "keep": "the others kept with their answers alone"}[args.rejected]
    what = f"{out}: {accepted} of {asked} rows accepted ({100 * accepted / asked:.1f} %), {rest}"
    print_usage(args, what, teacher.usage)
    return 0
