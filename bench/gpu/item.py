"""The process of one measurement: `python -m bench.gpu.item MODULE NAME OUT [--tiny]`, started by `bench.gpu`.

It imports its packages, waits for a line on standard input so that measurements do not share the GPU, and writes OUT.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path


def main() -> None:
    """Makes the measurement."""
    module, item, out = sys.argv[1:4]
    part = importlib.import_module(module)
    os.environ.setdefault("TRACE_CACHE", str(Path(out).parent / "cache"))
    for name in part.IMPORTS:
        importlib.import_module(name)
    if not sys.stdin.readline():
        sys.exit("the check was ended")
    from trace_tasks.data.files import write_json

    write_json(Path(out), part.measure(item, "--tiny" in sys.argv, Path(out).parent))


if __name__ == "__main__":
    main()
