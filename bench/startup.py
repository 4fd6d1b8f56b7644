"""How long the commands take that compute nothing: `--help`, and the report of a run.

Medians of ROUNDS starts each; a report of a run of eight stages with its samples, as `bench.evaluation` leaves it (else
as `make sequential-train` does). `imports torch` says whether the command loads it at all.
"""

from __future__ import annotations

import re
import subprocess
import sys
from statistics import median

from bench.common import ROOT, WORK, command, save
from trace_bench.report import Table, markdown

ROUNDS = 5


def main() -> None:
    """Times the commands and saves the medians."""
    runs = [WORK / "evaluation" / "ours", ROOT / "runs" / "sequential-quickstart"]
    run = next((path for path in runs if (path / "manifest.json").exists()), None)
    commands = {"trace-bench --help": ["--help"], "trainers --help": None}
    if run:
        commands["trace-bench report"] = ["report", str(run)]
    result = {}
    for name, arguments in commands.items():
        argv = ["-m", "trainers.sequential", "--help"] if arguments is None else ["-m", "trace_bench", *arguments]
        seconds = [command([sys.executable, *argv], "startup/output") for _ in range(ROUNDS)]
        loaded = subprocess.run(
            [sys.executable, "-X", "importtime", *argv], cwd=ROOT, capture_output=True, text=True, check=True
        ).stderr
        result[name] = {"seconds": round(median(seconds), 2), "imports_torch": bool(re.search(r"\|\s+torch\n", loaded))}
    save("startup", result)
    print(
        markdown(
            Table(
                ["command", "seconds", "imports torch"],
                [[n, r["seconds"], "yes" if r["imports_torch"] else "no"] for n, r in result.items()],
            )
        )
    )


if __name__ == "__main__":
    main()
