"""The sections of a run's report, as texts and tables: the run, its scores, what was learned and forgotten."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from trace_bench.records import stale
from trace_bench.report import choices, conventions, distance, judged, likelihood, record, relearn, suites, transitions
from trace_bench.report.bounds import BOUNDS, bounds, demonstrations, other_training
from trace_bench.report.results import Results, unit_of
from trace_bench.report.tables import (
    DASH,
    PERCENT,
    Block,
    Table,
    arrow,
    left_out_text,
    legend,
    percent,
    percent_with_interval,
    shared_unit,
)
from trace_bench.text import one_line, word
from trace_tasks.data import task_name

DEMO = (
    "> **Demo data.** The tasks have TRACE's form, but this program generated the rows. The scores show learning "
    "and forgetting;\n> they cannot be compared with TRACE."
)
INTERVALS = (
    "In brackets: 95 % intervals over test rows (each row with its answers at all stages). They do not include "
    "differences between training seeds."
)
#: What a manifest's "trains" means.
_TRAINS = {"lora": "LoRA", "full": "all parameters", "prompts": "soft prompts"}


def sections(results: Results, others: Iterable[Results] = ()) -> dict[str, list[Block]]:
    """Key of a section -> its blocks, in the order of the report; empty if the run has nothing to show there.

    Args:
        results: The run.
        others: Other runs, among which `bounds` looks for upper and lower bounds.
    """
    parts: dict[str, Callable[[Results], Iterable[Block]]] = {
        "run": _run,
        "summary": _summary,
        "learning": _learning,
        "bounds": partial(_bounds, others=others),
        "scores": _scores,
        "tolerant": _tolerant,
        "extracted": _extracted,
        "form": _form,
        "likelihood": likelihood.sections,
        "hidden": relearn.sections,
        "limits": _limits,
        "transitions": transitions.sections,
        "choices": choices.sections,
        "general": suites.general,
        "distance": distance.sections,
        "answers": suites.answers,
        "judged": judged.sections,
        "conventions": conventions.sections,
        "paper": record.of_the_paper,
        "cost": record.cost,
        "provenance": record.provenance,
    }
    return {key: list(part(results)) for key, part in parts.items()}


def _run(results: Results) -> Iterable[Block]:
    run, manifest = results.run, one_line(results.run.manifest)
    kind = _TRAINS.get(manifest.get("trains", ""), "checkpoints from elsewhere")
    if len(run.stages) == 1:
        kind = "nothing is trained"
    yield f"# {one_line(run.path.name)}"
    yield f"Method **{manifest['method']}** ({kind}), base model `{manifest['model']['name']}`."
    if manifest["data"]["demo"]:
        yield DEMO
    if origin := manifest.get("answers_only"):
        yield f"> **Answers without weights**: {origin}."
    limits = {k: v for k in ("train_rows", "test_rows") if (v := manifest["config"].get(k))}
    if limits:
        text = ", ".join(f"{k.replace('_', ' ')}: first {v} of each task" for k, v in limits.items())
        yield f"> **Limited rows** ({text}). Not comparable with results on the full data."
    if run.left_out:
        yield f"> **Without leaked rows.** {left_out_text(results.left_out)}"
    if why := stale(run):
        stages = ", ".join(run.stages[i].name for i in why)
        yield f"> **Stale**: {stages}. {one_line(next(iter(why.values())))}"
    if results.other_versions:
        listed = "\n".join(f"> - {one_line(text)}" for text in results.other_versions)
        yield f"> **Cells of different versions**, which may cause changes between their stages:\n>\n{listed}"
    if results.not_percent:
        tasks: dict[str, list[str]] = {}
        for task, unit in results.units.items():
            if task in results.headlines:
                tasks.setdefault(unit.name, []).append(task_name(task))
        text = "; ".join(f"{', '.join(those)}: {name}" for name, those in tasks.items())
        text = f"**Units.** {text}. Changes are gains: + and ↑ are better, - and ↓ are worse"
        if any(not unit.higher_is_better for unit in results.units.values()):
            text += "; if lower is better, a fall is a gain"
        if results.unit is None and results.has_mean:
            text += ". There is no mean over different units, so OP, BWT, FWT, Forgetting and the mean have no value"
        yield f"{one_line(text)}."


# ------------------------------------------------------------------------------------------------- numbers of the run


def _summary(results: Results) -> Iterable[Block]:
    """The headline numbers of the run; none for checkpoints of unknown training."""
    unit, t = results.unit or PERCENT, results.last_stage
    lower = "" if unit.higher_is_better else "; lower is better"
    if t:
        sequence = results.sequence
        first, bwt, forgetting = (sequence[name][t - 1] for name in ("OP", "BWT", "Forgetting"))
        drop = "mean drop from a task's best stage; no interval, since a maximum is biased upwards"
        rows = [
            [f"OP_{t}", unit.with_interval(first), f"mean of the {t} tasks seen, at stage {t}{lower}"],
            [f"BWT_{t}", unit.with_interval(bwt, sign=True), likelihood.BWT],
            [f"Forgetting_{t}", unit.text(forgetting.value), drop],
        ]
        if t == len(results.run.tasks):
            rows.append(["FWT", unit.with_interval(sequence["FWT"][0], sign=True), "needs the full matrix"])
            rows.append(["mean OP_t", unit.with_interval(sequence["mean OP"][0]), f"over all stages{lower}"])
    elif results.has_mean and not results.is_sequential:
        first = results.mean
        rows = [["mean of the tasks", unit.with_interval(first), _what_the_mean_is_of(results) + lower]]
    else:
        return
    yield Table(["", unit.plain if results.unit else "no unit in common", ""], rows)
    if not math.isnan(first.low):
        yield INTERVALS


def _what_the_mean_is_of(results: Results) -> str:
    run = results.run
    if results.is_single:
        return "each task with its own model, trained from the base model: an upper bound; BWT is not defined"
    if len(run.stages) > 1:
        return f"one model, after stage {run.stages[-1].name}; BWT is not defined"
    shots = run.manifest["config"].get("num_fewshot")
    return f"the base model {demonstrations(run)}" if shots else "the base model, zero-shot"


def _learning(results: Results) -> Iterable[Block]:
    if not results.has_mean:
        yield from _changes_of_checkpoints(results)
    elif results.is_sequential:
        yield from _learned_and_forgotten(results)
    elif len(results.run.stages) > 1:
        rows = []
        for i, (task, stage) in enumerate(zip(results.run.tasks, results.final_stages, strict=True)):
            scores = (results.units[task].text(results.R[t, i]) for t in (0, stage))
            rows.append([*_task_cells(results, task), *scores, _change(results, i, 0, stage)])
        yield "## Learning" + legend(rows)
        yield Table([*_task_head(results), "base", "trained", "learned"], rows)


def _learned_and_forgotten(results: Results) -> Iterable[Block]:
    tasks, R = results.run.tasks, results.R
    last = results.last_stage or len(tasks)
    rows = []
    for i, task in enumerate(tasks):
        own, text = i + 1, results.units[task].text
        seen = own <= last
        rows.append(
            [
                *_task_cells(results, task),
                text(R[0, i]),
                text(R[own, i]),
                text(R[last, i]) if seen else DASH,
                _change(results, i, 0, own),
                _change(results, i, own, last) if own < last else DASH,
                _change(results, i, 0, last) if seen else DASH,
            ]
        )
    yield "## Learning and forgetting" + legend(rows)
    yield Table([*_task_head(results), "base", "own stage", f"stage {last}", "learned", "since then", "in all"], rows)


def _changes_of_checkpoints(results: Results) -> Iterable[Block]:
    """For checkpoints of unknown training: the gains and losses of each one."""
    run = results.run
    stages, columns = run.stages, range(len(run.tasks))
    for title, pairs in (
        ("Changes since the base model", [(stages[0], stage) for stage in stages[1:]]),
        ("Changes since the checkpoint before", list(itertools.pairwise(stages[1:]))),
    ):
        rows = [[s.name, *(_change(results, i, before.index, s.index) for i in columns)] for before, s in pairs]
        if rows and run.tasks:
            what = "Gains, each in the unit of its task." if results.not_percent else "In points."
            yield f"## {title}\n\n{what}" + legend(rows)
            yield Table(["checkpoint", *_columns(results)], rows)


def _change(results: Results, i: int, earlier: int, later: int) -> str:
    task, change = results.run.tasks[i], results.change(i, earlier, later)
    return results.units[task].with_interval(change, sign=True) + arrow(results.mark(task, earlier, later))


def _task_head(results: Results) -> list[str]:
    """The first heads of a table with one row per task; with a column of units if not all are percent."""
    return ["task", "unit"] if results.not_percent else ["task"]


def _task_cells(results: Results, task: str) -> list[str]:
    return [task_name(task), results.units[task].name] if results.not_percent else [task_name(task)]


def _column(results: Results, task: str) -> str:
    lower = "" if results.units[task].higher_is_better else "<br>lower is better"
    return f"{task_name(task)}<br>{results.headlines.get(task, DASH)}{lower}"


def _columns(results: Results) -> list[str]:
    """The heads of the tasks' columns, with their metrics if not all units are percent."""
    return [_column(results, t) if results.not_percent else task_name(t) for t in results.run.tasks]


