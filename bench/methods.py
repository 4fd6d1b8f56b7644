"""What each method costs over sequential training: time, memory, and what it keeps from stage to stage.

All methods train the same rows for the same steps, a stage after the other, in turn, ROUNDS times. The overhead is the
time of the last stage (where all earlier tasks count) against sequential training's, with what the method does before
and after the steps; of each method the least of the ROUNDS, since whatever else a machine does only adds to it. `kept`
is what it leaves on the disk for the next stage besides the checkpoint. OSF, which trains all parameters, is not there.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from bench.common import WORK, command, save
from trace_bench.tables import markdown

ROUNDS = 2
TASKS = ("trace_fomc", "trace_numglue_cm")
ROWS, EPOCHS = 48, 3
METHODS = ("sequential", "ewc", "olora", "ogd", "agem", "gem", "lwf", "replay", "pp")


def main() -> None:
    """Trains every method, and saves the ratios of the last stage."""
    seconds: dict[str, list[float]] = {m: [] for m in METHODS}
    stages: dict[str, list[dict]] = {}
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
            trained = [json.loads(p.read_text()) for p in sorted(path.glob("stages/*/train.json"))]
            stages[method] = trained
            seconds[method].append(trained[-1]["seconds"])
        print(f"round {i + 1}: " + ", ".join(f"{m} {s[-1]:.1f} s" for m, s in seconds.items()), flush=True)
    result = {}
    for method in METHODS:
        last = stages[method][-1]
        folder = sorted((WORK / "methods" / method / "stages").glob("[0-9]*"))[-1] / "method_state"
        plain = stages["sequential"][-1]
        result[method] = {
            "seconds_of_last_stage": [round(s, 2) for s in seconds[method]],
            "over_sequential": round(min(seconds[method]) / min(seconds["sequential"]), 2),
            "rows_over_sequential": round(last["rows"] / plain["rows"], 2),
            "kept_mib": round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20, 2),
            "peak_memory_gib": round(last["peak_memory_bytes"] / 2**30, 2),
        }
    save("methods", {"tasks": TASKS, "rows": ROWS, "epochs": EPOCHS, "methods": result})
    print(
        markdown(
            ["method", "last stage over sequential", "rows over sequential", "kept, MiB", "peak, GiB"],
            [
                [m, f"{r['over_sequential']}x", f"{r['rows_over_sequential']}x", r["kept_mib"], r["peak_memory_gib"]]
                for m, r in result.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
