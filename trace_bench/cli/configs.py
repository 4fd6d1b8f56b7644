"""`trace-bench configs`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from trace_bench import packaged
from trace_bench.cli import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Lists the configs and studies of the package. Use them by name: `trace-bench train METHOD --config NAME`\n"
        "and `trace-bench study NAME`."
    )
    parser.epilog = "To change one, copy it: trace-bench configs --copy quickstart; then use --config quickstart.yaml"
    parser.add_argument("--copy", metavar="NAME", help="copy this config, study or table into the working directory")


def run(args: argparse.Namespace) -> None:
    """Shows the list, or copies a file."""
    configs, studies, tuned = packaged.configs(), packaged.studies(), packaged.tuned()
    if args.copy:
        source = packaged.find("config, study or table", args.copy, {**tuned, **studies, **configs})
        target = Path(source.name)
        if target.exists():
            raise packaged.UnknownName(f"{target} already exists. Move it away, or use it as it is: --config {target}")
        text = source.read_text(encoding="utf-8")
        if source.parent.name == "studies":  # by name, since the copy lies elsewhere
            text = re.sub(r"\.\./(\w+)\.yaml", r"\1", text)
        target.write_text(text, encoding="utf-8")
        show(f"Copied to {source.name}. You can change it.")
        return
    width = max(map(len, [*configs, *studies, *tuned]))
    for title, files in (
        ("configs, for trace-bench train", configs),
        ("studies, for trace-bench study", studies),
        ("settings of methods for each model size, for --tuned", tuned),
    ):
        show(f"{title}:")
        for name, file in files.items():
            show(f"  {name:<{width}}  {packaged.about(file)}")