# -------------------------------------------------------------------------------------------------------------- bounds


def _bounds(results: Results, others: Iterable[Results]) -> Iterable[Block]:
    """The scores of the base model, demonstrations, a model per task and multi-task training on the same tasks."""
    if not results.is_sequential:
        return
    run, found = results.run, bounds(results, others)
    cells = [item for one in (results, *found.values()) for item in one.cells.items()]
    units = [unit_of(results.headlines.get(t, ""), [c for (_, name), c in cells if name == t]) for t in run.tasks]
    unit, rows = shared_unit(units), []
    models = [("base, zero-shot", results.R[0]), (f"this run (stage {len(run.tasks)})", results.R[-1])]
    for method, bound in found.items():
        label = BOUNDS[method].format_map(bound.run.manifest["config"])
        scores = bound.final[[bound.run.tasks.index(task) for task in run.tasks]]
        models.insert(1 if method == "icl" else len(models), (label, scores))
    for label, scores in models:
        texts = [unit.text(score) for unit, score in zip(units, scores, strict=True)]
        rows.append([label, *texts, unit.text(scores.mean()) if unit else DASH])
    what = ", each score in the unit of its task" if results.not_percent else ", in percent"
    shown = f" ICL is the base model {one_line(demonstrations(found['icl'].run))}." if "icl" in found else ""
    yield (
        "## Bounds\n\nRuns that were reported together with this one, with the same base model, data and evaluation"
        f"{what}. A method that learns the tasks in sequence should be between the base model and `single` or "
        f"`joint`.{shown}"
    )
    yield Table(["model", *_columns(results), "mean"], rows)
    notes, path = [], one_line(word(run.path))
    for method in BOUNDS:
        if method in found:
            other = "; ".join(other_training(run, found[method].run))
            training = f"; its training differs (there, here): {other}" if other else ""
            notes.append(f"- {method}: the run `{one_line(found[method].run.path.name)}`{training}")
        else:
            notes.append(
                f"- {method} is missing: `trace-bench train {method} --like {path} --output_dir {path}-{method} && "
                f"trace-bench evaluate {path}-{method} && trace-bench report {path} {path}-{method}`"
            )
    yield "\n".join(notes)


