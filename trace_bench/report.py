"""The report of a run and the comparison of several, made from their JSON files alone, in seconds and without a GPU.

`write_report` writes report.md and scores.csv of one run; runs beside it that bound it are shown in it. `compare` makes
one table of several runs.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trace_bench import metrics
from trace_bench.audit import without_rows
from trace_bench.data import GROUPS, JUDGED, ORDERS, SUITES
from trace_bench.run import Run, RunError, Stage, differences, read_json, read_jsonl, write_text

log = logging.getLogger(__name__)

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
#: Methods whose runs bound what continual learning can reach, and what a report calls them.
_BOUNDS = {
    "icl": "ICL, {num_fewshot} demonstrations",
    "single": "single (a model per task)",
    "joint": "joint (multi-task)",
}
#: What a manifest's "trains" means.
_TRAINS = {"lora": "LoRA", "full": "all parameters", "prompts": "soft prompts"}
#: Settings under which a score is measured: scores of other ones are other numbers.
_MEASURED = ("test_rows", "max_prompt_length", "max_new_tokens", "chat_template")
#: Settings of the training. A bound with others is still a bound, and the report says so.
_TRAINED = (
    "train_rows",
    "epochs",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_answer_length",
    "seed",
    "bf16",
    "dtype",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
)


def load_cells(run: Run) -> dict[tuple[int, str], dict[str, Any]]:
    """All cells that are there: (stage index, task) -> the content of its eval file."""
    return _load(run, run.tasks)


def load_besides(run: Run) -> dict[tuple[int, str], dict[str, Any]]:
    """What is measured besides the matrix: (stage index, suite or judged set) -> the content of its eval file."""
    return _load(run, [*SUITES, *JUDGED])


def _load(run: Run, names: Iterable[str]) -> dict[tuple[int, str], dict[str, Any]]:
    cells = {}
    for stage in run.stages:
        if not stage.is_trained:
            continue  # what is there was made from weights that are no more
        trained = read_json(stage.train_file)["checkpoint"] if stage.train_file.exists() else None
        for task in names:
            if stage.eval_file(task).exists():
                cell = read_json(stage.eval_file(task))
                if trained is None or cell["checkpoint"] == trained:
                    if task in run.left_out:
                        cell = without_rows(cell, read_jsonl(stage.samples_file(task)), run.left_out[task])
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
    cells, besides = load_cells(run), load_besides(run)
    R = score_matrix(run)
    write_text(run.path / "scores.csv", _scores_csv(run, cells | besides))
    write_text(run.path / "report.md", "\n\n".join(_sections(run, cells, besides, R)) + "\n")
    line = f"{run.path}/report.md: {len(cells)} cells of {R.size}"
    if _is_sequential(run):
        t = _last_stage(R)
        if t:
            line += f"; OP_{t} {_percent(metrics.overall_performance(R, t))}"
            line += f", BWT_{t} {_percent(metrics.backward_transfer(R, t), sign=True)}"
    elif _has_mean(run) and not np.isnan(_final(run, R)).any():
        line += f"; mean of the tasks {_percent(_final(run, R).mean())}"
    delta = general_delta(besides, run.stages[-1])
    if not math.isnan(delta):
        line += f"; general ability {_percent(delta, sign=True)}"
    return line + ("; without leaked rows" if run.left_out else "")


def general_delta(besides: dict[tuple[int, str], dict[str, Any]], stage: Stage) -> float:
    """The general-ability delta of a stage over the paper's suites that the base model was measured on.

    NaN without any, or where the stage lacks one: a mean over other suites is another number.
    """
    base = _suite_scores(besides, 0)
    after = _suite_scores(besides, stage.index)
    if not base or stage.index == 0 or base.keys() != after.keys():
        return math.nan
    return metrics.general_ability_delta(base, after)


def _suite_scores(besides: dict[tuple[int, str], dict[str, Any]], index: int) -> dict[str, float]:
    return {s: _headline(besides[index, s]) for s in GROUPS["general"] if (index, s) in besides}


def _headline(cell: dict[str, Any]) -> float:
    return cell["metrics"][cell["headline"]]["value"]


def _is_single(run: Run) -> bool:
    """Whether each task has a model of its own, so that nothing is carried from stage to stage."""
    return run.manifest["method"] == "single"


def _is_sequential(run: Run) -> bool:
    """Whether row t is the model after tasks 1 to t, so that OP and BWT are defined."""
    return run.is_sequence() and len(run.stages) == len(run.tasks) + 1 and not _is_single(run)


def _has_mean(run: Run) -> bool:
    """Whether the mean over all tasks stands for the run: of anything but checkpoints of unknown training."""
    return _is_sequential(run) or "checkpoints" not in run.manifest


def _final(run: Run, R: metrics.Matrix) -> metrics.Matrix:
    """The score of each task in the end: of its own model where each task has one, else of the last stage."""
    return R.diagonal(-1) if _is_single(run) else R[-1]


def _last_stage(R: metrics.Matrix) -> int:
    """The last stage of which all seen tasks are evaluated; 0 if there is none."""
    done = [t for t in range(1, R.shape[1] + 1) if not np.isnan(R[t, :t]).any()]
    return max(done, default=0)


# --------------------------------------------------------------------------------------------------------- sections


def _sections(
    run: Run,
    cells: dict[tuple[int, str], dict[str, Any]],
    besides: dict[tuple[int, str], dict[str, Any]],
    R: metrics.Matrix,
) -> Iterable[str]:
    from judges.report import sections as judged  # here, since it formats with this module

    manifest = run.manifest
    kind = _TRAINS.get(manifest.get("trains", ""), "checkpoints from elsewhere")
    if len(run.stages) == 1:
        kind = "nothing is trained"
    yield f"# {run.path.name}"
    yield f"Method **{manifest['method']}** ({kind}), base model `{manifest['model']['name']}`."
    if manifest["data"]["demo"]:
        yield DEMO
    limits = {k: v for k in ("train_rows", "test_rows") if (v := manifest["config"].get(k))}
    if limits:
        text = ", ".join(f"{k.replace('_', ' ')}: first {v} of each task" for k, v in limits.items())
        yield f"> **Limited rows** ({text}). Not comparable with results on the full data."
    if run.left_out:
        yield f"> **Without leaked rows.** {_left_out(run, cells)}"
    if _is_sequential(run):
        yield from _sequence_sections(run, R)
        yield from _bounds_section(run, R)
    elif _has_mean(run):
        yield from _mean_section(run, R)
    yield "## Scores\n\nRows: the model after a stage. Columns: tasks, in percent."
    yield _matrix_table(run, cells, R, with_op=_is_sequential(run))
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
    yield from _extracted_section(run, cells)
    yield from _general_section(run, besides)
    yield from _judged_section(run, besides)
    yield from judged(run)
    yield from _paper_section(run)
    yield from _cost_section(run, cells | besides)
    yield _provenance(run, cells, besides)


def _left_out(run: Run, cells: dict[tuple[int, str], dict[str, Any]]) -> str:
    """Says which test rows do not count in a run that is seen without leaked rows."""
    counts = {task: (cell["n_left_out"], cell["n"]) for (_, task), cell in cells.items() if task in run.left_out}
    text = ", ".join(f"{_short(task)} {n} of {n + rest}" for task, (n, rest) in counts.items() if n)
    return (
        "Test rows whose prompt is in the training rows of the task, exactly or nearly, are left out of all scores: "
        f"{text or 'none was found'}. Not comparable with scores of all rows."
    )


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


def _mean_section(run: Run, R: metrics.Matrix) -> Iterable[str]:
    """For runs without a sequence: the mean over the tasks, and what training changed."""
    final, shots = _final(run, R), run.manifest["config"].get("num_fewshot")
    if _is_single(run):
        what = "each task with its own model, trained from the base model: an upper bound; BWT is not defined"
    elif len(run.stages) > 1:
        what = f"one model, after stage {run.stages[-1].name}; BWT is not defined"
    else:
        what = f"the base model with {shots} demonstrations" if shots else "the base model, zero-shot"
    yield _table(["", "percent", ""], [["mean of the tasks", _percent(final.mean()), what]])
    if len(run.stages) > 1:
        yield "## Learning"
        rows = [
            [_short(task), _percent(base), _percent(end), _percent(end - base, sign=True)]
            for task, base, end in zip(run.tasks, R[0], final, strict=True)
        ]
        yield _table(["task", "base", "trained", "learned"], rows)


def _bounds_section(run: Run, R: metrics.Matrix) -> Iterable[str]:
    """What the base model, demonstrations, a model per task and multi-task training reach on the same tasks."""
    found = _comparable_siblings(run)
    bounds: dict[str, list[str]] = {}
    notes = []
    for method, label in _BOUNDS.items():
        # The one with the fewest other settings; of several such, the most complete one.
        choice = min(
            (s for s in found if s[0].manifest["method"] == method),
            key=lambda s: (len(_other_training(run, s[0])), np.isnan(s[1]).sum()),
            default=None,
        )
        if choice is None:
            notes.append(
                f"- {method} is missing: `make {method}-train CONFIG=...`, with the configuration and tasks of this "
                f"run and the new run's folder in `{run.path.parent}`."
            )
            continue
        sibling, scores = choice
        bounds[method] = _scores_row(label.format_map(sibling.manifest["config"]), scores)
        other = _other_training(run, sibling)
        training = f"; its training is another (there, here): {'; '.join(other)}" if other else ""
        notes.append(f"- {method}: the run `{sibling.path.name}`{training}")
    rows = [
        _scores_row("base, zero-shot", R[0]),
        bounds.get("icl"),
        _scores_row(f"this run (stage {len(run.tasks)})", R[-1]),
        bounds.get("single"),
        bounds.get("joint"),
    ]
    yield (
        "## Bounds\n\nRuns beside this one with the same base model, data and evaluation, in percent. What learns the "
        "tasks one by one is expected between the base model and the last two."
    )
    yield _table(["model", *(_short(t) for t in run.tasks), "mean"], [row for row in rows if row])
    yield "\n".join(notes)


def _scores_row(label: str, scores: metrics.Matrix) -> list[str]:
    return [label, *map(_percent, scores), _percent(scores.mean())]


def _comparable_siblings(run: Run) -> list[tuple[Run, metrics.Matrix]]:
    """The runs beside a run that bound it, each with its scores of the run's tasks, in the order of the run."""
    found = []
    for file in sorted(run.path.resolve().parent.glob("*/manifest.json")):
        if file.parent.resolve() == run.path.resolve():
            continue
        try:
            sibling = replace(Run.open(file.parent), left_out=run.left_out)  # the same data, so the same rows
            if sibling.manifest["method"] not in _BOUNDS:
                continue
            there, here = _conditions(sibling), _conditions(run)
            if sibling.manifest["method"] == "icl":  # demonstrations need room
                there["max_prompt_length"] = here["max_prompt_length"]
            if there != here:
                continue
            if sibling.manifest["method"] == "icl" and not sibling.manifest["config"].get("num_fewshot"):
                continue  # the base model alone
            scores = _final(sibling, score_matrix(sibling))
        except (RunError, OSError, AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            log.warning("%s is left out of the bounds of %s: %s: %s", file.parent, run.path, type(e).__name__, e)
            continue
        if not np.isnan(scores).all():
            found.append((sibling, scores[[sibling.tasks.index(t) for t in run.tasks]]))
    return found


def _conditions(run: Run) -> dict[str, Any]:
    """What the scores of two runs have to share to be compared."""
    m = run.manifest
    return {
        "base model": m["model"]["name"],
        "revision": m["model"].get("revision"),
        "tasks": sorted(m["tasks"]),
        "data": m["data"]["fingerprint"],
        "task versions": m["task_versions"],
        **{key: m["config"].get(key) or None for key in _MEASURED},  # false and not given are one
    }


def _other_training(run: Run, sibling: Run) -> list[str]:
    """The settings of the training in which a sibling differs, each with its value there and here."""
    if len(sibling.stages) == 1:
        return []  # nothing was trained

    def training(run: Run) -> dict[str, Any]:
        config = {key: run.manifest["config"].get(key) for key in _TRAINED}
        if config["epochs"]:  # by task, since the order of the tasks may differ; num_train_epochs is not used
            config["epochs"] = dict(sorted(zip(run.tasks, config["epochs"], strict=True)))
            config["num_train_epochs"] = None
        return config

    there, here = training(sibling), training(run)
    return [f"{k} {_value(there[k])}, {_value(here[k])}" for k in _TRAINED if there[k] != here[k]]


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


def _extracted_section(run: Run, cells: dict[tuple[int, str], dict[str, Any]]) -> Iterable[str]:
    """For tasks that ask for the reasoning first: how often there was an answer in the text at all."""
    columns = [t for t in run.tasks if any("extracted" in c["metrics"] for (_, task), c in cells.items() if task == t)]
    if not columns:
        return

    def share(cell: dict[str, Any] | None) -> str:
        value = cell["metrics"].get("extracted", {}).get("value") if cell else None
        if cell is None or value is None:
            return DASH
        return f"{_percent(value)} ({round((1 - value) * cell['n'])})"

    yield (
        "### Answers that could be extracted\n\nPercent of the texts in which there is an answer, and in brackets how "
        "many have none. A text without one scores 0."
    )
    yield _table(
        ["stage", *(_short(t) for t in columns)],
        [[s.name, *(share(cells.get((s.index, t))) for t in columns)] for s in run.stages],
    )


def _general_section(run: Run, besides: dict[tuple[int, str], dict[str, Any]]) -> Iterable[str]:
    """The general-ability suites, stage by stage, and their delta."""
    cells = {key: cell for key, cell in besides.items() if key[1] in SUITES}
    if not cells:
        return
    suites = [s for s in GROUPS["general"] if any(s == name for _, name in cells)]
    others = [s for s in SUITES if s not in suites and any(s == name for _, name in cells)]
    yield (
        "## General ability\n\nlm-eval's own tasks in the paper's settings, in percent. Delta: the mean over the "
        "suites of the change since stage 0 (TRACE, section 3.3)."
        + (f" Beside it, and not in mean and delta: {', '.join(map(_suite, others))}." if others else "")
    )
    limits = {cell["settings"]["general_rows"] for cell in cells.values()} - {None}
    if limits:
        text = " or ".join(map(str, sorted(limits)))
        yield (
            f"> **Limited rows** (about {text} of each suite, the first ones of each subtask). Not comparable with "
            "results on the full suites."
        )
    local = [s for s in SUITES if any(n == s and c["settings"]["data"] != "hub" for (_, n), c in cells.items())]
    if local:
        yield (
            f"> **Local copy** of the data of {', '.join(map(_suite, local))}: comparable with the hub's only if it is "
            "complete. The numbers of rows are in the head of the table."
        )

    def head(suite: str) -> str:
        of_suite = [cell for (_, name), cell in cells.items() if name == suite]
        sizes = " or ".join(map(str, sorted({cell["n"] for cell in of_suite})))
        return f"{_suite(suite)}<br>{of_suite[0]['headline']}<br>{sizes} rows"

    rows = []
    for stage in run.stages:
        if not any(index == stage.index for index, _ in cells):
            continue
        scores = {s: _headline(cells[stage.index, s]) if (stage.index, s) in cells else math.nan for s in SUITES}
        mean = float(np.mean([scores[s] for s in suites])) if suites else math.nan
        rows.append(
            [
                stage.name,
                *(_percent(scores[s]) for s in suites),
                _percent(mean),
                _percent(general_delta(besides, stage), sign=True),
                *(_percent(scores[s]) for s in others),
            ]
        )
    yield _table(["stage", *map(head, suites), "mean", "delta", *map(head, others)], rows)
    cut = [
        f"{_suite(name)} at {run.stages[index].name} {cell['n_cut']} of {cell['n']}"
        for (index, name), cell in cells.items()
        if cell["n_cut"]
    ]
    if cut:
        yield (
            "> **Prompts cut on the left**, as they were longer than the engine's context, so that shots are missing: "
            f"{'; '.join(cut)}. A larger context (`--engine-args`) gives other scores."
        )


def _judged_section(run: Run, besides: dict[tuple[int, str], dict[str, Any]]) -> Iterable[str]:
    """What there is for the judges: how long the answers are, and how many are empty."""
    cells = {key: cell for key, cell in besides.items() if key[1] in JUDGED}
    if not cells:
        return
    yield (
        "## Answers for the judges\n\nMean length of an answer in characters, and the percentage of empty ones. They "
        "say whether there is something to judge, not how good it is."
    )
    limits = {cell["settings"]["test_rows"] for cell in cells.values()} - {None}
    if limits:
        yield f"> **Limited rows** (first {' or '.join(map(str, sorted(limits)))} of each set)."
    names = [n for n in JUDGED if any(n == name for _, name in cells)]

    def text(cell: dict[str, Any] | None) -> str:
        if cell is None:
            return DASH
        return f"{cell['metrics']['characters']['value']:.0f}, {_percent(cell['metrics']['empty']['value'])} empty"

    yield _table(
        ["stage", *(f"{n}<br>{next(c['n'] for (_, m), c in cells.items() if m == n)} prompts" for n in names)],
        [
            [stage.name, *(text(cells.get((stage.index, n))) for n in names)]
            for stage in run.stages
            if any(index == stage.index for index, _ in cells)
        ],
    )


def _suite(name: str) -> str:
    return name.removeprefix("general_")


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
        seconds = sum(cell["seconds"] for (index, _), cell in cells.items() if index == stage.index)
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


def _provenance(run: Run, cells: dict, besides: dict) -> str:
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
    for name in [*SUITES, *JUDGED]:
        of_cells = [cell for (_, n), cell in besides.items() if n == name]
        settings = {json.dumps({"version": c["version"], **c["settings"]}, sort_keys=True) for c in of_cells}
        lines += [f"- {name}: `{s}`" for s in sorted(settings)]
    config = ", ".join(f"{k}={v}" for k, v in m["config"].items() if k != "tasks" and v is not None)
    lines.append(f"- configuration: `{config}`")
    return "## Provenance\n\n" + "\n".join(lines)


def _scores_csv(run: Run, cells: dict[tuple[int, str], dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["stage", "task", "metric", "value", "stderr", "n", "n_unscored"])
    stages: dict[int, Stage] = {s.index: s for s in run.stages}
    order = [*run.tasks, *SUITES, *JUDGED]
    for (index, task), cell in sorted(cells.items(), key=lambda c: (c[0][0], order.index(c[0][1]))):
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


# ------------------------------------------------------------------------------------------------------- comparison

#: The numbers of a run in a comparison, and how they are written.
_NUMBERS: dict[str, Callable[[float], str]] = {
    "OP": lambda v: _number(v),
    "BWT": lambda v: _number(v, sign=True),
    "Forgetting": lambda v: _number(v),
    "base": lambda v: _number(v),
    "training min": lambda v: _number(v),
    "trained tokens": lambda v: DASH if math.isnan(v) else f"{v:,.0f}",
}


def compare(runs: Sequence[Run]) -> tuple[str, str]:
    """Compares runs: one row each, their final scores by task, and what keeps them from being comparable.

    Args:
        runs: The runs.

    Returns:
        The comparison as Markdown, and its tables as one CSV: percent, not rounded, nothing where nothing is known.
    """
    names = [run.path.name for run in runs]
    named = {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, runs, strict=True)}
    texts = {name: _texts(run) for name, run in named.items()}
    numbers = {name: _numbers(run) for name, run in named.items()}
    finals = {name: _finals(run) for name, run in named.items()}
    columns = list(dict.fromkeys(task for final in finals.values() for task in final))

    first = [[n, *texts[n].values(), *(write(numbers[n][k]) for k, write in _NUMBERS.items())] for n in named]
    second = [[n, *(_number(finals[n].get(task)) for task in columns)] for n in named]
    csv_rows = [[n, *texts[n].values(), *numbers[n].values(), *(finals[n].get(t) for t in columns)] for n in named]
    header = ["run", "method", "trains", "tasks", "train rows"]
    notes = [*_comparability(named), *_definitions(named)]
    notes += [
        f"Without leaked rows in `{n}`: {_left_out(run, load_cells(run))}" for n, run in named.items() if run.left_out
    ]
    for group in _seed_groups(named):
        title = f"mean ± standard deviation over {len(group)} seeds"
        values = np.array([[*numbers[n].values(), *(finals[n].get(t, math.nan) for t in columns)] for n in group])
        means, deviations = values.mean(axis=0), values.std(axis=0, ddof=1)
        both = dict(zip([*_NUMBERS, *columns], zip(means, deviations, strict=True), strict=True))
        labels = [*texts[group[0]].values()]
        first.append([title, *labels, *(_mean_and_deviation(*both[k], write) for k, write in _NUMBERS.items())])
        second.append([title, *(_mean_and_deviation(*both[task], _number) for task in columns)])
        csv_rows.append([f"mean over {len(group)} seeds", *labels, *means])
        csv_rows.append([f"standard deviation over {len(group)} seeds", *labels, *deviations])
        notes.append(f"The seeds are those of {_ticks(group)}, which differ in nothing else.")

    markdown = [
        _table([*header, *_NUMBERS], first),
        "Final score of each task, percent of its headline metric:",
        _table(["run", *columns], second),
        "\n".join(f"- {note}" for note in notes),
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*header, *_NUMBERS, *columns])
    writer.writerows([["" if c is None or c == DASH or c != c else c for c in row] for row in csv_rows])
    return "\n\n".join(markdown) + "\n", out.getvalue()


