"""Scores without the test rows that are trained on, as an audit of the data lists them.

trace-bench data audit SOURCE --output FILE.json
trace-bench report RUN --without-leaked FILE.json
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_bench import shapes
from trace_bench.metrics import standard_error
from trace_bench.run import Run, RunError, read_json
from trace_bench.text import word
from trace_tasks import data
from trace_tasks.data.audit import OTHER_VARIANT
from trace_tasks.errors import TraceError


def without_leaked(run: Run, file: Path) -> Run:
    """The run as seen without its leaked test rows: `report` then makes all scores from the other rows.

    Left out are the test rows whose prompt is in the training rows of the task, exactly or nearly, or in those of its
    other variant or of other tasks that the run trains on. All rows of the training file count, though a run may train
    on the first of them only. A near one that is no leak costs a row of precision; a leak that stays counts what was
    memorised.

    Raises:
        RunError: if the file is no audit, or one of other data than the run's.
    """
    known = {*data.FOLDERS, *data.REASONING, *data.CL_BENCHMARK}
    prints = {k: v for k, v in run.manifest["data"]["fingerprint"].items() if k in known}
    if not prints:
        raise RunError(f"{run.path} has no task that an audit covers, so no leaked rows can be left out.")
    try:
        found = read_json(file, shapes.Audit)
    except (OSError, TraceError) as e:
        raise RunError(
            f"{file} is not an audit ({e}). To make one: trace-bench data audit SOURCE --output {word(file)}"
        ) from e
    others = [task for task in prints if found["tasks"].get(task, {}).get("fingerprint") != prints[task]]
    if others:
        source = run.manifest["data"]["cl_benchmark" if others[0] in data.CL_BENCHMARK else "path"]
        raise RunError(
            f"{file} is an audit of {found['source']}, but {run.path} has different data in: {', '.join(others)}. "
            f"Audit the run's data: trace-bench data audit {word(source)} --output {word(file)}"
        )
    left_out = {}
    for task in prints:
        rows = found["leaked"][task]
        other_variant = rows["other_variant"] if OTHER_VARIANT.get(task) in run.tasks else []
        tasks = rows.get("other_tasks", {})  # older audits have none
        of_other_tasks = [row for other in tasks if other in run.tasks for row in tasks[other]]
        left_out[task] = {*rows["exact"], *rows["near"], *other_variant, *of_other_tasks}
    return replace(run, left_out=left_out)


def without_rows(cell: dict[str, Any], samples: Iterable[dict[str, Any]], left_out: Collection[int]) -> dict[str, Any]:
    """A cell of the matrix made again from its samples without some of them, by their `doc_id`.

    It has "n_left_out" in addition to the "n" rows that count. Without any of these, its values are None; so is that of
    a metric whose rows are no numbers, such as BLEU's.
    """
    rows = [row for row in samples if row["doc_id"] not in left_out]
    metrics = {}
    for name in cell["metrics"]:
        values = [row[name] for row in rows]
        known = values and all(isinstance(value, int | float) for value in values)
        metrics[name] = {"value": sum(values) / len(values) if known else None, "stderr": standard_error(values)}
    return cell | {"n": len(rows), "n_left_out": cell["n"] - len(rows), "metrics": metrics}