# ---------------------------------------------------------------------------------------------------------- the matrix


def _scores(results: Results) -> Iterable[Block]:
    run = results.run
    if not run.tasks:
        return
    rows = []
    for s in run.stages:
        texts = (results.units[task].text(score) for task, score in zip(run.tasks, results.R[s.index], strict=True))
        rows.append([s.name, *(text + arrow(results.matrix_mark(s.index, i)) for i, text in enumerate(texts))])
    since = "the task's own stage" if results.is_sequential else "the base model"
    what = "each in the unit of its metric" if results.not_percent else "in percent"
    yield f"## Scores\n\nRows: the model after a stage. Columns: tasks, {what}.{legend(rows, f' since {since}')}"
    yield Table(["stage", *(_column(results, t) for t in run.tasks)], rows)
    if results.is_sequential:
        unit = results.unit or PERCENT
        numbers = zip(run.stages[1:], *(results.sequence[name] for name in ("OP", "BWT", "Forgetting")), strict=True)
        rows = [
            [s.name, unit.with_interval(op), unit.with_interval(bwt, sign=True), unit.text(forgetting.value)]
            for s, op, bwt, forgetting in numbers
        ]
        yield Table(["stage", "OP_t", "BWT_t", "Forgetting_t"], rows)


def _tolerant(results: Results) -> Iterable[Block]:
    tolerant = dict(zip(results.run.tasks, results.matrix("accuracy_tolerant").T, strict=True))
    tasks = [task for task, column in tolerant.items() if not np.isnan(column).all()]
    if tasks:
        yield (
            "### Form-tolerant accuracy\n\nThe official accuracy requires exactly the same string, that of "
            "CL_Benchmark the same words. This one accepts the right answer in a different form."
        )
        yield _by_stage(results, tasks, lambda index, task: percent(tolerant[task][index]))