def write_comparison(runs: Sequence[Run], output: str | Path | None = None) -> str:
    """Compares runs and, if asked, writes the comparison.

    Args:
        runs: The runs.
        output: A Markdown file; the tables are written beside it as .csv.

    Returns:
        The comparison as Markdown.

    Raises:
        RunError: if `output` is no name of a Markdown file.
    """
    if output is not None and Path(output).suffix != ".md":
        raise RunError(f"--output {output}: name a file that ends in .md; the .csv is written beside it.")
    markdown, table = compare(runs)
    if output is not None:
        write_text(Path(output), markdown)
        write_text(Path(output).with_suffix(".csv"), table)
    return markdown


def _texts(run: Run) -> dict[str, str]:
    trains = run.manifest.get("trains", DASH) if len(run.stages) > 1 else DASH
    rows = run.manifest["config"].get("train_rows")
    known = len(run.stages) > 1 and "checkpoints" not in run.manifest
    return {
        "method": run.manifest["method"],
        "trains": trains,
        "tasks": _list_of_tasks(run),
        "train rows": (f"first {rows}" if rows else "all") if known else DASH,
    }


def _list_of_tasks(run: Run) -> str:
    for name, order in ORDERS.items():
        if run.tasks == order:
            return f"{len(order)} ({name})"
    tasks = [_short(t) for t in run.tasks]
    return f"{len(tasks)} ({', '.join(tasks if len(tasks) <= 4 else [*tasks[:3], '…'])})"


