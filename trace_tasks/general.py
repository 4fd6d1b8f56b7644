"""The general-ability suites: lm-eval's own tasks, from the hub or from a local copy of their data.

`general_*.yaml` group lm-eval's tasks in the paper's settings and give them the class below. The class changes one
thing: if GENERAL_DATA is set, the rows come from that folder. Prompts, shots, filters and metrics are lm-eval's.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from trace_tasks.data import DataError, general_folder
from trace_tasks.own_rows import OwnRows

Splits = dict[str, Dataset]


class Suite(OwnRows):
    """A task of lm-eval whose rows may come from GENERAL_DATA. Nothing else differs."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Loads the rows from GENERAL_DATA if it is set and `_LOCAL` has a reader for the suite, else from the hub.

        Raises:
            DataError: if the local copy is incomplete, or there is none and the hub cannot be reached.
        """
        suite, read = _LOCAL.get(self.DATASET_PATH or "", (None, None))
        folder = general_folder(suite) if suite else None
        if folder is not None and read is not None:
            try:
                self.dataset = read(folder, self.DATASET_NAME or "")
            except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError, csv.Error) as e:
                raise DataError(
                    f"{folder} does not have the layout of trace_tasks/README.md, so {self.config.task} cannot read "
                    f"it: {type(e).__name__}: {e}"
                ) from e
            return
        try:
            super().download(dataset_kwargs, **kwargs)
        except (ConnectionError, FileNotFoundError) as e:
            hint = (
                f"GENERAL_DATA=FOLDER with {suite}/ in it"
                if suite
                else "a machine with a network: the suite is online only"
            )
            raise DataError(
                f"{self.config.task}: {self.DATASET_PATH} cannot be loaded from the hub ({type(e).__name__}). Check "
                f"the connection and HF_HUB_OFFLINE, or use {hint} (trace_tasks/README.md)."
            ) from e


def _gsm8k(folder: Path, _: str) -> Splits:
    return {split: Dataset.from_list(_json_lines(folder / f"{split}.jsonl")) for split in ("train", "test")}


def _mmlu(folder: Path, subject: str) -> Splits:
    """Reads the original CSV files, which have no header: question, four choices, letter."""
    splits = {}
    for split in ("dev", "test"):
        file = folder / split / f"{subject}_{split}.csv"
        rows = []
        for i, fields in enumerate(csv.reader(io.StringIO(_text(file), newline=""))):
            if len(fields) != 6 or fields[5] not in tuple("ABCD"):
                raise DataError(f"{file}, row {i}: expected a question, four choices and A, B, C or D; found {fields}.")
            rows.append(
                {"question": fields[0], "subject": subject, "choices": fields[1:5], "answer": "ABCD".index(fields[5])}
            )
        splits[split] = Dataset.from_list(rows)
    return splits


def _bbh(folder: Path, task: str) -> Splits:
    rows = _json(folder / f"{task}.json")["examples"]
    return {"test": Dataset.from_list([{"input": row["input"], "target": row["target"]} for row in rows])}


@lru_cache(maxsize=1)  # each of the nine tasks takes its language from the same files
def _tydiqa(folder: Path, _: str) -> Splits:
    """Reads GoldP in SQuAD's form, one file per language. The few-shot rows serve as the training split."""
    splits = {}
    for split, name in (("train", "fewshot"), ("validation", "dev")):
        files = sorted((folder / name).glob("*.json"))
        if not files:
            raise DataError(f"{folder / name} has no file LANGUAGE.json.")
        rows = []
        for article in (a for file in files for a in _json(file)["data"]):
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = {key: [a[key] for a in qa["answers"]] for key in ("text", "answer_start")}
                    row = {"id": qa["id"], "title": article.get("title", ""), "context": paragraph["context"]}
                    rows.append({**row, "question": qa["question"], "answers": answers})
        splits[split] = Dataset.from_list(rows)
    return splits


def _boolq(folder: Path, _: str) -> Splits:
    splits = {"train": _json_lines(folder / "train.jsonl"), "validation": _json_lines(folder / "val.jsonl")}
    return {k: Dataset.from_list([{**row, "label": int(row["label"])} for row in v]) for k, v in splits.items()}


def _piqa(folder: Path, _: str) -> Splits:
    """Reads rows and labels from their two files. The few-shot rows serve as the training split."""
    splits = {}
    for split, name in (("train", "fewshot"), ("validation", "valid")):
        rows, labels = _json_lines(folder / f"{name}.jsonl"), _text(folder / f"{name}-labels.lst").split()
        if len(rows) != len(labels):
            raise DataError(
                f"{folder}/{name}.jsonl has {len(rows)} rows, but {name}-labels.lst has {len(labels)} labels."
            )
        splits[split] = Dataset.from_list(
            [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]
        )
    return splits


#: lm-eval's dataset_path -> folder below GENERAL_DATA, and the function that reads it into the form of the hub.
_LOCAL: dict[str, tuple[str, Callable[[Path, str], Splits]]] = {
    "openai/gsm8k": ("gsm8k", _gsm8k),
    "cais/mmlu": ("mmlu", _mmlu),
    "SaylorTwift/bbh": ("bbh", _bbh),
    "google-research-datasets/tydiqa": ("tydiqa", _tydiqa),
    "aps/super_glue": ("boolq", _boolq),
    "baber/piqa": ("piqa", _piqa),
}


def _text(file: Path) -> str:
    try:  # not read_text, which would change line breaks within the CSVs
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError as e:
        raise DataError(f"{file} is missing. GENERAL_DATA needs the layout in trace_tasks/README.md.") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}.") from e


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except ValueError as e:
        raise DataError(f"{file} is not JSON: {e}.") from e


def _json_lines(file: Path) -> list[dict[str, Any]]:
    try:  # not splitlines, which also splits at characters that a JSON string may contain
        return [json.loads(line) for line in _text(file).split("\n") if line.strip()]
    except ValueError as e:
        raise DataError(f"{file} is not JSON, one object a line: {e}.") from e
