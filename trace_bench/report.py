"""The report of a run, made from its JSON and its samples alone, in seconds and without a GPU.

`write_report` writes report.md, report.html with its figures, and scores.csv; runs beside the run that bound it are
shown in it. What is shown is computed in `results` and `bounds`; here it becomes texts and tables. Of those report.md
is made here, and the page in `html`, which adds figures and the samples.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from judges.report import judge_tokens
from judges.report import sections as judged_sections
from trace_bench import paper
from trace_bench.bounds import BOUNDS, bounds, demonstrations
from trace_bench.metrics import Estimate, Matrix
from trace_bench.records import stale
from trace_bench.results import Cells, Results, headline, unit_of
from trace_bench.run import WRITTEN, Run
from trace_bench.tables import (
    DASH,
    PERCENT,
    Block,
    Section,
    Table,
    Unit,
    arrow,
    count,
    left_out_text,
    length,
    markdown,
    percent,
    percent_with_interval,
    shared_unit,
    task_name,
    without_empty_columns,
)
from trace_bench.text import cell as csv_cell
from trace_bench.text import markdown_text, one_line
from trace_tasks.data import GROUPS, JUDGED, SUITES
from trace_tasks.data.files import refuse_links, write_text

DEMO = (
    "> **Demo data.** The tasks have TRACE's form, but the rows are made by this program. The scores show learning "
    "and forgetting;\n> they cannot be compared with TRACE."
)
INTERVALS = (
    "In brackets 95 % intervals: what other test rows of the same kind would give, each row taken with its answers at "
    "all stages. What another training seed would change is not in them."
)
ARROWS = (
    "↓, ↑: changed{since}. Arrows are corrected for all changes that this report tests (Holm): where nothing changed, "
    "at most one report in twenty shows any. Intervals are not corrected: one in twenty of unchanged cells excludes "
    "zero by chance."
)
#: What a manifest's "trains" means.
_TRAINS = {"lora": "LoRA", "full": "all parameters", "prompts": "soft prompts"}


def write_report(run: Run) -> str:
    """Writes report.md, report.html, figures/ and scores.csv and returns one line that sums them up."""
    from trace_bench.html import write_page

    refuse_links(run.path, *WRITTEN)
    results = Results(run)
    sections = list(_sections(results))
    texts = [markdown(b) if isinstance(b, Table) else markdown_text(b) for s in sections for b in s.blocks]
    write_text(run.path / "scores.csv", _scores_csv(results))
    write_text(run.path / "report.md", "\n\n".join(texts) + "\n")
    write_page(results, sections)
    line = f"{run.path}/report.md: "
    line += f"{len(results.cells)} cells of {results.R.size}" if run.tasks else f"{len(results.besides)} cells"
    unit = results.unit
    what = "" if unit is None or unit.is_percent else f" ({unit.name})"
    if results.is_sequential:
        t = results.last_stage
        if t and unit:
            line += f"; OP_{t} {unit.text(results.sequence['OP'][t - 1].value)}"
            line += f", BWT_{t} {unit.text(results.sequence['BWT'][t - 1].value, sign=True)}{what}"
    elif results.has_mean and unit and not np.isnan(results.final).any():
        line += f"; mean of the tasks {unit.text(results.mean.value)}{what}"
    if results.has_mean and unit is None:
        line += "; no mean over tasks of different units"
    delta = results.general.get(run.stages[-1].index)
    if delta:
        line += f"; general ability {percent(delta.value, sign=True)}"
    return line + ("; without leaked rows" if run.left_out else "")


# --------------------------------------------------------------------------------------------------------- sections


def _sections(results: Results) -> Iterable[Section]:
    """The parts of the report in their order; a part of which the run has nothing is empty."""
    run = results.run
    yield Section("run", list(_run_section(results)))
    if results.is_sequential:
        yield Section("summary", list(_sequence_section(results)))
        yield Section("learning", list(_learning_section(results)))
        yield Section("bounds", list(_bounds_section(results)))
    elif results.has_mean:
        yield Section("summary", list(_mean_section(results)))
        yield Section("learning", list(_learned_section(results)))
    else:
        yield Section("learning", list(_checkpoints_section(results)))
    yield Section("scores", list(_matrix_section(results)))
    yield Section("tolerant", list(_tolerant_section(results)))
    yield Section("form", list(_form_section(results)))
    yield Section("extracted", list(_extracted_section(run, results.cells)))
    yield Section("limits", list(_limits_section(results)))
    yield Section("general", list(_general_section(results)))
    yield Section("answers", list(_judged_section(run, results.besides)))
    yield Section("judged", list(judged_sections(run)))
    yield Section("paper", list(_paper_section(run)))
    yield Section("cost", list(_cost_section(results)))
    yield Section("provenance", [_provenance(results)])


def _run_section(results: Results) -> Iterable[Block]:
    """What the run is, and what keeps its scores from being comparable."""
    run, manifest = results.run, one_line(results.run.manifest)
    kind = _TRAINS.get(manifest.get("trains", ""), "checkpoints from elsewhere")
    if len(run.stages) == 1:
        kind = "nothing is trained"
    yield f"# {one_line(run.path.name)}"
    yield f"Method **{manifest['method']}** ({kind}), base model `{manifest['model']['name']}`."
    if manifest["data"]["demo"]:
        yield DEMO
    limits = {k: v for k in ("train_rows", "test_rows") if (v := manifest["config"].get(k))}
    if limits:
        text = ", ".join(f"{k.replace('_', ' ')}: first {v} of each task" for k, v in limits.items())
        yield f"> **Limited rows** ({text}). Not comparable with results on the full data."
    if run.left_out:
        yield f"> **Without leaked rows.** {left_out_text(results.left_out)}"
    why = stale(run)
    if why:
        stages = ", ".join(run.stages[i].name for i in why)
        yield f"> **Stale**: {stages}. {one_line(next(iter(why.values())))}"
    if results.other_versions:
        listed = "\n".join(f"> - {one_line(text)}" for text in results.other_versions)
        yield f"> **Cells of different versions**: a change between their stages may be theirs.\n>\n{listed}"
    yield from _units(results)


def _units(results: Results) -> Iterable[Block]:
    """Says what the scores are measured in, where it is not percent alone."""
    if not results.not_percent:
        return
    tasks: dict[str, list[str]] = {}
    for task, unit in results.units.items():
        if task in results.headlines:
            tasks.setdefault(unit.name, []).append(task_name(task))
    text = "; ".join(f"{', '.join(those)}: {name}" for name, those in tasks.items())
    text = f"**Units.** {text}. Changes are gains: + and ↑ are better, - and ↓ are worse"
    if any(not unit.higher_is_better for unit in results.units.values()):
        text += ", so that where lower is better a fall is a gain"
    if results.unit is None and results.has_mean:
        text += ". No mean is taken over different units, so OP, BWT, FWT, Forgetting and the mean have no value"
    yield f"{one_line(text)}."


def _sequence_section(results: Results) -> Iterable[Block]:
    run, sequence, t = results.run, results.sequence, results.last_stage
    unit = results.unit or PERCENT
    if t:
        op, bwt, forgetting = (sequence[name][t - 1] for name in ("OP", "BWT", "Forgetting"))
        rows = [
            [
                f"OP_{t}",
                unit.with_interval(op),
                f"mean of the {t} tasks seen, at stage {t}{_lower(unit)}",
            ],
            [
                f"BWT_{t}",
                unit.with_interval(bwt, sign=True),
                "mean change of a task since its own stage (divided by t-1); negative = forgetting",
            ],
            [
                f"Forgetting_{t}",
                unit.text(forgetting.value),
                "mean drop from a task's best stage; no interval, since a maximum is biased upwards",
            ],
        ]
        if t == len(run.tasks):
            rows.append(["FWT", unit.with_interval(sequence["FWT"][0], sign=True), "needs the full matrix"])
            rows.append(["mean OP_t", unit.with_interval(sequence["mean OP"][0]), f"over all stages{_lower(unit)}"])
        yield Table(["", _unit_name(results), ""], rows)
        if not math.isnan(op.low):
            yield INTERVALS


def _learning_section(results: Results) -> Iterable[Block]:
    """What each task gained at its own stage, and what became of it."""
    run, R = results.run, results.R
    last = results.last_stage or len(run.tasks)
    rows = []
    for i, task in enumerate(run.tasks):
        own, final, unit = i + 1, results.since_base[last, i], results.units[task]
        since = results.since_own[last, i] if own < last else None
        rows.append(
            [
                *_task_cells(results, task),
                unit.text(R[0, i]),
                unit.text(R[own, i]),
                unit.text(R[last, i]) if own <= last else DASH,
                _change(unit, results.since_base[own, i], results.mark(task, 0, own)),
                _change(unit, since, results.mark(task, own, last)),
                _change(unit, final if own <= last else None, results.mark(task, 0, last)),
            ]
        )
    yield "## Learning and forgetting" + _legend([c for row in rows for c in row], "")
    head = [*_task_head(results), "base", "own stage", f"stage {last}", "learned", "since then", "in all"]
    yield Table(head, rows)


def _task_head(results: Results) -> list[str]:
    """The head of the first columns of a table with a row a task: units are named where they are not all percent."""
    return ["task", "unit"] if results.not_percent else ["task"]


def _task_cells(results: Results, task: str) -> list[str]:
    return [task_name(task), results.units[task].name] if results.not_percent else [task_name(task)]


def _column(results: Results, task: str) -> str:
    """The head of a task's column: its name and its headline, and that lower is better where it is."""
    unit = results.units[task]
    lower = "" if unit.higher_is_better else "<br>lower is better"
    return f"{task_name(task)}<br>{results.headlines.get(task, DASH)}{lower}"


