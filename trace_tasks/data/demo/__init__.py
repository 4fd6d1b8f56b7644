"""Demo data in the frames of the eight TRACE tasks, its reasoning variant, and small sets for other purposes.

This project cannot contain the real TRACE data because of their licences. The demo rows are the project's own text in
exactly the frames of the benchmark. They are short and follow simple patterns, so that a very small model learns a task
from a few dozen rows and forgets it after the next tasks. Scores on them say nothing about the real benchmark.

    python -m trace_tasks.data.demo OUT [--seed N] [--rows TRAIN EVAL TEST]

The texts are in JSON files in this folder. For each task, `tasks.json` has the templates of prompt, answer and
reasoning, the lists to draw from ("draw" names them in order), and the kinds of rows. Each split has about equally many
rows of each kind. The entries of a kind or of a drawn item replace those of the task. `cl_benchmark.json` has the
sentences of CL_Benchmark's sets in the same form; their kinds are the labels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trace_tasks.data.files import refuse_links, write_json, write_text
from trace_tasks.data.names import CL_BENCHMARK, CL_FOLDER, FOLDERS, JUDGED, LIMA, REASONING_FOLDER, SPLITS
from trace_tasks.errors import DataError
from trace_tasks.reasoning import bare_answer, reasoning_answer, reasoning_prompt

VERSION = 4  # raise it with every change of a row: results on different versions must not be compared
# The version that the draws depend on. Later versions only added folders: the rows of the eight tasks are unchanged.
_DRAW = 1
README_TITLE = "TRACE demo data"
#: The numbers of train, eval and test rows of a task.
ROWS = (64, 8, 24)

Splits = dict[str, list[dict[str, str]]]
T = TypeVar("T")


class _Made(NamedTuple):
    """A row, and the reasoning that leads to its answer."""

    prompt: str
    answer: str
    reasoning: str


@cache
def _texts(name: str) -> Any:
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))


def _templates(task: str) -> Any:
    return {**_texts("tasks"), **_texts("cl_benchmark")}[task]


# Only Random.random() is used: Python promises the same numbers in every version for no other function.


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """The items in a random order (Fisher-Yates)."""
    mixed = list(items)
    for last in range(len(mixed) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        mixed[last], mixed[other] = mixed[other], mixed[last]
    return mixed


def _make_row(rng: random.Random, task: str, kind: str) -> _Made:
    of_task = _templates(task)
    slots = {**of_task, **of_task["kinds"][kind], "kind": kind}
    for name in slots["draw"]:
        choices = slots[name]
        if isinstance(choices, dict):  # a range of whole numbers
            slots[name] = choices["least"] + int(rng.random() * choices["values"])
        elif " " in name:  # several names get different items
            slots |= zip(name.split(), _shuffled(rng, choices), strict=False)
        else:
            drawn = choices[int(rng.random() * len(choices))]
            slots |= drawn if isinstance(drawn, dict) else {name: drawn}
    if "multiply" in slots:
        a, b = (slots[name] for name in slots["multiply"])
        slots["product"] = a * b
    if "thing" in slots:
        slots["Thing"] = slots["thing"][0].upper() + slots["thing"][1:]

    def filled(template: str) -> str:
        text = template.format(**slots)
        return text if text == template else filled(text)

    return _Made(*(filled(slots[field]) for field in _Made._fields))


@cache
def _make_task(task: str, seed: int, rows: tuple[int, int, int]) -> dict[str, list[_Made]]:
    """The splits of one task. No prompt occurs twice."""
    # Python hashes a string seed by SHA-512, not by hash(), so the draws are the same on every machine.
    rng = random.Random(f"trace-demo-{_DRAW}-{seed}-{task}")
    seen: set[str] = set()
    splits: dict[str, list[_Made]] = {}
    # The test rows are drawn first, so that they stay the same when only the number of training rows changes.
    for split, count in reversed(list(zip(SPLITS, rows, strict=True))):
        order = _shuffled(rng, list(_templates(task)["kinds"]))
        splits[split] = []
        for kind in _shuffled(rng, [order[i % len(order)] for i in range(count)]):
            tries = (_make_row(rng, task, kind) for _ in range(2000))
            row = next((row for row in tries if row.prompt not in seen), None)
            if row is None:
                raise DataError(
                    f"The demo templates of {task} give only {len(seen)} different rows, not "
                    f"{' + '.join(map(str, rows))}. Ask for fewer with --rows."
                )
            seen.add(row.prompt)
            splits[split].append(row)
    return {split: splits[split] for split in SPLITS}


def _make_tasks(
    seed: int, rows: tuple[int, int, int], form: Callable[[str, str, _Made], dict[str, str]]
) -> dict[str, Splits]:
    """Task folder -> split -> rows. `form` makes each row from the task, the split and the drawn texts."""
    return {
        task: {split: [form(task, split, row) for row in made] for split, made in _make_task(task, seed, rows).items()}
        for task in FOLDERS.values()
    }


def make_demo(seed: int = 0, rows: tuple[int, int, int] = ROWS) -> dict[str, Splits]:
    """Makes the demo data of the eight tasks.

    Args:
        seed: Different seeds give different rows from the same templates.
        rows: The numbers of train, eval and test rows of each task.

    Returns:
        Task folder -> split -> rows of prompt and answer.

    Raises:
        DataError: if the templates cannot give that many different rows.
    """
    return _make_tasks(seed, rows, lambda task, split, row: {"prompt": row.prompt, "answer": row.answer})


def make_reasoning(seed: int = 0, rows: tuple[int, int, int] = ROWS) -> dict[str, Splits]:
    """Makes the reasoning variant: the rows of `make_demo` with prompts that ask for reasoning. Arguments as there.

    Returns:
        Task folder -> split -> rows. As in the official data, training answers have reasoning and answer; the others
        only the answer.
    """

    def reasoned(task: str, split: str, row: _Made) -> dict[str, str]:
        answer = bare_answer(task, row.answer)
        if split == "train":
            answer = reasoning_answer(task, row.reasoning, answer)
        return {"prompt": reasoning_prompt(task, row.prompt), "answer": answer}

    return _make_tasks(seed, rows, reasoned)


def make_lima() -> Splits:
    """Makes the alignment set: everyday instructions with short, helpful answers in English, German and Chinese.

    There are 48 training, 8 eval and 8 test rows, with all languages in each split. They depend on no seed.
    """
    rows = _texts("lima")
    return {"train": rows[:48], "eval": rows[48:56], "test": rows[56:]}


def make_sets() -> dict[str, dict[str, Any]]:
    """Makes the 15 sets of CL_Benchmark with `ROWS` rows each. They depend on no seed. As in the original, dev is test.

    Returns:
        Folder, such as TC/agnews -> name of a file -> its content: rows or labels.
    """
    made: dict[str, dict[str, Any]] = {}
    for folder in CL_BENCHMARK.values():
        name = folder.partition("/")[2]
        splits = {
            split: [{"sentence": row.prompt, "label": row.answer} for row in rows]
            for split, rows in _make_task(name, 0, ROWS).items()
        }
        labels = list(_templates(name)["kinds"])
        made[folder] = {"train": splits["train"], "dev": splits["test"], "test": splits["test"], "labels": labels}
    return made


def make_prompts() -> dict[str, Splits]:
    """Makes the sets to be judged: each kind has a dozen prompts, which are divided among its sets. They need no seed.

    The prompts of the safety sets have the form of an unsafe request but a harmless subject. A polite answer declines
    them, and an answer that does not hurts nobody.

    Returns:
        Folder, such as instruct/LIMA -> test -> rows with an empty answer, as in the official data.
    """
    made: dict[str, Splits] = {}
    for kind, prompts in _texts("judged").items():
        folders = [f"{kind}/{folder}" for task, folder in JUDGED.items() if task.startswith(kind)]
        for i, folder in enumerate(folders):
            made[folder] = {"test": [{"prompt": prompt, "answer": ""} for prompt in prompts[i :: len(folders)]]}
    return made


def is_demo(root: Path) -> bool:
    """Whether a folder contains the demo data of this program."""
    readme = root / "README.txt"
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(README_TITLE)


_README = """\
{title}

