"""What the paper and later papers report for a method, with their set-ups, for orientation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trace_bench.metrics import general_ability_delta
from trace_bench.report.results import Results
from trace_bench.report.tables import DASH, Block, Table, number
from trace_bench.run import Run
from trace_bench.text import one_line
from trace_tasks.data import CL_BENCHMARK, FOLDERS, ORDERS

SETUP = (
    "TRACE, arXiv 2310.06762, tables 1 and 3: order 1, sampling at temperature 0.1, general ability with OpenCompass, "
    "GPT-4 as the judge. For orientation only: with a different model, different data or fewer rows the numbers differ."
)
#: Method of a run, and what is trained if it matters -> the paper's name, and how later papers begin theirs.
_NAMES: dict[str, tuple[str | None, str | None]] = {
    "sequential full": ("SeqFT", "SeqFT"),
    "sequential lora": ("LoraSeqFT", "SeqLoRA"),
    "replay full": ("Replay", "Replay"),
    "replay": (None, "Replay"),
    "olora": ("O-LoRA", "O-LoRA"),
    "icl": ("ICL-6shot", None),
    "rcl": ("RCL-0.5k", None),
    "pp": ("PP", None),
    "single": ("SingleFT", None),
    "joint": ("MT", None),
    "der": (None, "DER++"),
    "seekr": (None, "SEEKR"),
    "nlora": (None, "N-LoRA"),
    "milora": (None, "MiLoRA"),
    "osf": (None, "OSF"),
}
#: The paper's name -> training rows a task, epochs; of the others we do not know them.
_TRAINING = {
    "SeqFT": ("5000", "1,1,5,5,1,5,5,5"),
    "LoraSeqFT": ("5000", "5,3,7,5,3,5,5,7"),
    "Replay": ("5000", "1,1,5,5,1,5,5,5"),
    "RCL-0.5k": ("500", DASH),
}


def name_of(run: Run) -> str | None:
    """How the paper calls what a run does; None if it has no such method, or had other tasks or another order."""
    if run.tasks not in ORDERS.values() or set(run.tasks) & set(CL_BENCHMARK):
        return None
    return _names(run.manifest)[0]


def _names(manifest: Mapping[str, Any]) -> tuple[str | None, str | None]:
    method = manifest["method"]
    return _NAMES.get(f"{method} {manifest.get('trains')}") or _NAMES.get(method) or (None, None)


def table(names: Iterable[str]) -> Table:
    """The paper's numbers for methods, by its own names; percent.

    Instruction following and safety are net win rates against the base model. The general-ability delta is computed
    from the printed scores, since two of the printed deltas are misprints.
    """
    header = ["method", "model", "train rows", "epochs", "OP", "BWT", "general", "instruction", "safety"]
    rows = [row for name in dict.fromkeys(names) for row in _rows(name)]
    return Table(header, rows, "The paper's numbers").without_empty_columns()


def _facts(file: str) -> Any:
    return json.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))


def _rows(name: str) -> Iterable[list[str]]:
    paper = _facts("paper_results.json")
    training = _TRAINING.get(name, (DASH, DASH))
    for model, results in paper["table1_percent"].items():
        if name not in results:
            continue
        scores = [number(results[name]["OP"]), number(results[name].get("BWT"), sign=True)]
        suites = {
            m: {suite: score for suite, score in of_model.items() if suite != "delta_printed"}
            for m, of_model in paper["general_ability_percent"][model].items()
        }
        general = general_ability_delta(suites["base"], suites[name]) if name in suites else None
        judged = paper["judge_win_tie_lose_percent"] if model == "LLaMA-2-13B-Chat" else {}
        pairs = [judged.get(f"llama2_13b_{kind}", {}).get(name) for kind in ("instruction", "safety")]
        deltas = [general, *(p and p[0] - p[2] for p in pairs)]
        yield [name, model, *training, *scores, *(number(delta, sign=True) for delta in deltas)]
    if name in paper["table3_llama2_7b_percent"]:
        result = paper["table3_llama2_7b_percent"][name]
        lost = result["forgetting_printed"]  # BWT without its sign
        scores = [number(result["average"]), number(None if lost is None else -lost, sign=True)]
        yield [name, "LLaMA-2-7B-Chat", *training, *scores, DASH, DASH, DASH]


# ---------------------------------------------------------------------------------------------------- later papers

LATER = (
    "### What later papers print for this method\n\nIn percent, below this run. Only rows with yes have the same "
    "protocol; the others are for orientation, with their differences"
)


def published(results: Results) -> Iterable[Block]:
    """What later papers print for the run's method; nothing where they print nothing.

    Rows of another protocol are apart, with the reasons. Of a paper with the same protocol all methods are there.
    """
    if set(results.run.tasks) & set(CL_BENCHMARK):  # the numbers are TRACE's
        return
    m = one_line(results.run.manifest)
    name = _names(m)[1] or "none"
    same, apart = [], []
    for source in _facts("published_results.json")["sources"]:
        order = f", order {source['order'][-1]}" if source["order"] else ""
        place = f"{source['source']}, table {source['table']}{order}"
        for model, methods in source["models"].items():
            reasons = differences(results, source, model)
            for method, (op, bwt) in methods.items():
                row = [method, model, number(op), number(bwt, sign=True)]
                own = list(reasons)
                if source["training"].startswith("full") and m.get("trains") == "lora":
                    own.append("all parameters are trained there, LoRA here")
                if not own:
                    same.append([*row, "yes", place])
                elif not reasons or method.startswith(name):
                    apart.append((row, own, place))
    if not same and not apart:
        return
    common = [reason for reason in apart[0][1] if all(reason in own for _, own, _ in apart)] if apart else []
    yield LATER + (f". All of those differ in this: {'; '.join(common)}." if common else ".")
    rows = []
    for row, own, place in apart:
        rest = "; ".join(reason for reason in own if reason not in common)
        rows.append([*row, f"no: {rest}" if rest else "no", place])
    t = results.last_stage
    op, bwt = (100 * results.sequence[key][t - 1].value for key in ("OP", "BWT"))
    here = [f"this run ({m['method']})", m["model"]["name"], number(op), number(bwt, sign=True), DASH, DASH]
    header = ["method", "model", "OP", "BWT", "comparable", "printed in"]
    yield Table(header, [here, *same, *rows], apart=len(rows))


def differences(results: Results, source: dict[str, Any], model: str) -> list[str]:
    """What keeps a run from being comparable with a paper's results for a model: nothing where the protocol is one."""
    run = results.run
    manifest = one_line(run.manifest)
    config, order, here = manifest["config"], source["order"], manifest["model"]["name"]
    prefix = "reasoning_" if source["data"] == "reasoning" else ""
    there = FOLDERS if order is None else ORDERS[order]
    plain = [task.replace("reasoning_", "trace_", 1) for task in run.tasks]
    rows = {key: config.get(key) for key in ("train_rows", "test_rows")}
    limits = ", ".join(f"first {n} {key.replace('_', ' ')} here" for key, n in rows.items() if n)
    known = source["task_known_at_test"]
    reasons = {
        "demo data here": manifest["data"]["demo"],
        "the reasoning variant there": prefix and not any(task.startswith(prefix) for task in run.tasks),
        "the reasoning variant here": not prefix and any(task.startswith("reasoning_") for task in run.tasks),
        "500, 1000 or 5000 rows: not stated there": not prefix,
        f"{len(FOLDERS)} tasks there, {len(run.tasks)} here": sorted(plain) != sorted(FOLDERS),
        "order not stated there": order is None,
        f"order {(order or '')[-1:]} there": order and sorted(plain) == sorted(there) and plain != there,
        limits: limits,
        "without leaked rows here": run.left_out,
        f"{model} there, {here} here": _model_name(model) != _model_name(here),
        "a chat template here": config.get("chat_template"),
        f"task at test {known} there": known,
        "BWT's rule not stated there": source["bwt_rule"] is None,
        "decoding not stated there": source["decoding"] is None,
    }
    return [reason for reason, holds in reasons.items() if holds] + source["differs"]


def _model_name(name: str) -> str:
    """meta-llama/Llama-2-7b-chat-hf and LLaMA-2-7B-Chat are one model."""
    return re.sub(r"[^a-z0-9.]", "", name.lower().rpartition("/")[2].removeprefix("meta-").removesuffix("-hf"))
