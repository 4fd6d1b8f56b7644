"""Times the start of commands that compute nothing: their `--help`. `imports torch` says whether they load torch.

The results are medians of ROUNDS starts.
"""

from __future__ import annotations

import re
import subprocess
import sys
from statistics import median

from bench.common import ROOT, command, save
from trace_bench.report import Table, markdown

ROUNDS = 5
COMMANDS = {"trace-bench --help": "trace_bench", "trainers --help": "trainers.sequential"}


def main() -> None:
    """Times the commands and saves the medians."""
    result = {}
    for name, module in COMMANDS.items():
        argv = ["-m", module, "--help"]
        seconds = [command([sys.executable, *argv], "startup/output") for _ in range(ROUNDS)]
        loaded = subprocess.run(
            [sys.executable, "-X", "importtime", *argv], cwd=ROOT, capture_output=True, text=True, check=True
        ).stderr
        result[name] = {"seconds": round(median(seconds), 2), "imports_torch": bool(re.search(r"\|\s+torch\n", loaded))}
    save("startup", result)
    rows = [[name, found["seconds"], "yes" if found["imports_torch"] else "no"] for name, found in result.items()]
    print(markdown(Table(["command", "seconds", "imports torch"], rows)))


if __name__ == "__main__":
    main()
