"""What trainings would say of their options at once: `trace-bench study` asks it of all runs before the first one.

A program: method files and options by run come in as JSON, and the refused runs go out with the reason.
"""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from trace_tasks.errors import TraceError, brief
from trainers import base
from trainers.base.stages import parse


def refused(runs: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """The runs whose options no training takes, and why. Methods train nothing in this process from here on.

    Args:
        runs: Name of a run -> file of its method, and its command-line arguments.
    """
    configs: list[Any] = []
    base.main = lambda trainer, config, argv=None: configs.append(config)
    found = {}
    for name, (file, arguments) in runs.items():
        try:
            runpy.run_path(file, run_name="__main__")
            config = configs.pop()
            config.__post_init__ = lambda self: None  # which looks for devices
            parse(config, arguments, Path(file).stem)
        except TraceError as e:
            found[name] = str(e)
        except Exception as e:  # of a method of one's own
            found[name] = f"{file} cannot be loaded: {brief(e)}"
    return found


if __name__ == "__main__":
    with redirect_stdout(io.StringIO()):  # what is decided for them is said when they begin
        answer = refused(json.load(sys.stdin))
    print(json.dumps(answer))
