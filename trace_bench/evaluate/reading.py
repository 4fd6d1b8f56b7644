"""Reads prompts with transformers, in a process of its own: `python -m trace_bench.evaluate.reading FOLDER`.

`reference.measure` starts it. It reads the request in the folder, and writes what it found beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trace_bench.engine import open_engine
from trace_bench.run import read_json
from trace_tasks.data.files import write_json
from trace_tasks.errors import brief


def read(folder: Path) -> None:
    """Writes `found.json`: the nats of each prompt for each stage of `request.json`, and an error if one occurred."""
    request, found = read_json(folder / "request.json"), dict[str, Any](nats=[])
    try:
        base = request["base"]
        lm = open_engine("hf", base["model"], revision=base["revision"], engine_args=request["engine_args"])
        rows = [(tuple(ids[:start]), tuple(ids[start:])) for ids, start in request["rows"]]
        for checkpoint, below in request["weights"]:
            if checkpoint is not None:
                lm.load(Path(checkpoint), [Path(path) for path in below])
            lm.check_numbers("the model")
            found["nats"].append(lm.likelihoods_of(rows))
    except Exception as e:  # whatever a library raises for a model that it cannot load here
        found["error"] = brief(e)
    write_json(folder / "found.json", found)


if __name__ == "__main__":
    from trace_bench.text import prepare_logging

    prepare_logging()
    read(Path(sys.argv[1]))