def _numbers(run: Run) -> dict[str, float]:
    """The numbers of a run: scores in percent; NaN = not known, or not defined for the method."""
    R = 100 * score_matrix(run)
    sequential = _is_sequential(run)
    trained = [read_json(s.train_file) if s.train_file.exists() else None for s in run.stages[1:]]
    done = [t for t in trained if t is not None]
    complete = len(done) == len(trained)
    return {
        "OP": float(_final(run, R).mean()) if _has_mean(run) else math.nan,
        "BWT": metrics.backward_transfer(R) if sequential else math.nan,
        "Forgetting": metrics.forgetting(R) if sequential else math.nan,
        "base": math.nan if run.manifest["config"].get("num_fewshot") else float(R[0].mean()),
        "training min": sum(t["seconds"] for t in done) / 60 if complete else math.nan,
        "trained tokens": sum(t["tokens"] for t in done) if complete else math.nan,
    }


def _finals(run: Run) -> dict[str, float]:
    """The final scores in percent, by a name of the task that the reasoning variant shares with the plain one."""
    final = 100 * _final(run, score_matrix(run))
    return {_plain(task, run): float(value) for task, value in zip(run.tasks, final, strict=True)}


def _plain(task: str, run: Run) -> str:
    plain = task.removeprefix("reasoning_")
    # A run that trains both variants of a task keeps them apart.
    return task if plain != task and f"trace_{plain}" in run.tasks else _short(plain)


