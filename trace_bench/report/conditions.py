"""What two runs have to share so that their scores can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trace_bench.judgements import KINDS
from trace_bench.report.results import Results
from trace_bench.run import Run
from trace_tasks.data import GROUPS

#: The base model of imported predictions if it was not named. Two such runs may have different models.
UNKNOWN_MODEL = "unknown"
#: Settings of the evaluation that change scores.
_MEASURED = ("test_rows", "max_prompt_length", "max_new_tokens", "chat_template", "chat_template_args")


def conditions(run: Run) -> dict[str, Any]:
    """What the scores of the matrices of two runs have to share to be compared."""
    m = run.manifest
    name, folder = m["model"]["name"], str(m["model"].get("path", "")).startswith("/")
    return {
        # The name of the folder only: the revision tells whether the files are the same, on whatever machine.
        "base model": Path(name).name if folder else name,
        "revision": m["model"].get("revision"),
        "tasks": sorted(m["tasks"]),
        "data": m["data"]["fingerprint"],
        "task versions": m["task_versions"],
        "task definitions": m.get("task_definitions"),
        **{key: m["config"].get(key) or None for key in _MEASURED},  # false is the same as not given
    }


def same_conditions(results: Results, other: Results) -> bool:
    """Whether the scores of two runs can be compared, row by row."""
    one, two = conditions(results.run), conditions(other.run)
    if "icl" in (results.run.manifest["method"], other.run.manifest["method"]):  # it allows longer prompts
        one["max_prompt_length"] = two["max_prompt_length"]
    if None in (one["task definitions"], two["task definitions"]):  # older runs did not record them
        one["task definitions"] = two["task definitions"]
    return one == two and one["base model"] != UNKNOWN_MODEL and not other_prompts(results) and not other_prompts(other)


def other_prompts(results: Results) -> list[str]:
    """The tasks of an import that were asked with unknown prompts, not the rows' own."""
    odd = {task for (_, task), cell in results.cells.items() if cell["settings"].get("prompts")}
    return [task for task in results.run.tasks if task in odd]


def delta_conditions(results: Results) -> dict[str, dict[str, Any]]:
    """What two runs have to share so that their deltas can be compared: name of the delta -> what -> value."""
    last, cells = results.run.stages[-1].index, results.cells
    suites = [suite for suite in GROUPS["general"] if (last, suite) in cells]
    names = ", ".join(suite.removeprefix("general_") for suite in suites)
    general: dict[str, Any] = {"general suites": names} if suites else {}
    for suite in suites:
        cell = cells[last, suite]
        general |= {f"data of {suite}": cell["settings"]["data"], f"rows of {suite}": cell["n"]}
        general[f"version of {suite}"] = cell["version"]
    found = {"general": general}
    for kind in KINDS:
        judged = {suite: numbers for (i, suite), numbers in results.judged[kind.name].items() if i == last}
        judges = sorted({json.dumps(numbers["settings"], sort_keys=True) for numbers in judged.values()})
        # One alias of an endpoint may stand for different models.
        models = {model for n in judged.values() for model in n.get("models", ()) if model != n["settings"]["judge"]}
        judges += [f"answered by {model}" for model in sorted(models)]
        of_kind: dict[str, Any] = {
            f"judge of {kind.name}": " and ".join(judges),
            f"answers judged for {kind.name}": {suite: numbers["direct"]["n"] for suite, numbers in judged.items()},
            **{f"data of {s}": cells[last, s]["settings"].get("data") for s in judged if (last, s) in cells},
        }
        found[kind.name] = of_kind if judged else {}
    return found
