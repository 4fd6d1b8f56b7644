"""The report of a run: report.md and scores.csv, made from its JSON files alone, in seconds and without a GPU."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_bench import metrics
from trace_bench.run import Run, Stage, read_json, write_text

DASH = "–"
DEMO = (
    "> **Demo data.** The tasks have TRACE's form, but the rows are made by this program. The scores show learning "
    "and forgetting;\n> they cannot be compared with TRACE."
)
#: How the paper calls what a run does.
_PAPER_NAMES = {
    ("sequential", "full"): "SeqFT",
    ("sequential", "lora"): "LoraSeqFT",
    ("replay", "full"): "Replay",
}


def load_cells(run: Run) -> dict[tuple[int, str], dict[str, Any]]:
    """All cells that are there: (stage index, task) -> the content of its eval file."""
    cells = {}
    for stage in run.stages:
        if not stage.is_trained:
            continue  # what is there was made from weights that are no more
        trained = read_json(stage.train_file)["checkpoint"] if stage.train_file.exists() else None
        for task in run.tasks:
            if stage.eval_file(task).exists():
                cell = read_json(stage.eval_file(task))
                if trained is None or cell["checkpoint"] == trained:
                    cells[stage.index, task] = cell
    return cells


def score_matrix(run: Run, metric: str | None = None) -> metrics.Matrix:
    """The scores as an array of shape (stages, tasks), fractions of 1; NaN where not evaluated.

    Args:
        run: The run.
        metric: A metric's name; tasks without it are NaN. None = the headline of each task.
    """
    R = np.full((len(run.stages), len(run.tasks)), np.nan)
    for (index, task), cell in load_cells(run).items():
        score = cell["metrics"].get(metric or cell["headline"])
        if score is not None:
            R[index, run.tasks.index(task)] = score["value"]
    return R


def write_report(run: Run) -> str:
    """Writes report.md and scores.csv and returns one line that sums them up."""
    cells = load_cells(run)
    R = score_matrix(run)
    write_text(run.path / "scores.csv", _scores_csv(run, cells))
    write_text(run.path / "report.md", "\n\n".join(_sections(run, cells, R)) + "\n")
    line = f"{run.path}/report.md: {len(cells)} cells of {R.size}"
    if run.is_sequence() and R.shape[0] == R.shape[1] + 1:
        t = _last_stage(R)
        if t:
            line += f"; OP_{t} {_percent(metrics.overall_performance(R, t))}"
            line += f", BWT_{t} {_percent(metrics.backward_transfer(R, t), sign=True)}"
    return line


def _last_stage(R: metrics.Matrix) -> int:
    """The last stage of which all seen tasks are evaluated; 0 if there is none."""
    done = [t for t in range(1, R.shape[1] + 1) if not np.isnan(R[t, :t]).any()]
    return max(done, default=0)


# --------------------------------------------------------------------------------------------------------- sections


def _sections(run: Run, cells: dict[tuple[int, str], dict[str, Any]], R: metrics.Matrix) -> Iterable[str]:
    manifest = run.manifest
    kind = {"lora": "LoRA", "full": "all parameters"}.get(manifest.get("trains", ""), "checkpoints from elsewhere")
    yield f"# {run.path.name}"
    yield f"Method **{manifest['method']}** ({kind}), base model `{manifest['model']['name']}`."
    if manifest["data"]["demo"]:
        yield DEMO
    limits = {k: v for k in ("train_rows", "test_rows") if (v := manifest["config"].get(k))}
    if limits:
        text = ", ".join(f"{k.replace('_', ' ')}: first {v} of each task" for k, v in limits.items())
        yield f"> **Limited rows** ({text}). Not comparable with results on the full data."
    sequence = run.is_sequence() and len(run.stages) == len(run.tasks) + 1
    if sequence:
        yield from _sequence_sections(run, R)
    yield "## Scores\n\nRows: the model after a stage. Columns: tasks, in percent."
    yield _matrix_table(run, cells, R, with_op=sequence)
    tolerant = score_matrix(run, "accuracy_tolerant")
    if not np.isnan(tolerant).all():
        yield (
            "### Form-tolerant accuracy\n\nThe official accuracy asks for the very same string. This one accepts "
            "the right answer in another form, so what a row loses only above was lost in form, not in knowledge."
        )
        columns = [i for i in range(len(run.tasks)) if not np.isnan(tolerant[:, i]).all()]
        yield _table(
            ["stage", *(_short(run.tasks[i]) for i in columns)],
            [[s.name, *(_percent(tolerant[s.index, i]) for i in columns)] for s in run.stages],
        )
    yield from _paper_section(run)
    yield from _cost_section(run, cells)
    yield _provenance(run, cells)


def _sequence_sections(run: Run, R: metrics.Matrix) -> Iterable[str]:
    t = _last_stage(R)
    if t:
        rows = [
            [
                f"OP_{t}",
                _percent(metrics.overall_performance(R, t)),
                f"mean of the {t} tasks seen, at stage {t}",
            ],
            [
                f"BWT_{t}",
                _percent(metrics.backward_transfer(R, t), sign=True),
                "mean change of a task since its own stage (divided by t-1); negative = forgetting",
            ],
            [f"Forgetting_{t}", _percent(metrics.forgetting(R, t)), "mean drop from a task's best stage"],
        ]
        if t == len(run.tasks):
            rows.append(["FWT", _percent(metrics.forward_transfer(R), sign=True), "needs the full matrix"])
            rows.append(["mean OP_t", _percent(metrics.average_accuracy(R)), "over all stages"])
        yield _table(["", "percent", ""], rows)
    yield "## Learning and forgetting"
    last = t or len(run.tasks)
    rows = []
    for i, task in enumerate(run.tasks):
        own, final = R[i + 1, i], R[last, i] if i < last else math.nan
        rows.append(
            [
                _short(task),
                _percent(R[0, i]),
                _percent(own),
                _percent(final),
                _percent(own - R[0, i], sign=True),
                _percent(final - own, sign=True) if i + 1 < last else DASH,
            ]
        )
    yield _table(["task", "base", "own stage", f"stage {last}", "learned", "since then"], rows)


def _matrix_table(run: Run, cells: dict, R: metrics.Matrix, with_op: bool) -> str:
    headline = {task: cell["headline"] for (_, task), cell in cells.items()}
    header = ["stage", *(f"{_short(t)}<br>{headline.get(t, DASH)}" for t in run.tasks)]
    rows = [[s.name, *(_percent(v) for v in R[s.index])] for s in run.stages]
    if with_op:
        header += ["OP_t", "BWT_t", "Forgetting_t"]
        for t, row in enumerate(rows):
            row += (
                [
                    _percent(metrics.overall_performance(R, t)),
                    _percent(metrics.backward_transfer(R, t), sign=True),
                    _percent(metrics.forgetting(R, t)),
                ]
                if t
                else [DASH] * 3
            )
    return _table(header, rows)


def _paper_section(run: Run) -> Iterable[str]:
    name = _PAPER_NAMES.get((run.manifest["method"], run.manifest.get("trains", "")))
    if name is None:
        return
    paper = json.loads((Path(__file__).parent / "paper_results.json").read_text(encoding="utf-8"))
    rows = [
        [model, _number(results[name]["OP"]), _number(results[name]["BWT"], sign=True)]
        for model, results in paper["table1_percent"].items()
        if name in results
    ]
    yield (
        f"## The paper's numbers for this method ({name})\n\nTRACE, arXiv 2310.06762, table 1: order 1, 5000 rows a "
        "task, 7B and 13B chat models, sampling at temperature 0.1. For orientation: with another model, other data "
        "or fewer rows the numbers are no target."
    )
    yield _table(["model", "OP", "BWT"], rows)


def _cost_section(run: Run, cells: dict) -> Iterable[str]:
    rows = []
    for stage in run.stages:
        seconds = sum(cells[stage.index, t]["seconds"] for t in run.tasks if (stage.index, t) in cells)
        train = read_json(stage.train_file) if stage.train_file.exists() else None
        if train is None:
            rows.append([stage.name, *[DASH] * 6, f"{seconds:.0f}"])
            continue
        rows.append(
            [
                stage.name,
                str(train["rows"]),
                str(train["steps"]),
                f"{train['tokens']:,}",
                f"{train['seconds']:.0f}",
                f"{train['tokens_per_second']:.0f}",
                f"{train['peak_memory_bytes'] / 2**30:.1f} ({train['memory_of']})",
                f"{seconds:.0f}",
            ]
        )
    yield "## Cost"
    yield _table(["stage", "rows", "steps", "tokens", "train s", "tokens/s", "peak GiB", "evaluation s"], rows)


def _provenance(run: Run, cells: dict) -> str:
    m = run.manifest
    lines = [
        f"- base model: `{m['model']['name']}`, revision `{m['model'].get('revision')}`",
        f"- data: {'demo' if m['data']['demo'] else m['data'].get('path')}; fingerprints "
        + ", ".join(f"{_short(t)} `{f}`" for t, f in m["data"]["fingerprint"].items()),
        "- task versions: " + ", ".join(f"{_short(t)} {v}" for t, v in m["task_versions"].items()),
        f"- seed: {m.get('seed', DASH)}; program: {m.get('commit') or 'no checkout'}",
        "- packages at the start: " + ", ".join(f"{k} {v}" for k, v in m["packages"].items()),
    ]
    settings = {json.dumps(cell["settings"], sort_keys=True) for cell in cells.values()}
    lines += [f"- evaluation: `{s}`" for s in sorted(settings)]
    config = ", ".join(f"{k}={v}" for k, v in m["config"].items() if k != "tasks" and v is not None)
    lines.append(f"- configuration: `{config}`")
    return "## Provenance\n\n" + "\n".join(lines)


def _scores_csv(run: Run, cells: dict[tuple[int, str], dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["stage", "task", "metric", "value", "stderr", "n", "n_unscored"])
    stages: dict[int, Stage] = {s.index: s for s in run.stages}
    for (index, task), cell in sorted(cells.items(), key=lambda c: (c[0][0], run.tasks.index(c[0][1]))):
        for metric, score in cell["metrics"].items():
            stderr = "" if score["stderr"] is None else score["stderr"]
            writer.writerow(
                [
                    stages[index].name,
                    task,
                    metric,
                    score["value"],
                    stderr,
                    cell["n"],
                    cell.get("n_unscored", 0),
                ]
            )
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------- formatting


def _short(task: str) -> str:
    return task.removeprefix("trace_")


def _percent(value: float, sign: bool = False) -> str:
    return _number(100 * value, sign)


def _number(value: float | None, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return DASH
    value = round(value, 1) + 0.0  # no "-0.0"
    return f"{value:+.1f}" if sign else f"{value:.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)
