"""What the paper reports for a method, with the set-up it was measured in: for orientation beside runs made here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trace_bench.metrics import general_ability_delta
from trace_bench.report.tables import DASH, Table, number
from trace_bench.run import Run
from trace_tasks.data import ORDERS

SETUP = (
    "TRACE, arXiv 2310.06762, tables 1 and 3: order 1, sampling at temperature 0.1, general ability with OpenCompass, "
    "GPT-4 as the judge. For orientation: with another model, other data or fewer rows the numbers are no target."
)
#: (method, what is trained) of a run -> the paper's name; None = whatever is trained.
_NAMES = {
    ("sequential", "full"): "SeqFT",
    ("sequential", "lora"): "LoraSeqFT",
    ("replay", "full"): "Replay",
    ("icl", None): "ICL-6shot",
    ("rcl", None): "RCL-0.5k",
    ("olora", None): "O-LoRA",
    ("pp", None): "PP",
    ("single", None): "SingleFT",
    ("joint", None): "MT",
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
    method = run.manifest["method"]
    if run.tasks not in ORDERS.values():
        return None
    return _NAMES.get((method, run.manifest.get("trains"))) or _NAMES.get((method, None))


def table(names: Iterable[str]) -> Table:
    """The paper's numbers for methods, by its own names; percent.

    Instruction following and safety are net win rates (win - lose) against the base model. The general-ability delta
    is computed from the printed scores, since two of the printed deltas are misprints.
    """
    header = ["method", "model", "train rows", "epochs", "OP", "BWT", "general", "instruction", "safety"]
    rows = [row for name in dict.fromkeys(names) for row in _rows(name)]
    return Table(header, rows, "The paper's numbers").without_empty_columns()


def _rows(name: str) -> Iterable[list[str]]:
    paper = json.loads((Path(__file__).parent / "paper_results.json").read_text(encoding="utf-8"))
    training = _TRAINING.get(name, (DASH, DASH))
    for model, results in paper["table1_percent"].items():
        if name in results:
            scores = [number(results[name]["OP"]), number(results[name].get("BWT"), sign=True)]
            yield [name, model, *training, *scores, *_deltas(paper, model, name)]
    if name in paper["table3_llama2_7b_percent"]:
        result = paper["table3_llama2_7b_percent"][name]
        lost = result["forgetting_printed"]  # BWT without its sign
        scores = [number(result["average"]), number(None if lost is None else -lost, sign=True)]
        yield [name, "LLaMA-2-7B-Chat", *training, *scores, DASH, DASH, DASH]


def _deltas(paper: dict[str, Any], model: str, name: str) -> list[str]:
    scores = paper["general_ability_percent"][model]
    suites = {m: {s: v for s, v in scores[m].items() if s != "delta_printed"} for m in scores}
    general = general_ability_delta(suites["base"], suites[name]) if name in suites else None
    judged = paper["judge_win_tie_lose_percent"] if model == "LLaMA-2-13B-Chat" else {}
    pairs = [judged.get(f"llama2_13b_{kind}", {}).get(name) for kind in ("instruction", "safety")]
    return [number(general, sign=True), *(number(p and p[0] - p[2], sign=True) for p in pairs)]
