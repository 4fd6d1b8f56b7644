"""`trace-bench annotate`."""

from __future__ import annotations

import argparse

from judges.commands.asking import add_asking, make_judge, print_estimate, print_most, print_usage
from trace_bench.cli.options import LIST, names, positive, put_first

DESCRIPTION = """\
A teacher writes a reasoning path for each training example. A path is accepted if its answer is right, and
is written with the answer of the data. The other rows are tried again. OUT gets the official reasoning
layout. Replies are kept in OUT/annotate-cache.jsonl, so that nothing is asked or paid twice."""
EPILOG = """\
before you spend money, and before all rows are asked:
  trace-bench annotate data/mine --model TEACHER --dry-run --price-in 2.5 --price-out 10 --currency USD
  trace-bench annotate data/try --model TEACHER --rows 20         then read data/try/review.csv

with OpenAI (the key is read from OPENAI_API_KEY and never written), a server, or a model in this process:
  trace-bench annotate data/mine --model gpt-4o --batch
  trace-bench annotate data/mine --model MODEL --base-url http://localhost:8000/v1
  trace-bench annotate data/mine --model FOLDER --local

then: TRACE_REASONING=data/mine trace-bench train rcl --config llama2_7b_lora --output_dir runs/rcl

Results: the official reasoning layout, annotation.md and .json, and review.csv to read. Run it again to continue.
Your own prompts are files such as DIR/fomc.yaml, in the form of judges/teacher/fomc.yaml.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the options of `trace-bench annotate`."""
    p.description, p.epilog = DESCRIPTION, EPILOG
    put_first(p, p.add_argument("out", metavar="OUT", help="the folder to write"), "--model NAME_OR_PATH")
    add_asking(p, "teacher", '{"temperature": 0.7, "max_tokens": 1024}')
    p.add_argument("--data", help="the plain data: folder, archive, or demo (default: TRACE_DATA)")
    p.add_argument("--tasks", **LIST, metavar="TASK", help="task names, such as trace_fomc,trace_py150 (default: all)")
    p.add_argument(
        "--rows", type=positive, metavar="N", default=500, help="number of different prompts (the first 500)"
    )
    p.add_argument("--attempts", type=positive, metavar="N", default=3, help="most attempts for each row (3)")
    p.add_argument(
        "--rejected",
        choices=["drop", "keep"],
        default="drop",
        help="rows without an accepted path: drop leaves them out, keep writes them with only the answer",
    )
    p.add_argument("--show-answers", action="store_true", help="let the teacher see the right answers of all tasks")
    p.add_argument("--prompts", metavar="DIR", help="a folder with your own prompts for the teacher, TASK.yaml each")


def run(args: argparse.Namespace) -> None:
    """Annotates a data set."""
    from pathlib import Path

    from judges.teacher.annotate import CACHE, SAMPLING, annotate, plan, possible_requests
    from trace_bench.waiting import locked
    from trace_tasks.data import find_data
    from trace_tasks.data.files import check_writable

    out = Path(args.out)
    teacher = make_judge(args, out / CACHE, SAMPLING)
    planned = plan(
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
        print(f"The first of at most {args.attempts} attempts; later ones ask only about rejected rows:")
        print_estimate(args, teacher, planned.requests(planned.all_rows()))
        if args.attempts > 1:
            what = f"all {args.attempts} attempts, if every path is rejected"
            print_most(args, teacher, what, possible_requests(planned, teacher))
        return
    with locked(out, "annotate"):
        check_writable(out)
        results = annotate(planned, teacher).values()
    asked, accepted = sum(r["rows"] for r in results), sum(r["accepted"] for r in results)
    rest = {"drop": "the others left out", "keep": "the others written with only their answers"}[args.rejected]
    what = f"{out}: {accepted} of {asked} rows accepted ({100 * accepted / asked:.1f} %), {rest}"
    print_usage(args, what, teacher.usage)