def _seed_groups(runs: dict[str, Run]) -> list[list[str]]:
    """Names of runs that differ in nothing but the seed, two or more each."""
    groups: list[list[str]] = []
    for name, run in runs.items():
        for group in groups:
            others = [
                {line.split(":")[0].strip() for line in differences(runs[other].manifest, run.manifest)}
                for other in group
            ]
            if all({"seed"} <= keys <= {"seed", "config.seed"} for keys in others):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def _comparability(runs: dict[str, Run]) -> list[str]:
    """What the runs differ in that their scores depend on, beside the training; and what they all lack."""
    conditions: dict[str, dict[str, Any]] = {}  # what -> run -> value, of the runs that have it
    for name, run in runs.items():
        flat = {**_conditions(run), "tasks": ", ".join(sorted(_plain(t, run) for t in run.tasks))}
        data, versions = flat.pop("data"), flat.pop("task versions")
        flat |= {f"data of {_plain(task, run)}": fingerprint for task, fingerprint in data.items()}
        flat |= {f"version of {task}": version for task, version in versions.items()}
        flat["backend"] = ", ".join(sorted({cell["settings"]["backend"] for cell in load_cells(run).values()}))
        for key, value in flat.items():
            if key == "backend" and not value:
                continue  # not evaluated yet
            conditions.setdefault(key, {})[name] = value
    notes: dict[str, list[str]] = {}  # how the runs fall apart -> what in
    for key, values in conditions.items():
        groups: dict[str, list[str]] = {}
        for name, value in values.items():
            groups.setdefault(_value(value), []).append(name)
        if len(groups) > 1:
            if key.startswith("data of"):  # a fingerprint says nothing to a reader, and all tasks fit on one line
                text = " against ".join(_ticks(group) for group in groups.values())
            else:
                text = "; ".join(f"{value} in {_ticks(group)}" for value, group in groups.items())
            notes.setdefault(text, []).append(key)
    lines = [f"**Not comparable** in {', '.join(keys)}: {text}." for text, keys in notes.items()]
    demo = [name for name, run in runs.items() if run.manifest["data"]["demo"]]
    if demo:
        lines.append(f"**Demo data**, not comparable with TRACE: {_ticks(demo)}.")
    return lines


