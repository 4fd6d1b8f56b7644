"""How far a run is, from its files alone: `trace-bench status RUN`, while it goes on or afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from trace_bench.run import Run, Stage, read_json
from trace_bench.waiting import in_use
from trace_tasks.data import JUDGED, SUITES

#: Where locks do not tell, a stage counts as interrupted after so many seconds without progress; steps take less.
SILENT = 600


def status(run: Run) -> str:
    """The state of a run, a line for each stage.

    Tasks count as the run's configuration asks for them. Distances, general suites and sets to be judged, which may
    be asked for on the command line, count if they exist.
    """
    stages = run.stages
    lines = [f"{run.path}: {run.manifest['method']}, {run.manifest['model']['name']}, {len(stages) - 1} stages"]
    width = max(len(stage.name) for stage in stages)
    lines += [f"  {stage.name:<{width}}  {'; '.join(_parts(run, stage))}" for stage in stages]
    trained = [read_json(s.train_file)["seconds"] for s in stages if s.train_file.exists()]
    running = next((p for s in stages[1:] if not s.is_trained and (p := progress_of(s))), None)
    untrained = len(stages) - 1 - len(trained)
    if untrained and (trained or running):
        spent, fraction = (running["seconds"], running["step"] / running["steps"]) if running else (0.0, 0.0)
        left = seconds_left(trained, len(stages) - 1, spent, fraction)
        lines.append(f"left to train: {untrained} of {len(stages) - 1} stages, {duration(left)} at the speed so far")
    return "\n".join(lines)


def _parts(run: Run, stage: Stage) -> Iterator[str]:
    if stage.index == 0:
        yield "base model"
    elif stage.external is not None:
        yield "trained elsewhere"
    elif stage.is_trained:
        t = read_json(stage.train_file)
        yield f"trained: {t['steps']} steps, {t['tokens_per_second']:.0f} tokens/s, {duration(t['seconds'])}"
    else:
        yield training(stage, in_use(run.path, "train"))
        return
    wanted = run.seen_tasks(stage, run.manifest["config"].get("cells", "seen"))
    done = sum(stage.eval_file(task).exists() for task in wanted)
    if wanted:
        yield f"evaluated {done} of {len(wanted)} tasks" + " (running)" * bool(in_use(stage.path, "evaluate"))
    suites = sum(stage.eval_file(name).exists() for name in SUITES)
    answered = sum(stage.eval_file(name).exists() for name in JUDGED)
    judged = len(list((stage.path / "judge").glob("*.json")))
    if distances := len(list((stage.path / "distance").glob("*.json"))):
        yield f"{distances} distances from the base model"
    if suites:
        yield f"{suites} general suites"
    if answered:
        yield f"judged {judged} of {answered} sets"


def progress_of(stage: Stage) -> Any:
    """How far the training of a stage is; None if it has not begun, or is done."""
    try:
        return read_json(stage.progress_file)
    except FileNotFoundError:  # none yet, or the stage was done a moment ago
        return None


def training(stage: Stage, alive: bool | None) -> str:
    """What a stage that is not trained waits for; `alive` as from `in_use`."""
    p = progress_of(stage)
    if p is None:
        return "not trained"
    silent = time.time() - p["time"]
    text = f"step {p['step']} of {p['steps']}, loss {p['loss']:.3f}, {p['tokens'] / p['seconds']:.0f} tokens/s"
    if alive is False or (alive is None and silent > SILENT):
        return f"training was interrupted {duration(silent)} ago at {text}"
    left = seconds_left([], 1, p["seconds"], p["step"] / p["steps"])
    return f"training: {text}, {duration(left)} left"


def seconds_left(trained: Sequence[float], stages: int, spent: float, fraction: float) -> float:
    """How long the training of a run still takes, if the other stages take as long as those so far.

    `trained` has the seconds of the stages that are trained, of so many `stages` in all. The stage in training took
    `spent` seconds for a fraction of it; both are 0 if there is none.
    """
    whole = [spent / fraction] if fraction else []
    pace = [*trained, *whole]
    return sum(whole) - spent + (stages - len(pace)) * sum(pace) / len(pace)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
