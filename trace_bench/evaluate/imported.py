"""Makes a run of predictions that were made elsewhere: reads them, compares them with the data, and scores them.

Two kinds of files are read: `results-ROUND-NUMBER-TASK.json` of the official code (inference/infer_single.py of
https://github.com/BeyonderXX/TRACE), and `samples_TASK_DATE.jsonl` of `lm_eval --log_samples --output_path`. The scores
in the files are ignored: lm-eval scores the predictions again, by asking an engine that returns them as its answers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import handle_non_serializable

from trace_bench.evaluate.cells import batches, circumstances, evaluate_batch
from trace_bench.evaluate.external import tasks_record
from trace_bench.evaluate.plan import Plan
from trace_bench.evaluate.tasks import Tasks, prepare
from trace_bench.run import Run, RunError, Stage, is_file_name
from trace_bench.tasks import kept_variable, load_tasks
from trace_bench.waiting import locked
from trace_tasks import data
from trace_tasks.data import DataError, reading
from trace_tasks.data.files import digest, fingerprint, write_json
from trace_tasks.utils import SENTENCE

#: The name of the stage before the first training.
BASE = "base"
_OFFICIAL = re.compile(r"results-(\d+)-(\d+)-(.+)\.json")
_SAMPLES = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.:-]+\.jsonl")


@dataclass(frozen=True)
class Predictions:
    """The answers to the test rows of a task, by one model."""

    file: Path
    rows: list[dict[str, Any]]
    """The rows of the file, in the order of the data."""
    answers: list[str]
    asked_otherwise: bool = False
    """Whether the prompts were not the rows' own: a chat template, or demonstrations."""
    demonstrated: bool = False
    """Whether the prompts had demonstrations."""


#: Name of a stage -> task -> its predictions.
Stages = dict[str, dict[str, Predictions]]


def import_run(
    path: str | Path,
    stages: Stages,
    tasks: Sequence[str],
    *,
    model: str = "unknown",
    data_path: str | None = None,
) -> Run:
    """Makes a run of predictions. The stages are in the order of training; the one called base is before all of it.

    The rows are those of `data_path`, or TRACE_DATA. Where neither is given, the rows of the files are taken for the
    data, and the manifest says that they were not compared.

    Raises:
        DataError: if the rows of a file are not those of the data, or of the other files.
        RunError: if the folder holds another run.
    """
    if odd := [name for name in stages if not is_file_name(name)]:
        raise RunError(
            f"--samples {odd[0]}=...: the name becomes a folder, so it cannot contain '/' or begin with '.'."
        )
    if unknown := [name for name in {t for found in stages.values() for t in found} if name not in tasks]:
        raise DataError(
            f"There are predictions for {', '.join(sorted(unknown))}. Add them to --tasks, or remove the files."
        )
    with _rows_of(stages, tasks, data_path) as (source, compared):
        loaded = load_tasks(tasks)
        record = tasks_record(path, loaded, source)
        for found in stages.values():
            for name, predictions in found.items():
                _compare(name, predictions, loaded[name], compared)
        if not compared:
            record["data"] |= {"path": None}
        kinds = " and ".join(sorted({_kind(p.file) for found in stages.values() for p in found.values()}))
        how = "" if compared else "; their prompts and labels were not compared with TRACE's data (no TRACE_DATA)"
        limit = _limit(stages, loaded)
        settings = {name: _settings(name, limit, stages) for name in tasks}
        manifest = {
            "method": "imported",
            "answers_only": f"imported from {kinds}{how}",
            "model": {"name": model, "revision": None},
            **record,
            "config": {"test_rows": limit},
            "checkpoints": {name: _place(found) for name, found in stages.items() if name != BASE},
        }
        run = Run.create(path, manifest, restart=True)
        _refuse_left(run, stages)
        plan = Plan(run, dict(run.manifest["config"]), {}, {}, settings, {}, {})
        _score(plan, prepare(plan, loaded, record["task_definitions"]), stages)
    return run


def _named(run: Run, stages: Stages) -> Iterator[tuple[Stage, dict[str, Predictions]]]:
    """The stages of the run with their predictions."""
    names = [BASE, *(name for name in stages if name != BASE)]
    yield from zip(run.stages, (stages.get(name, {}) for name in names), strict=True)


def _refuse_left(run: Run, stages: Stages) -> None:
    """Refuses an import without some of the stages or tasks that an earlier one had, whose scores would stay."""
    for stage, found in _named(run, stages):
        for name in run.tasks:
            if name not in found and stage.eval_file(name).exists():
                raise RunError(
                    f"{stage.eval_file(name)} was imported before, but now there are no predictions for {name} at this "
                    "stage. Import into a new folder, or delete this file."
                )


def _score(plan: Plan, tasks: Tasks, stages: Stages) -> None:
    """Makes the cells of all stages."""
    for stage, found in _named(plan.run, stages):
        weights = digest([[task, fingerprint(p.file)] for task, p in sorted(found.items())])
        made = {"checkpoint": weights if stage.index else None, **circumstances(plan, None)}
        lm = _Answers({task: predictions.answers for task, predictions in found.items()})
        with locked(stage.path, "evaluate"):
            for batch in batches(plan, tasks, list(found)):
                evaluate_batch(plan, tasks, lm, stage, batch, made)