def _unit_name(results: Results) -> str:
    """The unit of a mean over the tasks."""
    return results.unit.plain if results.unit else "no unit in common"


def _lower(unit: Unit) -> str:
    return "" if unit.higher_is_better else "; lower is better"


def _change(unit: Unit, change: Estimate | None, mark: int) -> str:
    return unit.with_interval(change, sign=True) + arrow(mark) if change else DASH


def _legend(texts: list[str], since: str) -> str:
    """What arrows mean, where there are some, or changes with intervals, which might have one."""
    return f"\n\n{ARROWS.format(since=since)}" if any(t.endswith(("↓", "↑", "]")) for t in texts) else ""


def _mean_section(results: Results) -> Iterable[Block]:
    """For runs without a sequence: the mean over the tasks."""
    run, shots = results.run, results.run.manifest["config"].get("num_fewshot")
    if results.is_single:
        what = "each task with its own model, trained from the base model: an upper bound; BWT is not defined"
    elif len(run.stages) > 1:
        what = f"one model, after stage {run.stages[-1].name}; BWT is not defined"
    else:
        what = f"the base model {demonstrations(run)}" if shots else "the base model, zero-shot"
    mean = results.mean
    unit = results.unit or PERCENT
    row = ["mean of the tasks", unit.with_interval(mean), what + _lower(unit)]
    yield Table(["", _unit_name(results), ""], [row])
    if not math.isnan(mean.low):
        yield INTERVALS


