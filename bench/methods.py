"""Measures the cost of each method over sequential training: time, memory, and the files that it keeps between stages.

All methods train the same rows for the same steps on two tasks with rows of equal length. They take turns, ROUNDS
times. The last stage, in which all earlier tasks count, is timed in two ways: as a whole, and only its steps. The
latter leaves out the work before the first and after the last step (the passes of EWC over at most 256 rows and of OGD
over at most 200 rows, which are long compared with the few rows here). The results are medians of the rounds. `kept` is
the size of the files for the next stage, without the checkpoint. OSF is left out, because it trains all parameters.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import median

from bench.common import WORK, command, save
from trace_bench.report import Table, markdown

ROUNDS = 3
TASKS = ("trace_fomc", "trace_scienceqa")
ROWS, EPOCHS = 48, 3
METHODS = ("sequential", "ewc", "olora", "ogd", "agem", "gem", "lwf", "replay", "pp")


def main() -> None:
    """Trains with every method and saves the ratios of the last stage."""
    stages: dict[str, list[dict]] = {m: [] for m in METHODS}
    for i in range(ROUNDS):
        for method in METHODS:
            path = WORK / "methods" / method
            shutil.rmtree(path, ignore_errors=True)
            config = Path("trainers/configs") / f"quickstart_{method}.yaml"
            argv = [sys.executable, "-m", f"trainers.{method}", "--config"]
            argv += [str(config if config.exists() else "trainers/configs/quickstart.yaml"), "--data", "demo"]
            argv += ["--output_dir", str(path), "--train_rows", str(ROWS), "--num_train_epochs", str(EPOCHS)]
            argv += ["--tasks", *TASKS]
            command(argv, f"methods/{method}-{i}")
            last = sorted(path.glob("stages/*/train.json"))[-1]
            stages[method].append(json.loads(last.read_text()))
            print(f"round {i + 1}, {method}: {stages[method][-1]['seconds']:.1f} s", flush=True)
    whole = {m: median(s["seconds"] for s in of) for m, of in stages.items()}
    steps = {m: median(s["seconds"] - s["seconds_around_steps"] for s in of) for m, of in stages.items()}
    result = {}
    for method in METHODS:
        last = stages[method][-1]
        folder = sorted((WORK / "methods" / method / "stages").glob("[0-9]*"))[-1] / "method_state"
        result[method] = {
            "seconds_of_last_stage": [s["seconds"] for s in stages[method]],
            "seconds_around_steps": [s["seconds_around_steps"] for s in stages[method]],
            "steps_over_sequential": round(steps[method] / steps["sequential"], 2),
            "over_sequential": round(whole[method] / whole["sequential"], 2),
            "tokens_over_sequential": round(last["tokens"] / stages["sequential"][-1]["tokens"], 2),
            "kept_mib": round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20, 1),
            "peak_memory_gib": round(last["peak_memory_bytes"] / 2**30, 1),
        }
    save("methods", {"tasks": TASKS, "rows": ROWS, "epochs": EPOCHS, "methods": result})
    columns = ["steps_over_sequential", "over_sequential", "tokens_over_sequential", "kept_mib", "peak_memory_gib"]
    titles = ["steps over sequential", "stage over sequential", "tokens over sequential", "kept, MiB", "peak, GiB"]
    print(markdown(Table(["method", *titles], [[m, *(r[c] for c in columns)] for m, r in result.items()])))


if __name__ == "__main__":
    main()