@contextmanager
def _rows_of(stages: Stages, tasks: Sequence[str], source: str | None) -> Iterator[tuple[data.Data, bool]]:
    """The rows that the tasks read within the block, and whether they are data rather than those of the files."""
    if source or os.environ.get("TRACE_DATA") or not data.needs_data(tasks):
        rows = data.open_data(tasks, source)
        rows.use()
        rows.check(["test"])
        yield rows, True
        return
    if reasoning := sorted(set(tasks) & data.REASONING.keys()):
        raise DataError(f"{', '.join(reasoning)}: the import needs their rows. Set TRACE_DATA and TRACE_REASONING.")
    there = {name for found in stages.values() for name in found}
    if lacking := sorted((set(tasks) & data.FOLDERS.keys()) - there):
        raise DataError(
            f"{', '.join(lacking)}: there are no predictions, so the import needs the rows. Set TRACE_DATA, or leave "
            "the task out of --tasks."
        )
    with TemporaryDirectory() as folder, kept_variable("TRACE_DATA"):
        for name in set(tasks) & data.FOLDERS.keys():
            longest = max((found[name] for found in stages.values() if name in found), key=lambda p: len(p.rows))
            write_json(Path(folder) / data.FOLDERS[name] / "test.json", longest.rows)
        rows = data.Data.at(Path(folder), tasks)
        rows.check(["test"])
        os.environ["TRACE_DATA"] = folder
        yield rows, False


def _compare(name: str, predictions: Predictions, task: Any, compared: bool) -> None:
    """Refuses predictions for other rows than those of the data, and those that cannot be scored from them."""
    file, rows, docs = predictions.file, predictions.rows, list(task.eval_docs)
    where = "the data has" if compared else "the longest file of the task has"
    if predictions.demonstrated and "sari" in task.aggregation():
        raise DataError(
            f"{file} has prompts with demonstrations. SARI of {name} needs the prompt without them, so it cannot be "
            "scored. Name only the other tasks with --tasks."
        )
    if len(rows) > len(docs):
        raise DataError(
            f"{file} has {len(rows)} rows, but {where} {len(docs)} of {name}: it was made from different data."
        )
    docs = json.loads(json.dumps(docs[: len(rows)], default=handle_non_serializable))
    other = [i for i, (row, doc) in enumerate(zip(rows, docs, strict=True)) if row != doc]
    if other:
        row, doc = rows[other[0]], docs[other[0]]
        key = next(k for k in [*doc, *row] if row.get(k) != doc.get(k))
        raise DataError(
            f"{file}, row {other[0]}{f' and {len(other) - 1} more' if other[1:] else ''}: its {key} is "
            f"{row.get(key)!r:.80}, but {where} {doc.get(key)!r:.80}. Name the data that it was made from "
            "(--data or TRACE_DATA)."
        )


def _limit(stages: Stages, loaded: Mapping[str, Any]) -> int | None:
    """The first so many rows of each task that the predictions are for; None = all.

    Raises:
        DataError: if some are for fewer: no change could be measured between them.
    """
    every = [(name, p) for found in stages.values() for name, p in found.items()]
    limit = max((len(p.rows) for name, p in every if len(p.rows) < len(loaded[name].eval_docs)), default=None)
    for name, p in every:
        expected = min(len(loaded[name].eval_docs), limit or len(p.rows))
        if len(p.rows) != expected:
            raise DataError(
                f"{p.file} has {len(p.rows)} rows of {name}, but other files have {expected}, and all models need the "
                "same rows. Make it again with the same limit, or leave it out."
            )
    return limit


def _settings(name: str, limit: int | None, stages: Stages) -> dict[str, Any]:
    """The settings of a task's cells, as far as files say them."""
    asked = {found[name].asked_otherwise: found[name].file for found in stages.values() if name in found}
    if len(asked) > 1:
        raise DataError(
            f"{asked[True]} has changed prompts (a chat template or demonstrations), but {asked[False]} has not, so "
            "their scores cannot be compared. Make one of them again."
        )
    return {"backend": "imported", "test_rows": limit, **({"prompts": "not the rows' own"} if True in asked else {})}


def _place(found: dict[str, Predictions]) -> str:
    """The folder of the predictions of a stage; "nowhere" if there are none."""
    return next((str(p.file.parent.absolute()) for p in found.values()), "nowhere")


def _kind(file: Path) -> str:
    return "the official code's results" if _OFFICIAL.fullmatch(file.name) else "lm-eval's samples"


class _Answers(LM):
    """Stands in for an engine, and answers with the predictions of a stage."""

    def __init__(self, answers: Mapping[str, list[str]]) -> None:
        super().__init__()
        self.answers, self.served = answers, {"weights": "none"}
        self.unfinished: set[str] = set()

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self.answers[request.task_name][request.doc_id] for request in requests]

    def counts(self, rows: Any, answer_tokens: int) -> dict[str, int]:
        """Nobody knows which prompts were cut, and which answers."""
        return {}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


