"""A task of one's own from a file of rows: its columns are recognised, and its YAML is written and tried."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trace_bench import tasks
from trace_tasks.data.files import write_jsonl, write_text
from trace_tasks.errors import DataError, brief

#: The end of a file's name -> the loader of `datasets`.
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PROMPTS = ("prompt", "question", "input", "text", "query")
ANSWERS = ("answer", "target", "output", "response", "completion", "label")
_MESSAGES = "{% for m in messages[:-1] %}{% if m.role != 'user' %}{{m.role}}: {% endif %}{{m.content}}\n{% endfor %}"
YAML = """\
# Made by `trace-bench task new {source}`; {why}.
task: {name}
dataset_path: {loader}
dataset_kwargs: {{data_files: {{train: {train}, test: {test}}}}}     # relative to this file
training_split: train
test_split: test
output_type: generate_until
doc_to_text: {prompt}
doc_to_target: {answer}
target_delimiter: ""                       # the prompt ends where the answer begins
generation_kwargs: {{until: {until}, max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]     # the first one is the headline
metadata: {{version: 1.0}}                   # a change that can move a score raises it
"""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file.

    Raises:
        DataError: if its format is not known, or it cannot be read.
    """
    if file.suffix not in FORMATS:
        raise DataError(f"{file}: rows are read from {', '.join(FORMATS)}.")
    if not file.is_file():
        raise DataError(f"There is no file {file}.")
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        rows = load_dataset(FORMATS[file.suffix], data_files=str(file), split="train").to_list()
    except Exception as e:  # whatever the readers say of a file
        raise DataError(f"{file} cannot be read as {FORMATS[file.suffix]}: {brief(e.__cause__ or e)}") from e
    if not rows:
        raise DataError(f"{file} has no rows.")
    return rows


def recognise(columns: Collection[str]) -> tuple[str, str, str]:
    """The templates of prompt and answer, and which columns they are made of.

    Raises:
        DataError: if the columns are none that are known.
    """
    if "messages" in columns:
        return f"{_MESSAGES}assistant:\n", "{{messages[-1].content}}", "messages, the last one is the answer"
    if {"instruction", "output"} <= set(columns):
        middle = "{% if input %}{{input}}\n{% endif %}" if "input" in columns else ""
        return "{{instruction}}\n" + middle, "output", "instruction and output"
    prompt = next((c for c in PROMPTS if c in columns), None)
    answer = next((c for c in ANSWERS if c in columns and c != prompt), None)
    if prompt is None or answer is None:
        raise DataError(
            f"The columns are {', '.join(columns)}. Known are messages; instruction and output; or one of "
            f"{', '.join(PROMPTS)} with one of {', '.join(ANSWERS)}. Rename yours, or write the YAML by hand "
            "(trace_tasks/README.md has an example)."
        )
    return "{{" + prompt + "}}\n", answer, f"{prompt} and {answer}"


def make_task(file: Path, test: Path | None = None, name: str | None = None) -> str:
    """Writes NAME.yaml beside a file of rows, and loads it as a run does.

    Args:
        file: The training rows.
        test: The test rows, in the same format; None keeps the last fifth of the rows apart (at least one).
        name: The task's name; None = that of the file.

    Returns:
        What was made, with three rows as the model sees them, and how to use it.

    Raises:
        DataError: naming the file, its columns or the row that cannot be used.
    """
    name = name or re.sub(r"\W+", "_", file.stem).strip("_")
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise DataError(f"{name!r} cannot be the name of a task: use letters, digits and '_' (--name).")
    target = file.parent / f"{name}.yaml"
    if target.exists():
        raise DataError(f"{target} is there already. Remove it to make it again, or give another --name.")
    rows = read_rows(file)
    prompt, answer, why = recognise(rows[0].keys())
    answers = [_answer(file, i, row, answer) for i, row in enumerate(rows)]
    made = [target]
    if test is None:
        train, test = _split(file, rows, name)
        made += [train, test]
    else:
        train = file
        if test.suffix != train.suffix:
            raise DataError(f"{test}: the test rows have another format than {file}. Use one for both.")
        for number, row in enumerate(read_rows(test)):
            _answer(test, number, row, answer)
    text = YAML.format(
        source=file.name,
        why=f"the rows have {why}",
        name=name,
        loader=FORMATS[train.suffix],
        train=json.dumps(os.path.relpath(train, file.parent)),
        test=json.dumps(os.path.relpath(test, file.parent)),
        prompt=json.dumps(prompt, ensure_ascii=False),
        answer=json.dumps(answer, ensure_ascii=False),
        until=json.dumps(["\n\n\n"] if any("\n" in a for a in answers) else ["\n"]),
        tokens=min(1024, max(16, *map(len, answers))),
    )
    write_text(target, text)
    try:
        shown = _try(name, file.parent)
    except BaseException:  # Ctrl-C too: what is left would be refused at the next try
        for path in made:
            path.unlink()
        raise
    return (
        f"{target} is a task of {len(rows)} rows ({why}).\n\n{shown}\n"
        f"Read the rows above, then set the prompt, the metric and generation_kwargs in {target} as you want them.\n"
        f"  TRACE_TASKS={shlex.quote(str(file.parent))} trace-bench train sequential --config quickstart "
        f"--tasks {name} --output_dir runs/{name}"
    )


def _split(file: Path, rows: list[dict[str, Any]], name: str) -> tuple[Path, Path]:
    """Writes the rows but for the last fifth, and that fifth, beside their file."""
    if len(rows) < 2:
        raise DataError(f"{file} has one row: --test names the test rows.")
    kept = max(1, len(rows) // 5)
    parts = [file.parent / f"{name}-{split}.jsonl" for split in ("train", "test")]
    for part in parts:
        if part.exists():
            raise DataError(f"{part} is there already. Remove it, or name the test rows with --test.")
    for part, content in zip(parts, (rows[:-kept], rows[-kept:]), strict=True):
        write_jsonl(part, content)
    return parts[0], parts[1]


def _answer(file: Path, number: int, row: dict[str, Any], column: str) -> str:
    if "messages" not in row:
        if row.get(column) is None:
            raise DataError(f"{file}, row {number} has no {column}. Give it an answer, or remove the row.")
        return str(row[column])
    last = (row["messages"] or [{}])[-1]
    if last.get("role") != "assistant" or len(row["messages"]) < 2:
        raise DataError(f"{file}, row {number}: the last of several messages has to be the assistant's, the answer.")
    return last["content"]


def _try(name: str, folder: Path) -> str:
    """Three training rows of a task as they are trained."""
    before = os.environ.get("TRACE_TASKS")
    os.environ["TRACE_TASKS"] = str(folder)
    try:
        loaded = tasks.load_tasks([name])
        tasks.check_stages(loaded)
        rows = tasks.training_rows(loaded[name])
    finally:
        if before is None:
            del os.environ["TRACE_TASKS"]
        else:
            os.environ["TRACE_TASKS"] = before
    return "".join(
        f"--- row {i}, prompt:\n{prompt}\n--- answer:\n{answer}\n\n" for i, (prompt, answer) in enumerate(rows[:3])
    )