def _learned_section(results: Results) -> Iterable[Block]:
    """For runs without a sequence: what training changed."""
    run = results.run
    if len(run.stages) > 1:
        rows = [
            [
                *_task_cells(results, task),
                results.units[task].text(base),
                results.units[task].text(end),
                _change(results.units[task], results.since_base[stage, i], results.mark(task, 0, stage)),
            ]
            for i, (task, base, end, stage) in enumerate(
                zip(run.tasks, results.R[0], results.final, results.final_stages, strict=True)
            )
        ]
        yield "## Learning" + _legend([c for row in rows for c in row], "")
        yield Table([*_task_head(results), "base", "trained", "learned"], rows)


def _checkpoints_section(results: Results) -> Iterable[Block]:
    """For checkpoints of unknown training: what each one gained and lost."""
    run = results.run
    for title, before, changes in (
        ("Changes since the base model", 0, results.since_base),
        ("Changes since the checkpoint before", 1, results.since_before),
    ):
        stages = run.stages[1 + before :]
        rows = []
        for s in stages:
            earlier = before and s.index - 1
            gains = [(t, changes.get((s.index, i))) for i, t in enumerate(run.tasks)]
            rows.append([s.name, *(_change(results.units[t], e, results.mark(t, earlier, s.index)) for t, e in gains)])
        if rows and run.tasks:
            what = "In points." if not results.not_percent else "Gains, each in the unit of its task."
            yield f"## {title}\n\n{what}" + _legend([c for row in rows for c in row], "")
            head = [_column(results, t) if results.not_percent else task_name(t) for t in run.tasks]
            yield Table(["checkpoint", *head], rows)