# --------------------------------------------------------------------------------------------------------------- files


def read_official(folder: Path) -> tuple[Stages, list[str]]:
    """The files of the official code in a folder: the stages, called by their tasks, and the order of the tasks.

    Raises:
        DataError: if there are none, one cannot be read, or their numbers do not fit together.
    """
    found: dict[tuple[int, int, str], Path] = {}
    for file in _files(folder):
        if match := _OFFICIAL.fullmatch(file.name):
            key = int(match[1]), int(match[2]), match[3]
            if key in found:
                raise DataError(
                    f"{folder} has two files of round {key[0]} and task {key[2]}: {found[key]} and {file}. Name the "
                    "folder of one training."
                )
            found[key] = file
    if not found:
        raise DataError(f"{folder} has no file results-ROUND-NUMBER-TASK.json of the official code.")
    names = {folder: task for task, folder in data.FOLDERS.items()}
    if unknown := sorted({task for _, _, task in found} - names.keys()):
        raise DataError(f"{folder} has results of {', '.join(unknown)}, but TRACE's tasks are {', '.join(names)}.")
    numbered = sorted({(number, task) for _, number, task in found})
    order = [names[task] for _, task in numbered]
    if [number for number, _ in numbered] != list(range(len(numbered))) or len(set(order)) < len(order):
        listed = ", ".join(f"{number} {task}" for number, task in numbered)
        raise DataError(f"{folder}: the files have {listed}, but each task needs one number, from 0 without a gap.")
    if beyond := sorted({r for r, _, _ in found if r >= len(order)}):
        raise DataError(f"{folder} has the rounds {beyond}, but {len(order)} tasks have rounds 0 to {len(order) - 1}.")
    stages: Stages = {name: {} for name in order}
    for (round_, _, task), file in found.items():
        stages[order[round_]][names[task]] = _official_file(file)
    return stages, order


def _official_file(file: Path) -> Predictions:
    try:
        content = json.loads(reading.read_file(file, reading.MOST_LINES))
        columns = [content[key] for key in ("prompts", "labels", "results")]
        for column in columns:
            reading.check(list[str], column)
        triples = list(zip(*columns, strict=True))
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(
            f"{file} is not a file of the official code: it needs prompts, labels and results ({e})."
        ) from e
    if not triples:
        raise DataError(f"{file} has no rows.")
    rows = [{"prompt": prompt, "answer": label} for prompt, label, _ in triples]
    return Predictions(file, rows, [answer for _, _, answer in triples])


def read_samples(folder: Path, only: Sequence[str] | None = None) -> dict[str, Predictions]:
    """The files of `lm_eval --log_samples` in a folder or below it, by task; `only` these tasks.

    Raises:
        DataError: if there are none, two of a task, or one cannot be read.
    """
    found: dict[str, Path] = {}
    for file in _files(folder):
        match = _SAMPLES.fullmatch(file.name)
        if match and (only is None or match[1] in only):
            if match[1] in found:
                raise DataError(f"{folder} has two files of {match[1]}: {found[match[1]]} and {file}. Remove one.")
            found[match[1]] = file
    if not found:
        of = f" of {', '.join(only)}" if only else ""
        raise DataError(f"{folder} has no file samples_TASK_DATE.jsonl{of}: lm_eval writes it with --log_samples.")
    return {name: _samples_file(file) for name, file in found.items()}


def _samples_file(file: Path) -> Predictions:
    lines: dict[int, tuple[dict[str, Any], str, Any]] = {}
    used = None
    for number, text in enumerate(reading.read_file(file, reading.MOST_LINES).split(b"\n"), 1):
        if not text:
            continue
        try:
            line = json.loads(text)
            used = used or line["filter"]
            if line["filter"] != used:
                continue  # each row is there once for every filter of the task
            [[answer]] = line["resps"]
            reading.check(str, answer)
            reading.check(dict[str, Any], line["doc"])
            if line["doc_id"] in lines:
                raise ValueError(f"the row {line['doc_id']} is there twice")
            asked = line["arguments"]["gen_args_0"]["arg_0"]
            lines[line["doc_id"]] = line["doc"], answer, asked
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise DataError(f"{file}, line {number} is not a generated answer that lm_eval logged: {e}.") from e
    if sorted(lines) != list(range(len(lines))):
        raise DataError(
            f"{file} must have the first {len(lines)} rows of its task, but has rows {sorted(lines)[:5]} ...."
        )
    rows = [lines[i] for i in range(len(lines))]
    return Predictions(
        file,
        [doc for doc, _, _ in rows],
        [answer for _, answer, _ in rows],
        asked_otherwise=any(doc.get("prompt", asked) != asked for doc, _, asked in rows),
        demonstrated=any(SENTENCE.partition("\n")[0] in str(asked) for _, _, asked in rows),  # a chat may be JSON
    )


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    return sorted(file for file in folder.rglob("*") if file.is_file())
