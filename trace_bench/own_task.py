"""Makes a task of a user's file of rows: recognises its columns, writes its YAML and tries it."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from trace_bench import tasks
from trace_bench.text import one_line, word
from trace_tasks.data import CL_BENCHMARK, FOLDERS, GROUPS, JUDGED, ORDERS, REASONING, SUITES
from trace_tasks.data.files import write_bytes, write_text
from trace_tasks.errors import DataError, brief

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
#: Names that mean something else in `--tasks`, or are tasks already.
TAKEN = {*FOLDERS, *REASONING, *CL_BENCHMARK, *JUDGED, *SUITES, *GROUPS, *ORDERS, "none"}
PROMPTS = ("prompt", "question", "input", "text", "query")
ANSWERS = ("answer", "target", "output", "response", "completion", "label")
#: Columns beside an instruction: its answer, and what it is about, which may be empty.
INSTRUCTED, CONTEXTS = ("output", "response"), ("input", "context")
#: Who speaks, by the names that ShareGPT rows have for it.
SPEAKERS = {"human": "user", "gpt": "assistant"}
#: The most that max_gen_toks is set to.
MOST_TOKENS = 1024
_MESSAGES = "{% for m in messages[:-1] %}{% if m.role != 'user' %}{{m.role}}: {% endif %}{{m.content}}\n{% endfor %}"
YAML = """\
# Made by `trace-bench task new {source}`; {why}.
task: {name}
dataset_path: parquet                      # texts as they are: other readers make numbers and dates of some
dataset_kwargs: {{data_files: {{train: {train}, test: {test}}}}}     # relative to this file
training_split: train
test_split: test
output_type: generate_until
doc_to_text: {prompt}
doc_to_target: answer
target_delimiter: ""                       # the prompt ends where the answer begins
generation_kwargs: {{until: {until}, max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]     # the first one is the headline
metadata: {{version: 1.0}}                   # a change that can move a score raises it
"""


class _Digits(str):
    """A number of a JSON file, with its digits as they are."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file.

    Raises:
        DataError: if its format is not known, or it cannot be read.
    """
    if file.suffix not in FORMATS:
        raise DataError(f"{file} has no known format: use a file of {', '.join(FORMATS)}.")
    if not file.is_file():
        raise DataError(f"There is no file {file}.")
    try:
        rows = list(_read(file))
    except Exception as e:  # whatever the readers say of a file
        raise DataError(f"{file} cannot be read as {file.suffix[1:]}: {brief(e.__cause__ or e)}") from e
    if not rows:
        raise DataError(f"{file} has no rows.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {number} is {str(row)[:40]!r}. Each row needs named columns.")
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            half = f"{file}, row {number} has half of a surrogate pair, which is not valid text. Remove it."
            raise DataError(half) from None
    return [_with_messages(row) for row in rows]


def _with_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose chat has another form (ShareGPT's, or TRL's with prompt and completion) with `messages` instead."""
    if isinstance(row.get("conversations"), list):
        return {"messages": row["conversations"], **{k: v for k, v in row.items() if k != "conversations"}}
    prompt, answer = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(answer, list):
        return {"messages": prompt + answer, **{k: v for k, v in row.items() if k not in ("prompt", "completion")}}
    return row


def _read(file: Path) -> Iterable[Any]:
    """Rows with their texts as they are: libraries' readers guess at types, column by column."""
    loads = partial(json.loads, parse_int=_Digits, parse_float=_Digits)
    if file.suffix == ".jsonl":
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
        return [loads(line) for line in lines if line.strip()]
    if file.suffix == ".json":
        return loads(file.read_bytes())
    if file.suffix == ".csv":
        limit = csv.field_size_limit(sys.maxsize)
        try:
            with file.open(encoding="utf-8-sig", newline="") as table:
                rows = list(csv.DictReader(table))
        finally:
            csv.field_size_limit(limit)  # it is of the whole process
        for number, row in enumerate(rows):
            if None in row:
                raise ValueError(f"row {number} has more cells than the first line: a text with commas needs quotes")
        return rows
    from pyarrow import parquet

    return parquet.read_table(file).to_pylist()


def recognise(columns: Collection[str]) -> tuple[str, str, str]:
    """The templates of prompt and answer, and which columns they are made of.

    Raises:
        DataError: if the columns are none that are known.
    """
    if "messages" in columns:
        return f"{_MESSAGES}assistant:\n", "answer", "messages, the last one is the answer"
    if "instruction" in columns and (answer := next((c for c in INSTRUCTED if c in columns), None)):
        more = next((c for c in CONTEXTS if c in columns), None)
        middle = f"{{% if {more} %}}{{{{{more}}}}}\n{{% endif %}}" if more else ""
        return "{{instruction}}\n" + middle, answer, f"instruction and {answer}"
    prompt = next((c for c in PROMPTS if c in columns), None)
    answer = next((c for c in ANSWERS if c in columns and c != prompt), None)
    if prompt is None or answer is None:
        commas = " In a .csv, separate columns with commas." if re.search("[;\t]", "".join(columns)) else ""
        raise DataError(
            f"No prompt and answer in the columns {', '.join(columns)}. Rename them to messages or conversations; to "
            f"instruction with output or response; or to one of {', '.join(PROMPTS)} with one of {', '.join(ANSWERS)}. "
            "Or write the YAML by hand (trace_tasks/README.md has an example)." + commas
        )
    return "{{" + prompt + "}}\n", answer, f"{prompt} and {answer}"


def make_task(file: Path, test: Path | None = None, name: str | None = None) -> str:
    """Writes NAME.yaml beside a file of rows, and loads it as a run does.

    Args:
        file: The training rows.
        test: The test rows; None keeps the last fifth of the rows apart (at least one).
        name: The task's name; None = that of the file.

    Returns:
        What was made, with three rows as the model sees them, and how to use it.

    Raises:
        DataError: naming the file, its columns or the row that cannot be used.
    """
    name = _name(file, name)
    target, *files = (file.parent / f"{name}{end}" for end in (".yaml", "-train.parquet", "-test.parquet"))
    for path in (target, *files):
        if path.exists():
            raise DataError(f"{path} already exists. Remove it to make it again, or give a different --name.")
    rows, tested = read_rows(file), read_rows(test) if test is not None else []
    prompt, answer, why = recognise(rows[0].keys())
    known = dict.fromkeys((*PROMPTS, "instruction", *CONTEXTS))
    columns = [column for column in known if f"{{{{{column}}}}}" in prompt]
    unused = sorted({column for row in rows for column in row} - ({*columns, answer} if columns else {"messages"}))
    parts = ((file, rows), (test or file, tested))
    made = [_texts(f, i, row, columns, answer, unused) for f, part in parts for i, row in enumerate(part)]
    if len(made) < 2:
        raise DataError(f"{file} has only one row. Add rows, or name a file of test rows with --test.")
    kept = len(tested) or max(1, len(rows) // 5)
    answers = [row["answer"] for row in made]
    # No token has less than a byte, and EOS is one more.
    longest = max(len(text.encode()) + 1 for text in answers)
    text = YAML.format(
        source=one_line(file.name),  # in a comment
        why=f"the rows have {why}",
        name=name,
        train=json.dumps(files[0].name),
        test=json.dumps(files[1].name),
        prompt=json.dumps(prompt, ensure_ascii=False),
        until=json.dumps([_end(answers)]),
        tokens=min(MOST_TOKENS, max(16, longest)),
    )
    try:
        for part, those in zip(files, (made[:-kept], made[-kept:]), strict=True):
            _write(part, those)
        write_text(target, text)
        shown = _try(name, file.parent, answers[:-kept])
    except BaseException:  # Ctrl-C too: what is left would be refused at the next try
        for path in (target, *files):
            path.unlink(missing_ok=True)
        raise
    left = f"The prompt does not use the columns {', '.join(unused)}; the task keeps them.\n" if unused else ""
    cut = f"max_gen_toks is {MOST_TOKENS}, and the longest answer has {longest - 1} bytes: check that it fits.\n"
    return (
        f"{target} is a task of {len(made)} rows ({why}), in {files[0].name} and {files[1].name}.\n\n{shown}\n"
        f"{left}{cut if longest > MOST_TOKENS else ''}"
        f"Read the rows above, then set the prompt, the metric and generation_kwargs in {target} as you want them.\n"
        f"  TRACE_TASKS={word(file.parent)} trace-bench train sequential --config quickstart "
        f"--tasks {name} --output_dir runs/{name}"
    )


def _name(file: Path, name: str | None) -> str:
    name = name or re.sub(r"\W+", "_", file.stem).strip("_")
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise DataError(f"{name!r} cannot be the name of a task: give a --name of letters, digits and '_'.")
    if name in TAKEN:
        raise DataError(f"{name} already has a meaning in --tasks. Give the task a different name: --name my_{name}.")
    return name


def _end(answers: list[str]) -> str:
    """More line breaks than an answer has in a row: blank lines in a text are no end of it."""
    breaks = max(len(run) for answer in answers for run in re.findall(r"\n*", answer))
    return "\n" * (max(3, breaks + 1) if breaks else 1)


def _texts(
    file: Path, number: int, row: dict[str, Any], columns: list[str], answer: str, unused: list[str]
) -> dict[str, Any]:
    """The columns of a row that its prompt is made of, and its answer, as texts; and the others, for a prompt to come.

    Raises:
        DataError: if one of them is not there, or messages do not end with an answer.
    """
    others = {column: _text(row.get(column)) or "" for column in unused}
    if not columns:
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise DataError(f"{file}, row {number}: messages is not a list of messages. Correct it, or remove the row.")
        found = [_message(message) for message in messages]
        if any(None in m.values() for m in found):
            raise DataError(
                f"{file}, row {number}: a message has no role, or its content is not text (tool calls and images are "
                "not supported). Correct it, or remove the row."
            )
        if len(found) < 2 or found[-1]["role"] != "assistant" or not str(found[-1]["content"]).strip():
            raise DataError(
                f"{file}, row {number}: there must be at least two messages, and the last one must be a non-empty "
                "message of the assistant. Correct it, or remove the row."
            )
        return {**others, "messages": found, "answer": found[-1]["content"]}
    texts = {column: _text(row.get(column)) for column in (*columns, answer)}
    for column, text in texts.items():
        blank = text is None or (column == answer and not text.strip())
        if blank and not (column in CONTEXTS and "instruction" in columns):
            what = "an answer" if column == answer else "a prompt"
            raise DataError(f"{file}, row {number} has no {column}. Give it {what}, or remove the row.")
    return {**others, **{column: texts[column] or "" for column in columns}, "answer": texts[answer]}


def _message(message: dict[str, Any]) -> dict[str, str | None]:
    """Role and content of a message in OpenAI's form or ShareGPT's, None where there is no text."""
    role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
    if isinstance(content, list):  # parts
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if message.get("tool_calls") or message.get("function_call"):
        content = None
    return {"role": SPEAKERS.get(str(role), _text(role)), "content": _text(content)}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return _json(value) if isinstance(value, bool | list | dict) else str(value)


def _json(value: Any) -> str:
    """What json.dumps gives, with the numbers of a file as they stand there."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k), ensure_ascii=False)}: {_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    return value if isinstance(value, _Digits) else json.dumps(value, ensure_ascii=False, default=str)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    messages = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    schema = pyarrow.schema([(column, messages if column == "messages" else text) for column in rows[0]])
    out = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), out)
    write_bytes(file, out.getvalue().to_pybytes())


def _try(name: str, folder: Path, answers: list[str]) -> str:
    """Three training rows of a task as they are trained; makes sure that their answers are these."""
    with tasks.kept_variable("TRACE_TASKS"):
        os.environ["TRACE_TASKS"] = str(folder)
        loaded = tasks.load_tasks([name])
        tasks.check_stages(loaded)
        rows = tasks.training_rows(loaded[name])
        for number, (made, answer) in enumerate(zip((a for _, a in rows), answers, strict=True)):
            if made != answer:
                raise DataError(f"row {number}: lm-eval turns the answer {answer!r} into {made!r}.")
    return "".join(
        f"--- row {i}, prompt:\n{prompt}\n--- answer:\n{answer}\n\n" for i, (prompt, answer) in enumerate(rows[:3])
    )