def _bounds_section(results: Results) -> Iterable[Block]:
    """What the base model, demonstrations, a model per task and multi-task training reach on the same tasks."""
    run, R, found = results.run, results.R, bounds(results.run)
    together = [results.cells, *(b.cells for b in found)]
    units = [
        unit_of(results.headlines.get(task, ""), [c for cells in together for (_, n), c in cells.items() if n == task])
        for task in run.tasks
    ]
    rows = [
        _scores_row("base, zero-shot", R[0], units),
        *(_scores_row(b.label, b.scores, units) for b in found if b.method == "icl"),
        _scores_row(f"this run (stage {len(run.tasks)})", R[-1], units),
        *(_scores_row(b.label, b.scores, units) for b in found if b.method != "icl"),
    ]
    shown = [f" ICL is the base model {one_line(demonstrations(b.run))}." for b in found if b.method == "icl"]
    what = ", each score in the unit of its task" if results.not_percent else ", in percent"
    yield (
        f"## Bounds\n\nRuns beside this one with the same base model, data and evaluation{what}. What learns the "
        "tasks one by one is expected between the base model and the last two." + "".join(shown)
    )
    head = [_column(results, t) if results.not_percent else task_name(t) for t in run.tasks]
    yield Table(["model", *head, "mean"], rows)
    notes = []
    for method in BOUNDS:
        bound = next((b for b in found if b.method == method), None)
        if bound is None:
            notes.append(
                f"- {method} is missing: `make {method}-train CONFIG=...`, with the configuration and tasks of this "
                f"run and the new run's folder in `{one_line(str(run.path.parent))}`."
            )
            continue
        other = "; ".join(bound.other_training)
        training = f"; its training is another (there, here): {other}" if other else ""
        notes.append(f"- {method}: the run `{one_line(bound.run.path.name)}`{training}")
    yield "\n".join(notes)


def _scores_row(label: str, scores: Matrix, units: list[Unit]) -> list[str]:
    texts = [unit.text(score) for unit, score in zip(units, scores, strict=True)]
    unit = shared_unit(units)
    return [label, *texts, unit.text(scores.mean()) if unit else DASH]


def _matrix_section(results: Results) -> Iterable[Block]:
    run = results.run
    if not run.tasks:
        return
    rows = []
    for s in run.stages:
        scores = enumerate(zip(run.tasks, results.R[s.index], strict=True))
        texts = [results.units[task].text(v) + arrow(results.matrix_mark(s.index, i)) for i, (task, v) in scores]
        rows.append([s.name, *texts])
    since = "the task's own stage" if results.is_sequential else "the base model"
    legend = _legend([c for row in rows for c in row], f" since {since}")
    what = "each in the unit of its metric" if results.not_percent else "in percent"
    yield f"## Scores\n\nRows: the model after a stage. Columns: tasks, {what}.{legend}"
    yield Table(["stage", *(_column(results, t) for t in run.tasks)], rows)
    if results.is_sequential:
        unit = results.unit or PERCENT
        yield Table(
            ["stage", "OP_t", "BWT_t", "Forgetting_t"],
            [
                [
                    stage.name,
                    unit.with_interval(op),
                    unit.with_interval(bwt, sign=True),
                    unit.text(forgetting.value),
                ]
                for stage, op, bwt, forgetting in zip(
                    run.stages[1:], *(results.sequence[n] for n in ("OP", "BWT", "Forgetting")), strict=True
                )
            ],
        )


def _tolerant_section(results: Results) -> Iterable[Block]:
    """The form-tolerant accuracy."""
    run, tolerant = results.run, results.matrix("accuracy_tolerant")
    columns = [i for i in range(len(run.tasks)) if not np.isnan(tolerant[:, i]).all()]
    if not columns:
        return
    yield (
        "### Form-tolerant accuracy\n\nThe official accuracy asks for the very same string. This one accepts the "
        "right answer in another form."
    )
    yield Table(
        ["stage", *(task_name(run.tasks[i]) for i in columns)],
        [[s.name, *(percent(tolerant[s.index, i]) for i in columns)] for s in run.stages],
    )


def _form_section(results: Results) -> Iterable[Block]:
    """What of the forgetting the form-tolerant accuracy does not see."""
    forms = results.forms if results.is_sequential else []
    if forms:
        yield (
            "### Form or knowledge\n\nWhat a task lost in the official accuracy from its own stage to stage "
            f"{results.last_stage}, in points: part of it only because the answer has another form, the rest because "
            "it is wrong in any form, or was cut at the limit of its length before it came to the answer (see Limits). "
            "In the paper LLaMA-2-7B's FOMC is 0 right after ScienceQA, whose answers come with explanations, and is "
            "back later: a loss of form."
        )
        yield Table(
            ["task", "lost", "in form alone", "share", "in knowledge"],
            [
                [
                    task_name(form.task),
                    percent_with_interval(form.strict),
                    percent_with_interval(form.form),
                    f"{100 * form.form.value / form.strict.value:.0f} %" if form.strict.sign > 0 else DASH,
                    percent_with_interval(form.tolerant),
                ]
                for form in forms
            ],
        )