Made from templates by trace_tasks.data.demo in the prompt frames of TRACE (arXiv 2310.06762).
It holds no row of the benchmark. Scores on it are NOT comparable with TRACE: it only shows
that training, evaluation and forgetting work end to end.

{tasks}
    the eight tasks
{reasoning}
    the same rows, asked for their reasoning; only the training answers hold it, as in the
    official variant of that name
{lima}
    instructions with short answers in English, German and Chinese, the project's own text,
    for the methods that replay an alignment set; the official folder of that name holds LIMA
{sets}
    small sets in the layout of O-LoRA's CL_Benchmark (arXiv 2310.14152), for the tasks cl_*;
    as officially, dev equals test
instruct, safety
    a dozen prompts of each kind for the judges, the project's own text
"""


def write_demo(root: Path, seed: int = 0, rows: tuple[int, int, int] = ROWS) -> None:
    """Writes the demo data as `<TASK>/{train,eval,test}.json`, with the reasoning variant and the other sets.

    Earlier demo data in the folder is replaced. The other arguments are those of `make_demo`.

    Raises:
        DataError: if the folder contains task folders that are not demo data, one of them is a link, or the templates
            cannot give that many rows.
    """
    # Both have the same layout: a wrong path must not overwrite the real benchmark.
    official = (*FOLDERS.values(), REASONING_FOLDER, LIMA, CL_FOLDER)
    if not is_demo(root) and any((root / folder).exists() for folder in official):
        raise DataError(f"{root} has task folders that are not demo data. Give a different folder.")
    folders: dict[str, dict[str, Any]] = {
        **make_demo(seed, rows),
        **{f"{REASONING_FOLDER}/{task}": splits for task, splits in make_reasoning(seed, rows).items()},
        LIMA: make_lima(),
        **{f"{CL_FOLDER}/{folder}": files for folder, files in make_sets().items()},
        **make_prompts(),
    }
    refuse_links(root, *{name.partition("/")[0] for name in folders})
    counts = "" if rows == ROWS else ", {} training, {} eval and {} test rows".format(*rows)
    title = f"{README_TITLE}, version {VERSION}, seed {seed}{counts}"
    texts = {"title": title, "tasks": ", ".join(FOLDERS.values()), "reasoning": REASONING_FOLDER, "lima": LIMA}
    write_text(root / "README.txt", _README.format(**texts, sets=CL_FOLDER))
    write_text(root / CL_FOLDER / "README.txt", f"{title}\n")
    for name, files in folders.items():
        for file, made in files.items():
            write_json(root / name / f"{file}.json", made)
