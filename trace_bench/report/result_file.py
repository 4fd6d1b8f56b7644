"""result.json: the numbers of a run and the protocol that they were measured under, for a leaderboard from files.

A few KB that can be handed on: no samples, no paths of the machine, no settings but those that decide a score. Numbers
are fractions or in the unit of the tasks, as in all files; null = not known.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from trace_bench.metrics import Estimate
from trace_bench.report.conditions import UNKNOWN_MODEL, delta_conditions, other_prompts
from trace_bench.report.entry import SCORES, Entry
from trace_bench.report.results import Results
from trace_bench.report.tables import Unit
from trace_bench.run import Run
from trace_bench.text import one_line
from trace_tasks.data import CL_BENCHMARK, FOLDERS, REASONING
from trace_tasks.data.files import digest

#: What the file says it is. Another version is one that this program does not read.
FORMAT, VERSION = "trace-bench result", 1
FILE = "result.json"
#: A path of this machine in a JSON text, or in a JSON text within one, as a judge's settings are; and its last part.
_PATH = re.compile(r'"(?:/|~|\.\.?/|file:)[^"]*?([^"/\\]+)/?(?=\\?")')


def result(results: Results) -> dict[str, Any]:
    """What result.json of a run says: see `shapes.Result`."""
    run, entry = results.run, Entry(results.run.path.name, results)
    m, numbers = run.manifest, entry.numbers
    config = m["config"]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "run": entry.name,
        "method": m["method"],
        "trains": entry.texts["trains"],
        "seed": m.get("seed"),
        "date": m.get("date"),
        "protocol": protocol(results),
        "training": {
            "rows": config.get("train_rows"),
            "epochs": config.get("epochs") or config.get("num_train_epochs"),
            "learning_rate": config.get("learning_rate"),
            "minutes": _number(numbers["training min"]),
            "tokens": _number(numbers["trained tokens"]),
        },
        "unit": _unit(results.unit) if results.unit else None,
        "scores": {name: _estimate(score) for name in SCORES if not math.isnan((score := entry.scores[name]).value)},
        "measures": {},
        "delta_conditions": {
            name: digest(_without_paths(shared)) for name, shared in delta_conditions(results).items() if shared
        },
        "tasks": {task: _task(results, task) for task in run.tasks},
        "packages": dict(m["packages"]),
        "made_with": {
            key: ", ".join(found) for key, found in results.versions.items() if not key.startswith("definition of ")
        },
    }
    return _without_paths(one_line(content))


def _task(results: Results, task: str) -> dict[str, Any]:
    stage = results.final_stages[results.run.tasks.index(task)]
    cell = results.cells.get((stage, task), {})
    return {**_unit(results.units[task]), **_estimate(results.score(stage, task)), "n": cell.get("n")}


def _unit(unit: Unit) -> dict[str, Any]:
    return {"metric": unit.metric, "scale": unit.scale, "higher_is_better": unit.higher_is_better}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    ends = {"low": float(estimate.low), "high": float(estimate.high)} if not math.isnan(estimate.low) else {}
    return {"value": _number(estimate.value), **ends}


def protocol(results: Results) -> dict[str, Any]:
    """All that the scores of a run depend on beside its training: runs in which it is the same can be ranked."""
    run, m = results.run, results.run.manifest
    config = m["config"]
    settings = [cell["settings"] for cell in results.cells_of(run.tasks).values()]
    engines = {digest(s.get("engine") or {}): s.get("engine") or {} for s in settings}
    unknown: dict[str, Any] = {}
    if m["method"] == "imported":
        unknown = dict.fromkeys(("decoding", "answer limit", "prompt limit"), "unknown")
        if odd := other_prompts(results):
            unknown |= dict.fromkeys(("examples in the prompt", "chat template", "chat template arguments"), "unknown")
            unknown["prompts"] = f"not the rows' own of {', '.join(odd)}"
        if odd or m["model"]["name"] == UNKNOWN_MODEL:  # two of them need not be one
            cells = results.cells_of(run.tasks)
            unknown["predictions"] = digest(sorted([*cell, found.get("samples")] for cell, found in cells.items()))
    return {
        "base model": m["model"]["name"],
        "revision": m["model"].get("revision"),
        "data": _data(run),
        "tasks": ", ".join(run.tasks),
        "data of the tasks": dict(m["data"]["fingerprint"]),
        "versions of the tasks": {task: str(version) for task, version in m["task_versions"].items()},
        "definitions of the tasks": {t: digest(d) for t, d in (m.get("task_definitions") or {}).items()},
        "test rows": config.get("test_rows") or "all",
        "left out rows": digest({t: sorted(ids) for t, ids in run.left_out.items()}) if run.left_out else "none",
        "examples in the prompt": config.get("num_fewshot") or 0,
        "prompt limit": config.get("max_prompt_length"),
        "answer limit": config.get("max_new_tokens") or "as the tasks have it",
        "chat template": bool(config.get("chat_template")),
        "chat template arguments": config.get("chat_template_args") or {},
        "decoding": "greedy",
        "backend": ", ".join(sorted({s["backend"] for s in settings})),
        "engine": next(iter(engines.values())) if len(engines) == 1 else {"several": ", ".join(sorted(engines))},
        "bwt rule": "1/(T-1)",
        **unknown,
    }


def _data(run: Run) -> str:
    if run.manifest["data"]["demo"]:
        return "demo"
    if all(task in REASONING for task in run.tasks):
        return "TRACE, reasoning variant"
    if all(task in CL_BENCHMARK for task in run.tasks):
        return "CL_Benchmark"
    return "TRACE" if all(task in FOLDERS for task in run.tasks) else "tasks of one's own"


def _without_paths(content: Any) -> Any:
    """Of each text that is a path of this machine, such as a model's, the last part alone."""
    return json.loads(_PATH.sub(r'"\1', json.dumps(content, ensure_ascii=False)))