def _extracted_section(run: Run, cells: Cells) -> Iterable[Block]:
    """For tasks that ask for the reasoning first: how often there was an answer in the text at all."""
    columns = [t for t in run.tasks if any("extracted" in c["metrics"] for (_, task), c in cells.items() if task == t)]
    if not columns:
        return

    def share(cell: dict[str, Any] | None) -> str:
        value = cell["metrics"].get("extracted", {}).get("value") if cell else None
        if cell is None or value is None:
            return DASH
        return f"{percent(value)} ({round((1 - value) * cell['n'])})"

    yield (
        "### Answers that could be extracted\n\nPercent of the texts in which there is an answer, and in brackets how "
        "many have none. A text without one scores 0."
    )
    yield Table(
        ["stage", *(task_name(t) for t in columns)],
        [[s.name, *(share(cells.get((s.index, t))) for t in columns)] for s in run.stages],
    )


def _limits_section(results: Results) -> Iterable[Block]:
    """What the limits on lengths cut off, where they did."""
    run, cells = results.run, results.cells
    # With rows left out the counts would be those of other rows.
    counts = {} if run.left_out else {k: (c.get("n_cut", 0), c.get("n_unfinished", 0)) for k, c in cells.items()}
    tasks = [t for t in run.tasks if any(sum(count) for (_, task), count in counts.items() if task == t)]
    if not tasks:
        return
    config = one_line(run.manifest["config"])
    yield (
        "## Limits\n\nPercent of the prompts whose beginning was cut off / of the answers that reached the limit of "
        f"their length and so may lack their end (max_prompt_length {config.get('max_prompt_length') or DASH}, "
        f"max_new_tokens {config.get('max_new_tokens') or 'as the tasks have it'})."
    )
    yield Table(
        ["stage", *map(task_name, tasks)],
        [
            [
                stage.name,
                *(
                    " / ".join(f"{100 * count / cells[stage.index, t]['n']:.0f}" for count in counts[stage.index, t])
                    if (stage.index, t) in counts
                    else DASH
                    for t in tasks
                ),
            ]
            for stage in run.stages
        ],
    )


