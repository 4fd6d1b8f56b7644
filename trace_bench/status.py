"""How far a run is, from its files alone: `trace-bench status RUN`, while it goes on or afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator

from trace_bench.data import JUDGED, SUITES
from trace_bench.evaluate import seen_tasks
from trace_bench.run import Run, Stage, read_json

#: A stage whose progress was not written for so many seconds is said to be interrupted: steps take less.
SILENT = 600


def status(run: Run) -> str:
    """The state of a run, a line for each stage.

    What is to be evaluated is the matrix as the run's configuration asks for it. General suites and sets to be judged
    are counted where they are there, since they may be asked for on the command line.
    """
    stages = run.stages
    lines = [f"{run.path}: {run.manifest['method']}, {run.manifest['model']['name']}, {len(stages) - 1} stages"]
    width = max(len(stage.name) for stage in stages)
    lines += [f"  {stage.name:<{width}}  {'; '.join(_parts(run, stage))}" for stage in stages]
    trained = [read_json(s.train_file) for s in stages if s.train_file.exists()]
    if trained and len(trained) < len(stages) - 1:
        seconds = sum(t["seconds"] for t in trained) / len(trained)
        left = len(stages) - 1 - len(trained)
        lines.append(
            f"left to train: {left} of {len(stages) - 1} stages, {_duration(left * seconds)} at the pace so far"
        )
    return "\n".join(lines)


def _parts(run: Run, stage: Stage) -> Iterator[str]:
    if stage.index == 0:
        yield "base model"
    elif stage.external is not None:
        yield "trained elsewhere"
    elif stage.is_trained:
        t = read_json(stage.train_file)
        yield f"trained: {t['steps']} steps, {t['tokens_per_second']:.0f} tokens/s, {_duration(t['seconds'])}"
    else:
        yield _training(stage)
        return
    wanted = seen_tasks(run, stage, run.manifest["config"].get("cells", "seen"))
    done = sum(stage.eval_file(task).exists() for task in wanted)
    if wanted:
        yield f"evaluated {done} of {len(wanted)} tasks"
    suites = sum(stage.eval_file(name).exists() for name in SUITES)
    answered = sum(stage.eval_file(name).exists() for name in JUDGED)
    judged = len(list((stage.path / "judge").glob("*.json")))
    if suites:
        yield f"{suites} general suites"
    if answered:
        yield f"{judged} of {answered} sets judged"


def _training(stage: Stage) -> str:
    try:
        p = read_json(stage.progress_file)
    except FileNotFoundError:  # none yet, or the stage was done a moment ago
        return "not trained"
    silent = time.time() - p["time"]
    text = f"step {p['step']} of {p['steps']}, loss {p['loss']:.3f}, {p['tokens'] / p['seconds']:.0f} tokens/s"
    if silent > SILENT:
        return f"training was interrupted {_duration(silent)} ago at {text}"
    left = p["seconds"] / p["step"] * (p["steps"] - p["step"])
    return f"training: {text}, {_duration(left)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
