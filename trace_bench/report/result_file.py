"""result.json: the numbers of a run and the protocol under which they were measured, for a leaderboard.

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
from trace_bench.text import one_line
from trace_tasks.data import CL_BENCHMARK, FOLDERS, REASONING
from trace_tasks.data.files import digest

#: What the file says it is. Another version is one that this program does not read.
FORMAT, VERSION = "trace-bench result", 1
FILE = "result.json"
#: What the data is called that all tasks of a run are from.
_DATA = {"TRACE, reasoning variant": REASONING, "CL_Benchmark": CL_BENCHMARK, "TRACE": FOLDERS}
#: A path of this machine in a JSON text, or in a JSON text within one, as a judge's settings are; and its last part.
_PATH = re.compile(r'"(?:/|~|\.\.?/|file:)(?:[^"/\\]*+[/\\])*?([^"/\\]++)/?(?=\\?")')


def result(results: Results) -> dict[str, Any]:
    """The content of a run's result.json: see `shapes.Result`."""
    run, entry = results.run, Entry(results.run.path.name, results)
    m, config, numbers = run.manifest, run.manifest["config"], entry.numbers
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
            # A number of steps goes before them.
            **(
                {"max_steps": config["max_steps"]}
                if config.get("max_steps", -1) > 0
                else {"epochs": config.get("epochs") or config.get("num_train_epochs")}
            ),
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
        "tasks": {
            task: {
                **_unit(results.units[task]),
                **_estimate(results.score(stage, task)),
                "n": results.cells.get((stage, task), {}).get("n"),
            }
            for stage, task in zip(results.final_stages, run.tasks, strict=True)
        },
        "packages": dict(m["packages"]),
        "made_with": {
            key: ", ".join(found) for key, found in results.versions.items() if not key.startswith("definition of ")
        },
    }
    return _without_paths(one_line(content))


def _unit(unit: Unit) -> dict[str, Any]:
    return {"metric": unit.metric, "scale": unit.scale, "higher_is_better": unit.higher_is_better}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    ends = {"low": float(estimate.low), "high": float(estimate.high)} if not math.isnan(estimate.low) else {}
    return {"value": _number(estimate.value), **ends}


def protocol(results: Results) -> dict[str, Any]:
    """All that a run's scores depend on, other than its training: runs with the same protocol can be ranked."""
    run, m, config = results.run, results.run.manifest, results.run.manifest["config"]
    cells = results.cells_of(run.tasks)
    settings = [cell["settings"] for cell in cells.values()]
    engines = {digest(s.get("engine") or {}): s.get("engine") or {} for s in settings}
    data = next((name for name, tasks in _DATA.items() if {*run.tasks} <= {*tasks}), "tasks of one's own")
    unknown: dict[str, Any] = {}
    if m["method"] == "imported":
        unknown = dict.fromkeys(("decoding", "answer limit", "prompt limit"), "unknown")
        if odd := other_prompts(results):
            unknown |= dict.fromkeys(("examples in the prompt", "chat template", "chat template arguments"), "unknown")
            unknown["prompts"] = f"not the rows' own of {', '.join(odd)}"
        if odd or m["model"]["name"] == UNKNOWN_MODEL:  # two of them need not be one
            unknown["predictions"] = digest(sorted([*cell, found.get("samples")] for cell, found in cells.items()))
    return {
        "base model": m["model"]["name"],
        "revision": m["model"].get("revision"),
        "data": "demo" if m["data"]["demo"] else data,
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


def _without_paths(content: Any) -> Any:
    """Of each text that is a path of this machine, such as a model's, the last part alone."""
    return json.loads(_PATH.sub(r'"\1', json.dumps(content, ensure_ascii=False)))