def _form(results: Results) -> Iterable[Block]:
    if not results.forms:
        return
    above = any(form.form.value > form.strict.value > 0 for form in results.forms)
    yield (
        "### Form or knowledge\n\nThe loss of a task in the official accuracy from its own stage to stage "
        f"{results.last_stage}, in points. A part of it is only in form: the answer is right, but has a different "
        "form. The rest is in knowledge: the answer is wrong in any form, or was cut before the model reached it (see "
        "Limits). Example of a loss of form: in the paper, FOMC of LLaMA-2-7B is 0 right after ScienceQA, whose "
        "answers have explanations, and comes back later."
        + " A share above 100 %: knowledge was gained while the form was lost."
        * above
    )
    rows = []
    for form in results.forms:
        lost, of_form, known = map(percent_with_interval, (form.strict, form.form, form.tolerant))
        share = f"{round(100 * form.form.value / form.strict.value)} %" if form.strict.sign > 0 else DASH
        rows.append([task_name(form.task), lost, of_form, share, known])
    yield Table(["task", "lost", "only in form", "share", "in knowledge"], rows)


def _extracted(results: Results) -> Iterable[Block]:
    """For tasks that ask for the reasoning first: how often the text has an answer."""
    cells = results.cells_of(results.run.tasks)
    having = {task for (_, task), cell in cells.items() if "extracted" in cell["metrics"]}
    if not having:
        return

    def share(index: int, task: str) -> str:
        cell = cells.get((index, task), {"metrics": {}})
        value = cell["metrics"].get("extracted", {}).get("value")
        return DASH if value is None else f"{percent(value)} ({round((1 - value) * cell['n'])})"

    yield (
        "### Answers that could be extracted\n\nPercent of the texts that contain an answer. In brackets: the number "
        "of texts without one, which score 0."
    )
    yield _by_stage(results, [task for task in results.run.tasks if task in having], share)


def _limits(results: Results) -> Iterable[Block]:
    run, cells = results.run, results.cells
    counts = {key: (c.get("n_cut", 0), c.get("n_unfinished", 0)) for key, c in results.cells_of(run.tasks).items()}
    tasks = [t for t in run.tasks if any(sum(count) for (_, task), count in counts.items() if task == t)]
    if not tasks or run.left_out:  # the counts include the rows that are left out
        return

    def shares(*key: Any) -> str:
        return " / ".join(f"{100 * n / cells[key]['n']:.0f}" for n in counts[key]) if key in counts else DASH

    config = one_line(run.manifest["config"])
    yield (
        "## Limits\n\nPercent of the prompts whose beginning was cut off / percent of the answers that reached their "
        f"length limit, so that their end may be missing (max_prompt_length {config.get('max_prompt_length') or DASH}, "
        f"max_new_tokens {config.get('max_new_tokens') or 'of each task'})."
    )
    yield _by_stage(results, tasks, shares)


def _by_stage(results: Results, tasks: list[str], text: Callable[[int, str], str]) -> Table:
    rows = [[stage.name, *(text(stage.index, task) for task in tasks)] for stage in results.run.stages]
    return Table(["stage", *map(task_name, tasks)], rows)