def _general_section(results: Results) -> Iterable[Block]:
    """The general-ability suites, stage by stage, and their delta."""
    run = results.run
    cells = {key: cell for key, cell in results.besides.items() if key[1] in SUITES}
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
        text = one_line(" or ".join(map(str, sorted(limits))))
        yield (
            f"> **Limited rows** (at least {text} of each suite, the first ones of each subtask). Not comparable with "
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
        scores = {s: headline(cells[stage.index, s]) if (stage.index, s) in cells else math.nan for s in SUITES}
        texts = {s: percent(v) + arrow(results.mark(s, 0, stage.index)) for s, v in scores.items()}
        mean = float(np.mean([scores[s] for s in suites])) if suites else math.nan
        rows.append(
            [
                stage.name,
                *(texts[s] for s in suites),
                percent(mean),
                percent_with_interval(results.general.get(stage.index, Estimate(math.nan)), sign=True),
                *(texts[s] for s in others),
            ]
        )
    if legend := _legend([c for row in rows for c in row], " since the base model"):
        yield legend.strip()
    yield Table(["stage", *map(head, suites), "mean", "delta", *map(head, others)], rows)
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


def _judged_section(run: Run, besides: Cells) -> Iterable[Block]:
    """What there is for the judges: how long the answers are, and how many are empty."""
    cells = {key: cell for key, cell in besides.items() if key[1] in JUDGED}
    if not cells:
        return
    yield (
        "## Answers for the judges\n\nCharacters of an answer on average; in brackets the percentage of answers that "
        "are empty, where some are. They say whether there is something to judge, not how good it is."
    )
    limits = {cell["settings"]["test_rows"] for cell in cells.values()} - {None}
    if limits:
        yield f"> **Limited rows** (first {one_line(' or '.join(map(str, sorted(limits))))} of each set)."
    names = [n for n in JUDGED if any(n == name for _, name in cells)]

    def text(cell: dict[str, Any] | None) -> str:
        if cell is None:
            return DASH
        return length(*(cell["metrics"][name]["value"] for name in ("characters", "empty")))

    yield Table(
        ["stage", *(f"{n}<br>{next(c['n'] for (_, m), c in cells.items() if m == n)} prompts" for n in names)],
        [
            [stage.name, *(text(cells.get((stage.index, n))) for n in names)]
            for stage in run.stages
            if any(index == stage.index for index, _ in cells)
        ],
    )


def _suite(name: str) -> str:
    return name.removeprefix("general_")


def _paper_section(run: Run) -> Iterable[Block]:
    name = paper.name_of(run)
    if name is not None:
        table = paper.table([name])
        yield f"## {table.title} for this method ({name})\n\n{paper.SETUP}"
        yield Table(table.header[1:], [row[1:] for row in table.rows])


def _cost_section(results: Results) -> Iterable[Block]:
    """What each stage took, and all of them."""
    judged = judge_tokens(results.judged.values())
    rows = []
    for stage in results.run.stages:
        train = results.training.get(stage.index, {})
        memory = f"{train['peak_memory_bytes'] / 2**30:.1f} ({train['memory_of']})" if train else DASH
        rows.append(
            [
                stage.name,
                *(count(train.get(key)) for key in ("rows", "steps", "tokens", "seconds", "tokens_per_second")),
                memory,
                count(results.evaluation_seconds(stage)),
                count(judged.get(stage.index)),
            ]
        )
    sums = [
        count(sum(t[key] for t in results.training.values()) if results.training else None)
        for key in ("rows", "steps", "tokens", "seconds")
    ]
    evaluation = count(sum(map(results.evaluation_seconds, results.run.stages)))
    rows.append(["in all", *sums, DASH, DASH, evaluation, count(sum(judged.values()) if judged else None)])
    yield "## Cost"
    header = ["stage", "rows", "steps", "tokens", "train s", "tokens/s", "peak GiB", "evaluation s", "judge tokens"]
    yield without_empty_columns(Table(header, rows))


def _provenance(results: Results) -> str:
    run, cells, besides = results.run, results.cells, results.besides
    m = one_line(run.manifest)
    lines = [f"- base model: `{m['model']['name']}`, revision `{m['model'].get('revision')}`"]
    if run.tasks:
        lines += [
            f"- data: {'demo' if m['data']['demo'] else m['data'].get('path')}; fingerprints "
            + ", ".join(f"{task_name(t)} `{f}`" for t, f in m["data"]["fingerprint"].items()),
            "- task versions: " + ", ".join(f"{task_name(t)} {v}" for t, v in m["task_versions"].items()),
        ]
    lines += [
        f"- seed: {m.get('seed', DASH)}; program: {m.get('commit') or 'no checkout'}",
        "- packages at the start: " + ", ".join(f"{k} {v}" for k, v in m["packages"].items()),
    ]
    made = {key: ", ".join(versions) for key, versions in results.versions.items() if not key.startswith("definition")}
    if made:
        lines.append("- scores made with: " + one_line(", ".join(f"{key} {text}" for key, text in made.items())))
    settings = {json.dumps(cell["settings"], sort_keys=True) for cell in cells.values()}
    lines += [f"- evaluation: `{s}`" for s in sorted(settings)]
    for name in [*SUITES, *JUDGED]:
        of_cells = [cell for (_, n), cell in besides.items() if n == name]
        settings = {json.dumps({"version": c["version"], **c["settings"]}, sort_keys=True) for c in of_cells}
        lines += [f"- {name}: `{s}`" for s in sorted(settings)]
    config = ", ".join(f"{k}={v}" for k, v in m["config"].items() if k != "tasks" and v is not None)
    lines.append(f"- configuration: `{config}`")
    return "## Provenance\n\n" + "\n".join(lines)


def _scores_csv(results: Results) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["stage", "task", "metric", "value", "stderr", "n", "n_unscored", "low", "high"])
    order = [*results.run.tasks, *SUITES, *JUDGED]
    cells = results.cells | results.besides
    for (index, task), cell in sorted(cells.items(), key=lambda c: (c[0][0], order.index(c[0][1]))):
        for metric, score in cell["metrics"].items():
            row = [
                results.run.stages[index].name,
                task,
                metric,
                score["value"],
                score["stderr"],
                cell["n"],
                cell.get("n_unscored", 0),
                *results.intervals.get((index, task, metric), (None, None)),
            ]
            writer.writerow(map(csv_cell, row))
    return out.getvalue()
