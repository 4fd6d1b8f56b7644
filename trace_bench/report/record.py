"""The sections on the paper's numbers, the cost and the provenance of a run; and its scores as CSV."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from trace_bench.judgements import judge_tokens
from trace_bench.report import choices, distance, paper, transitions
from trace_bench.report.results import Results
from trace_bench.report.tables import DASH, Block, Table, count, csv_text
from trace_bench.text import one_line
from trace_tasks.data import JUDGED, SUITES, task_name


def of_the_paper(results: Results) -> Iterable[Block]:
    """What the paper reports for the method."""
    name = paper.name_of(results.run)
    if name is not None:
        table = paper.table([name])
        yield f"## {table.title} for this method ({name})\n\n{paper.SETUP}"
        yield Table(table.header[1:], [row[1:] for row in table.rows])


def cost(results: Results) -> Iterable[Block]:
    """The cost of each stage and of all together."""
    judged, training = judge_tokens(results.judged.values()), results.training
    rows = []
    for stage in results.run.stages:
        train = training.get(stage.index, {})
        numbers = [count(train.get(key)) for key in ("rows", "steps", "tokens", "seconds", "tokens_per_second")]
        memory = f"{train['peak_memory_bytes'] / 2**30:.1f} ({train['memory_of']})" if train else DASH
        evaluation = count(results.evaluation_seconds(stage))
        rows.append([stage.name, *numbers, memory, evaluation, count(judged.get(stage.index))])
    sums = [sum(train[key] for train in training.values()) for key in ("rows", "steps", "tokens", "seconds")]
    evaluation = count(sum(map(results.evaluation_seconds, results.run.stages)))
    trained = map(count, sums if training else [None] * 4)
    rows.append(["in all", *trained, DASH, DASH, evaluation, count(sum(judged.values()) if judged else None)])
    yield "## Cost"
    header = ["stage", "rows", "steps", "tokens", "train s", "tokens/s", "peak GiB", "evaluation s", "judge tokens"]
    yield Table(header, rows).without_empty_columns()


def provenance(results: Results) -> Iterable[Block]:
    """What the run and its scores were made from."""
    run, m = results.run, one_line(results.run.manifest)
    lines = [f"- base model: `{m['model']['name']}`, revision `{m['model'].get('revision')}`"]
    weights = {i: cell["checkpoint"] for (i, _), cell in results.cells.items()}
    for stage, place in zip(run.stages[1:], m.get("checkpoints", {}).values(), strict=False):
        lines.append(f"- {stage.name}: `{place}`, fingerprint `{weights.get(stage.index) or DASH}`")
    if run.tasks:
        source = "demo" if m["data"]["demo"] else m["data"].get("path")
        prints = ", ".join(f"{task_name(t)} `{f}`" for t, f in m["data"]["fingerprint"].items())
        lines.append(f"- data: {source}; fingerprints {prints}")
        lines.append("- task versions: " + ", ".join(f"{task_name(t)} {v}" for t, v in m["task_versions"].items()))
    lines.append(f"- seed: {m.get('seed', DASH)}; program: {m.get('commit') or 'no checkout'}")
    lines.append("- packages at the start: " + ", ".join(f"{k} {v}" for k, v in m["packages"].items()))
    made = {key: ", ".join(versions) for key, versions in results.versions.items() if not key.startswith("definition")}
    if made:
        lines.append("- scores made with: " + one_line(", ".join(f"{key} {text}" for key, text in made.items())))
    for key, other in (("from_training", "the trainer"), ("from_transformers", "transformers")):
        if apart := [(d, i) for (i, _), cell in results.cells.items() if (d := cell.get(key)) is not None]:
            lines.append(
                f"- log-likelihoods of a few rows, by the engine and by {other}: at most {max(apart)[0]:.2g} nats per "
                f"token apart, compared in {len({i for _, i in apart})} of {len(run.stages)} stages"
            )
    lines += _settings("evaluation", (c["settings"] for c in results.cells_of(run.tasks).values()))
    for name in [*SUITES, *JUDGED]:
        cells = results.cells_of([name]).values()
        lines += _settings(name, ({"version": c["version"], **c["settings"]} for c in cells))
    config = ", ".join(f"{k}={v}" for k, v in m["config"].items() if k != "tasks" and v is not None)
    yield "## Provenance\n\n" + "\n".join([*lines, f"- configuration: `{config}`"])


def _settings(name: str, settings: Iterable[dict[str, Any]]) -> list[str]:
    return [f"- {name}: `{text}`" for text in sorted({json.dumps(s, sort_keys=True) for s in settings})]


def scores_csv(results: Results) -> str:
    """All scores, a line each."""
    columns, rows = ("stage", "task", "metric", "value", "stderr", "n", "n_unscored", "low", "high"), []
    for (index, name), cell in results.cells.items():
        for metric, score in cell["metrics"].items():
            numbers = [score["value"], score["stderr"], cell["n"], cell.get("n_unscored", 0)]
            ends = results.intervals.get((index, name, metric), (None, None))
            rows.append([results.run.stages[index].name, name, metric, *numbers, *ends])
    rows += [*transitions.scores(results), *choices.scores(results), *distance.scores(results)]
    return csv_text(columns, (dict(zip(columns, row, strict=True)) for row in rows))
