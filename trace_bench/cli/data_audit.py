"""`trace-bench data audit`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from trace_bench.cli import show
from trace_bench.cli.options import LIST, positive, put_first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Reports what the scores on a data set depend on: repeated rows, contradicting answers, test rows among\n"
        "the training rows, balance, lengths, broken characters and numbers, rows of the other variant. Parts of\n"
        "the data may be missing. A reasoning variant in or next to it is audited as reasoning_*. Test rows are\n"
        "also searched in the training rows of other tasks, and of the data sets named with --against."
    )
    parser.epilog = (
        "After --output FILE.json, `trace-bench report RUN --without-leaked FILE.json` computes the scores of a run\n"
        "without the leaked test rows. To check a folder named audit, write ./audit."
    )
    add = parser.add_argument
    source = add(
        "source", metavar="SOURCE", nargs="?", help="a folder (also CL_Benchmark), an archive, or demo (TRACE_DATA)"
    )
    put_first(parser, source)
    add("--against", **LIST, metavar="SOURCE", help="other data sets, such as the 5000 variant")
    add("--tokenizer", metavar="MODEL", help="hub id or local folder (default: that of the quickstart model)")
    add("--max-prompt-length", type=positive, default=1024, metavar="N", help="most tokens of a prompt (1024)")
    add("--max-answer-length", type=positive, default=512, metavar="N", help="most tokens of an answer (512)")
    add("--output", metavar="FILE.json", help="write the whole audit to this file, with row numbers")


def _all_data(source: str) -> list[Path]:
    from trace_tasks import data

    pack = data.is_cl_benchmark(Path(source))
    return [data.find_cl_benchmark(source)] if pack else data.find_all_data(source)


def run(args: argparse.Namespace) -> None:
    """Shows the audit of a data set, and writes it."""
    from trace_bench.engine.models import open_tokenizer
    from trace_tasks import data
    from trace_tasks.data import audit, audit_text
    from trace_tasks.data.files import write_json

    if args.output and not args.output.endswith(".json"):
        raise data.DataError(f"--output {args.output} does not end in .json: name a file FILE.json.")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if args.against and not args.source and not os.environ.get("TRACE_DATA"):
        args.missing()
    pack = args.source and data.is_cl_benchmark(Path(args.source))
    root = data.find_cl_benchmark(args.source) if pack else data.find_data(args.source)
    others = [source for source in re.split(r" *, *", ",".join(args.against or ())) if source]  # paths may have spaces
    report = audit.audit(
        root,
        open_tokenizer(args.tokenizer),
        max_prompt_length=args.max_prompt_length,
        max_answer_length=args.max_answer_length,
        against=[root for source in others for root in _all_data(source)],
    )
    show(audit_text.as_text(report))
    if args.output:
        write_json(Path(args.output), report)
        show(f"The whole audit, with row numbers: {args.output}")
    if report["unreadable"]:
        raise data.DataError("\n".join(report["unreadable"]))
