"""The rows of CL_Benchmark, the 15 text classification sets that most papers on LoRA for continual learning use.

TRACE_CL_BENCHMARK names a folder in the layout of CL_Benchmark in https://github.com/cmnfriend/O-LoRA (arXiv
2310.14152): `<CATEGORY>/<SET>/{train,dev,test}.json`, each a list of {"sentence", "label"}, and `labels.json`, a list
of the options. Prompts are made as in O-LoRA's `src/uie_dataset_lora.py` and `src/uie_collator.py`, with the
instructions of `configs/instruction_config.json` and the options of all its scripts (`--add_task_name True
--add_dataset_name True`).
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from trace_tasks.data import demo
from trace_tasks.data.names import CL_BENCHMARK, CL_FOLDER, SPLITS
from trace_tasks.data.rows import Text, read_list, sift_rows
from trace_tasks.data.sources import demo_folder, find_data
from trace_tasks.errors import DataError

HOW_TO_GET_CL_BENCHMARK = """\
TRACE_CL_BENCHMARK says where the rows of cl_* are; use one of
  TRACE_CL_BENCHMARK=demo             small data made by this program, to try things; not comparable
  TRACE_CL_BENCHMARK=path/to/folder   the folder CL_Benchmark of https://github.com/cmnfriend/O-LoRA:
                                      <CATEGORY>/<SET>/{train,dev,test,labels}.json
`git clone https://github.com/cmnfriend/O-LoRA` gets it."""
#: Split -> the name of its file, without .json.
FILES = {"train": "train", "eval": "dev", "test": "test"}
_CHOOSE = "Choose one from the option.\n"
#: Category -> the text with which its prompts begin. COPA's sentences contain the question.
INSTRUCTIONS = {
    "NLI": f'What is the logical relationship between the "sentence 1" and the "sentence 2"? {_CHOOSE}',
    "QQP": f'Whether the "first sentence" and the "second sentence" have the same meaning? {_CHOOSE}',
    "SC": f"What is the sentiment of the following paragraph? {_CHOOSE}",
    "TC": f"What is the topic of the following paragraph? {_CHOOSE}",
    "BoolQA": f"According to the following passage, is the question true or false? {_CHOOSE}",
    "MultiRC": f"According to the following passage and question, is the candidate answer true or false? {_CHOOSE}",
    "WiC": f"Given a word and two sentences, whether the word is used with the same sense in both sentence? {_CHOOSE}",
}


@with_config(ConfigDict(extra="forbid"))
class Labelled(TypedDict):
    """A row of a set."""

    sentence: Text
    label: Text


def is_cl_benchmark(root: Path) -> bool:
    """Whether a folder contains any of the 15 sets."""
    return any((root / folder).is_dir() for folder in CL_BENCHMARK.values())


def find_cl_benchmark(source: str | None = None) -> Path:
    """The folder CL_Benchmark that `source` or TRACE_CL_BENCHMARK names, or the one in demo data.

    The name may be the folder itself, the folder above it, or "demo".

    Raises:
        DataError: if nothing is named, or there are no such sets.
    """
    named = source or os.environ.get("TRACE_CL_BENCHMARK")
    if named == "demo":
        return demo_folder() / CL_FOLDER
    if named:
        path = Path(named).expanduser().absolute()
    elif os.environ.get("TRACE_DATA") and demo.is_demo(find_data()):
        path = find_data()
    else:
        raise DataError(f"TRACE_CL_BENCHMARK is not set. {HOW_TO_GET_CL_BENCHMARK}")
    if found := [root for root in (path, path / CL_FOLDER) if is_cl_benchmark(root)]:
        return found[0]
    raise DataError(f"{path} has none of the folders {', '.join(CL_BENCHMARK.values())}.\n\n{HOW_TO_GET_CL_BENCHMARK}")


def options(folder: Path) -> list[str]:
    """The options of a set, in the order of its file.

    Raises:
        DataError: if the file is missing, or is no list of texts.
    """
    labels = read_list(folder / "labels.json")
    if not all(isinstance(label, str) and label.strip() for label in labels):
        raise DataError(f"{folder / 'labels.json'} holds something else than texts: {str(labels)[:80]}.")
    return labels


def frame(folder: Path) -> tuple[str, str]:
    """The texts that O-LoRA's code puts before and after a sentence of a set to ask for its label."""
    category, name = folder.parts[-2:]
    head = f"Task:{category}\nDataset:{name}\n"
    if instruction := INSTRUCTIONS.get(category):
        head += f"{instruction}Option: {', '.join(options(folder))} \n"
    return head, "\nAnswer:"


def read_file(folder: Path, split: str) -> tuple[dict[int, dict[str, str]], dict[int, str]]:
    """The good rows of a file as prompts and answers, and the problems of the bad rows, by row number.

    Raises:
        DataError: if the file or its `labels.json` is missing or no list.
    """
    head, tail = frame(folder)
    rows, bad = sift_rows(folder / f"{FILES[split]}.json", Labelled)
    return {i: {"prompt": head + r["sentence"] + tail, "answer": r["label"]} for i, r in rows.items()}, bad


def read_set(folder: str, root: Path | None = None) -> dict[str, list[dict[str, str]]]:
    """The prompts and answers of a set, such as TC/agnews: existing split -> rows.

    Raises:
        DataError: if the test rows or the options are missing, or naming the file and the first bad row.
    """
    place = (find_cl_benchmark() if root is None else root) / folder
    splits = {}
    for split in SPLITS:
        file = place / f"{FILES[split]}.json"
        if split == "test" or file.is_file():
            rows, bad = read_file(place, split)
            for i, problem in bad.items():
                raise DataError(f"{file}, row {i}: {problem}")
            splits[split] = list(rows.values())
    return splits
