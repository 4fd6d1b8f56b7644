"""The names of the benchmark: tasks and their folders, orders of training, suites, and sets to be judged."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from trace_tasks.errors import DataError, nearest, suggestion

#: The folder of the task YAMLs, for lm-eval's --include_path.
TASKS_PATH = Path(__file__).parent.parent
SPLITS = ("train", "eval", "test")
#: lm-eval task -> folder of the official layout, in the paper's order 1 (section 4).
FOLDERS = {
    "trace_cstance": "C-STANCE",
    "trace_fomc": "FOMC",
    "trace_meetingbank": "MeetingBank",
    "trace_py150": "Py150",
    "trace_scienceqa": "ScienceQA",
    "trace_numglue_cm": "NumGLUE-cm",
    "trace_numglue_ds": "NumGLUE-ds",
    "trace_20minuten": "20Minuten",
}
#: The same tasks with reasoning (RCL, section 5 of the paper), from the reasoning variant of the data.
REASONING = {task.replace("trace_", "reasoning_"): folder for task, folder in FOLDERS.items()}
REASONING_FOLDER = "LLM-CL-Benchmark_Reasoning"
#: The alignment set's folder in the official layout.
LIMA = "Lima"
#: The papers' orders of the tasks. A config can name them (`tasks: order2`).
ORDERS = {
    "order1": list(FOLDERS),
    "order2": [
        *("trace_numglue_cm", "trace_numglue_ds", "trace_fomc", "trace_20minuten"),
        *("trace_cstance", "trace_py150", "trace_meetingbank", "trace_scienceqa"),
    ],
}
ORDERS |= {
    f"reasoning_{name}": [task.replace("trace_", "reasoning_") for task in tasks] for name, tasks in ORDERS.items()
}
#: The 15 sets of CL_Benchmark: lm-eval task -> folder, in order 4 of O-LoRA's paper (arXiv 2310.14152, appendix).
CL_BENCHMARK = {
    "cl_mnli": "NLI/MNLI",
    "cl_cb": "NLI/CB",
    "cl_wic": "WiC/WiC",
    "cl_copa": "COPA/COPA",
    "cl_qqp": "QQP/QQP",
    "cl_boolqa": "BoolQA/BoolQA",
    "cl_rte": "NLI/RTE",
    "cl_imdb": "SC/IMDB",
    "cl_yelp": "SC/yelp",
    "cl_amazon": "SC/amazon",
    "cl_sst2": "SC/SST-2",
    "cl_dbpedia": "TC/dbpedia",
    "cl_agnews": "TC/agnews",
    "cl_multirc": "MultiRC/MultiRC",
    "cl_yahoo": "TC/yahoo",
}
CL_FOLDER = "CL_Benchmark"
#: O-LoRA's orders: 1 to 3 of the standard benchmark, 4 to 6 of all 15 sets.
ORDERS |= {
    "standard1": ["cl_dbpedia", "cl_amazon", "cl_yahoo", "cl_agnews"],
    "standard2": ["cl_dbpedia", "cl_amazon", "cl_agnews", "cl_yahoo"],
    "standard3": ["cl_yahoo", "cl_amazon", "cl_agnews", "cl_dbpedia"],
    "long4": list(CL_BENCHMARK),
    "long5": [
        *("cl_multirc", "cl_boolqa", "cl_wic", "cl_mnli", "cl_cb", "cl_copa", "cl_qqp", "cl_rte", "cl_imdb"),
        *("cl_sst2", "cl_dbpedia", "cl_agnews", "cl_yelp", "cl_amazon", "cl_yahoo"),
    ],
    "long6": [
        *("cl_yelp", "cl_amazon", "cl_mnli", "cl_cb", "cl_copa", "cl_qqp", "cl_rte", "cl_imdb", "cl_sst2"),
        *("cl_dbpedia", "cl_agnews", "cl_yahoo", "cl_multirc", "cl_boolqa", "cl_wic"),
    ],
}
#: General ability (section 3.3): suite -> folder below GENERAL_DATA. None = only on the hub, none of the paper's six.
SUITES: dict[str, str | None] = {f"general_{s}": s for s in ("mmlu", "gsm8k", "bbh", "tydiqa", "boolq", "piqa")}
SUITES["general_ifeval"] = None
#: Prompts whose answers a judge compares: task -> folder below INSTRUCT_DATA or SAFETY_DATA.
JUDGED = {
    "instruct_self_instruct": "self-instruct",
    "instruct_lima": "LIMA",
    "instruct_koala": "Koala",
    "instruct_alpaca": "Alpaca",
    "instruct_openassistant": "OpenAssistant",
    "safety_cona": "CoNa",
    "safety_controversial": "Controversial",
    "safety_malicious": "Malicious",
    "safety_physical": "PhysicalSafetyUnsafe",
}
#: Names of groups of suites or sets in a config.
GROUPS = {
    "general": [suite for suite, folder in SUITES.items() if folder],
    **{kind: [task for task in JUDGED if task.startswith(kind)] for kind in ("instruct", "safety")},
}


def split_names(given: str | Iterable[str]) -> list[str]:
    """Splits a list of names, given as one text or several, at spaces and commas."""
    return " ".join([given] if isinstance(given, str) else given).replace(",", " ").split()


def expand_orders(names: Iterable[str]) -> list[str]:
    """Replaces orders by their tasks.

    Raises:
        DataError: for a name that looks like an order and can be no task, since there are no tasks of the user's own.
    """
    names, known = list(names), [*ORDERS, *FOLDERS, *REASONING, *CL_BENCHMARK]
    for name in names:
        if name not in known and nearest(name, known) in ORDERS and not os.environ.get("TRACE_TASKS"):
            raise DataError(f"There is no order {name}: use {', '.join(ORDERS)}.{suggestion(name, ORDERS)}")
    return [task for name in names for task in ORDERS.get(name, [name])]


def expand(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Replaces groups by their members and checks the names; `known` is `SUITES` or `JUDGED`.

    Raises:
        DataError: for an unknown name.
    """
    known = list(known)
    groups = {group: members for group, members in GROUPS.items() if set(members) <= set(known)}
    expanded = list(dict.fromkeys(member for name in names for member in groups.get(name, [name])))
    unknown = [name for name in expanded if name not in known]
    if unknown:
        raise DataError(
            f"Unknown name {', '.join(unknown)}: use {', '.join(known)}, or a group ({', '.join(groups)})."
            + "".join(suggestion(name, [*known, *groups]) for name in unknown)
        )
    return expanded


def needs_data(tasks: Iterable[str]) -> bool:
    """Whether any of the tasks reads its rows from TRACE_DATA."""
    return bool(set(tasks) & (FOLDERS.keys() | REASONING.keys()))


def task_variant(task: str) -> str:
    """The variant of the data from which a TRACE task takes its rows: "plain" or "reasoning"."""
    return "reasoning" if task in REASONING else "plain"


def task_name(task: str) -> str:
    """The paper's name of a task, with (R) for a task with reasoning. Other tasks keep their own name."""
    return f"{REASONING[task]} (R)" if task in REASONING else FOLDERS.get(task, task)