def _definitions(runs: dict[str, Run]) -> list[str]:
    """What OP stands for where there is no sequence, and which runs are not complete."""
    means = [name for name, run in runs.items() if _has_mean(run) and not _is_sequential(run)]
    unfinished = []
    for name, run in runs.items():
        R = score_matrix(run)
        # The cells that OP, BWT and Forgetting are made of.
        needed = R[1:][np.tril_indices(len(run.tasks))] if _is_sequential(run) else _final(run, R)
        if np.isnan(needed).any():
            unfinished.append(name)
    lines = ["OP, BWT and Forgetting after the last stage, BWT divided by t-1; base = mean of the base model."]
    if means:
        lines.append(f"OP is the mean of the tasks, and BWT is not defined: {_ticks(means)}.")
    if unfinished:
        lines.append(f"Not complete, so that numbers are missing: {_ticks(unfinished)}.")
    return lines


def _mean_and_deviation(mean: float, deviation: float, write: Callable[[float], str]) -> str:
    return DASH if math.isnan(mean) else f"{write(mean)} ± {write(deviation).lstrip('+')}"


def _ticks(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# ------------------------------------------------------------------------------------------------------- formatting


def _short(task: str) -> str:
    return task.removeprefix("trace_")


def _value(value: Any) -> str:
    """A setting in a sentence; short, whatever it is."""
    if isinstance(value, dict):
        return ", ".join(f"{_short(k)} {v}" for k, v in value.items())
    return "not set" if value is None else str(value)


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
