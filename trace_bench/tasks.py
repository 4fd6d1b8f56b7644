"""From lm-eval tasks to the columns of a run: loading them, checking them, and their training rows.

What is trained on and what is tested on come from the same lm-eval task object and through the same functions for token
ids (`trace_tasks.tokens`), so they cannot drift apart.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_bench import versions
from trace_bench.text import word
from trace_tasks.data import (
    CL_BENCHMARK,
    FOLDERS,
    JUDGED,
    REASONING,
    SUITES,
    TASKS_PATH,
    Data,
    DataError,
    find_cl_benchmark,
    is_demo,
    needs_data,
    rows_digest,
)
from trace_tasks.errors import with_neighbours

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from trace_bench.run import Run

log = logging.getLogger(__name__)


@contextmanager
def kept_variable(name: str) -> Iterator[None]:
    """Gives a variable of the environment, such as TRACE_TASKS, its value back when the block ends."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def task_manager(include_defaults: bool = False) -> TaskManager:
    """lm-eval's index of our tasks, those of TRACE_TASKS and, if asked (it takes seconds), its own."""
    versions.check()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[TASKS_PATH, *_more_tasks()], include_defaults=include_defaults)


def _more_tasks() -> list[Path]:
    """The folders with task YAMLs that TRACE_TASKS names, separated as in PATH."""
    folders = [Path(f).expanduser().absolute() for f in os.environ.get("TRACE_TASKS", "").split(os.pathsep) if f]
    for folder in folders:
        if not any(folder.rglob("*.yaml")):
            raise DataError(f"TRACE_TASKS={os.environ['TRACE_TASKS']}: {folder} is not a folder with task YAMLs.")
    return folders


def load_tasks(names: Sequence[str]) -> dict[str, Task]:
    """Builds lm-eval tasks by name, in that order: the project's own and, if any other is named, lm-eval's.

    Raises:
        DataError: for a name that nobody has, or a task that cannot be made.
    """
    if not names:
        return {}
    check_names(names)
    manager = task_manager()
    if not set(names) <= set(manager.all_tasks):
        manager = task_manager(include_defaults=True)
    if unknown := [n for n in names if n not in manager.all_tasks]:
        raise _unknown(unknown)
    loaded: dict[str, Task] = {}
    for name in names:
        try:
            with chdir(_folder_of_rows(manager, name)):
                loaded |= manager.load([name])["tasks"]
        except (DataError, MemoryError):
            raise
        except Exception as e:  # whatever lm-eval, a template, a function of the task or the hub says
            if isinstance(e, OSError) and e.errno not in (None, errno.ENOENT):
                raise  # a full disk and the like
            raise DataError(
                f"The task {name} cannot be loaded ({type(e).__name__}: {e}). Check that its data is there, has at "
                "least one test row, and has the splits and columns that its YAML names."
            ) from e
    groups = [name for name in names if name not in loaded]
    if groups:
        raise DataError(f"{', '.join(groups)}: a group of tasks cannot be a column. Name its tasks instead.")
    return {name: loaded[name] for name in names}


def check_names(names: Iterable[str]) -> None:
    """Refuses names that are in no YAML. It takes a second; lm-eval's index of all its tasks takes ten.

    Raises:
        DataError: naming them, with their neighbours.
    """
    sought = dict.fromkeys(n for n in names if n not in {*FOLDERS, *REASONING, *CL_BENCHMARK, *JUDGED, *SUITES})
    spec = importlib.util.find_spec("lm_eval")
    folders = [*_more_tasks(), *(Path(place) / "tasks" for place in (spec and spec.submodule_search_locations) or ())]
    for folder, _, files in (found for root in folders if sought for found in os.walk(root)):
        for file in files:
            if sought and file.endswith((".yaml", ".yml")):
                content = Path(folder, file).read_bytes()
                sought = {name: None for name in sought if name.encode("utf-8", "replace") not in content}
    if sought:
        raise _unknown(list(sought))


def _unknown(names: Sequence[str]) -> DataError:
    texts = [file.read_text(encoding="utf-8", errors="replace") for f in _more_tasks() for file in f.rglob("*.yaml")]
    own = [name for text in texts for name in re.findall(r"^task: *[\"']?([\w.-]+)", text, re.MULTILINE)]
    listed = with_neighbours(names, [*FOLDERS, *REASONING, *CL_BENCHMARK, *JUDGED, *own])
    rest = f"TRACE_TASKS has: {', '.join(own)}." if own else "A task of your own is a YAML in a folder of TRACE_TASKS."
    known = f"TRACE has: {', '.join(FOLDERS)}; and reasoning_* of each. CL_Benchmark has: {', '.join(CL_BENCHMARK)}."
    return DataError(f"Unknown task(s) {listed}. {known} {rest}")


def _folder_of_rows(manager: TaskManager, name: str) -> Path:
    """The folder that a task's relative data paths start from: its YAML's if the files are there, else the current."""
    entry = manager.task_index[name]
    if entry.yaml_path is None:
        return Path()
    settings = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files") or []
    folder = entry.yaml_path.parent
    groups = settings.values() if isinstance(settings, dict) else [settings]
    files = [f for group in groups for f in (group if isinstance(group, list) else [group])]
    return folder if files and all((folder / str(f)).exists() for f in files) else Path()


def load_suites(names: Sequence[str]) -> dict[str, Group]:
    """Builds general-ability suites by name, in that order: groups of lm-eval's own tasks.

    Raises:
        DataError: if a suite's rows or packages are missing.
    """
    if not names:
        return {}
    import lm_eval
    from lm_eval.tasks import TaskManager

    # The folders of the suites alone: an index of all that lm-eval has takes ten seconds.
    theirs = Path(lm_eval.__file__).parent / "tasks"
    folders = ("mmlu/default", "gsm8k", "bbh/cot_fewshot", "tydiqa", "super_glue/boolq", "piqa", "ifeval")
    manager = TaskManager(include_path=[*(theirs / f for f in folders), TASKS_PATH], include_defaults=False)
    suites = {}
    for name in names:
        try:
            suites[name] = manager.load([name])["groups"][name]
        except ImportError as e:
            needed = f"{name} needs packages that are not installed ({e}): pip install 'lm-eval[ifeval]'."
            raise DataError(needed) from e
        if name == "general_ifeval":
            _check_sentences()
    return suites


def _check_sentences() -> None:
    """Refuses to generate IFEval's answers where nltk could not count their sentences: lm-eval goes on without."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as e:
        raise DataError(
            "general_ifeval counts sentences with nltk's punkt_tab, which is missing, and lm-eval could not download "
            "it. On a machine with network access: python -m nltk.downloader punkt_tab. Then copy the folder nltk_data "
            "from there into the home directory here, or into the folder that NLTK_DATA names."
        ) from e


def check_stages(tasks: dict[str, Task]) -> None:
    """Refuses tasks that cannot be a column of the matrix, before anything is trained or an engine is started.

    Raises:
        DataError: naming the task, and what it lacks.
    """
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise DataError(
                f"{name} has output_type {task.OUTPUT_TYPE}: a column of the matrix needs generated answers, since "
                "they are trained as text. Set output_type: generate_until."
            )
        if task.multiple_input:
            raise DataError(
                f"{name} has several prompts for each row (doc_to_text is an index), but a task needs one prompt."
            )
        metric = next(iter(task.aggregation()))
        if task.higher_is_better().get(metric) is None:
            raise DataError(
                f"{name} does not say if higher {metric} is better, so forgetting would look the same as learning. Add "
                "higher_is_better: true or false to the metric in the metric_list of the task."
            )
        if task.config.process_results is not None:
            continue  # its own function scores it, so its targets may be anything
        if task.multiple_target and (graded := [m for m in task.aggregation() if m != "exact_match"]):
            raise DataError(
                f"{name}: some rows have several valid answers, and then lm-eval turns every score of {graded[0]} "
                "above 0 into 1. Use only exact_match, or score the task with a function of your own (process_results "
                "in its YAML)."
            )
        for i, doc in enumerate(task.eval_docs):
            target = task.doc_to_target(doc)
            if isinstance(target, list) != bool(task.multiple_target):
                here, first = ("is a list", "is not") if isinstance(target, list) else ("is text", "is a list")
                raise DataError(
                    f"{name}, test row {i}: the target {target!r:.80} {here}, but that of row 0 {first}, so "
                    f"lm-eval would compare answers with its characters. {_BRACKETS}"
                )
            if task.config.doc_to_choice is not None:
                try:
                    target_text(task, doc)
                except ValueError as e:
                    raise DataError(f"{name}, test row {i}: {e}") from e


#: lm-eval reads the text that a template of a target gives as a list where it stands in brackets.
_BRACKETS = (
    "If the answer is a text in brackets, give its column (doc_to_target: answer) and not a template "
    "('{{answer}}'), because lm-eval reads the template's text as a list."
)


def target_text(task: Task, doc: dict[str, Any]) -> str:
    """The answer of a row as a text to train: what lm-eval puts into few-shot prompts, or compares with.

    A number is its digits, an index its choice, and of several valid answers the first is taken.

    Raises:
        ValueError: if there is no such text; the message has the target.
    """
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None and not (task.config.process_results and isinstance(target, str)):
        choices = task.doc_to_choice(doc)
        if not isinstance(target, int) or not 0 <= target < len(choices):
            raise ValueError(
                f"the target {target!r:.80} is not an index of the {len(choices)} choices of doc_to_choice."
            )
        target = choices[target]
    elif isinstance(target, list):
        texts = [text for text in target if isinstance(text, str) and text.strip()]
        if not texts:
            raise ValueError(f"the target {target!r:.80} is a list without text. {_BRACKETS}")
        target = texts[0]
    elif isinstance(target, int | float) and target == target:
        target = str(target)  # as lm-eval does before it compares
    if not isinstance(target, str):
        raise ValueError(f"the target {target!r:.80} is of type {type(target).__name__}, not text.")
    return target


def training_rows(
    task: Task, limit: int | None = None, chat_template: Callable[..., str] | None = None
) -> list[tuple[str, str]]:
    """The training set of a task as (prompt, answer) texts, made by the same object that makes its test prompts.

    Args:
        task: An lm-eval task with a training split.
        limit: The first so many rows only, for trials.
        chat_template: Renders chat messages to text, as lm-eval's `LM.apply_chat_template`; None = raw prompts.

    Raises:
        DataError: if the task has no training rows, or one of them has no prompt or no answer; it names the row.
    """
    name, docs = task.task_name, None
    if task.has_training_docs():
        with suppress(KeyError):
            docs = task.training_docs()
    if docs is None:
        split = task.config.training_split
        raise DataError(
            f"The task {name} has no training split, so it cannot be a stage"
            + (f": its data has no split {split!r}, which its YAML names as training_split." if split else ".")
        )
    rows: list[tuple[str, str]] = []
    for i, doc in enumerate(islice(docs, limit)):
        try:
            made = partial(task.fewshot_context, doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
            prompt, answer = made(), target_text(task, doc)
            if not prompt.strip() or not answer.strip():
                raise ValueError(f"the {'answer' if prompt.strip() else 'prompt'} is empty.")
        except Exception as e:  # a task's template or function may raise anything
            what = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
            raise DataError(f"{name}, training row {i}: {what}") from e
        if chat_template is not None:
            prompt = made(apply_chat_template=True, chat_template=chat_template)
        rows.append((prompt, answer))
    if not rows:
        raise DataError(f"The task {name} has no training rows, so it cannot be a stage.")
    if task.multiple_target:
        log.warning(
            "%s: some rows have several valid answers. Training uses the first, as lm-eval's few-shot prompts do.", name
        )
    return rows


def answer_scores(task: Task, answers: Sequence[tuple[int, str]]) -> list[float]:
    """The scores of answers to training rows by the task's headline metric, as evaluation scores a test row's.

    Args:
        task: An lm-eval task with a training split.
        answers: Number of a training row, and an answer to it.

    Returns:
        A score each, higher = better: negated if lower is better in the metric.

    Raises:
        DataError: if the metric is computed over all rows together and has no score for an individual row.
    """
    from lm_eval.api.instance import Instance

    docs = list(islice(task.training_docs() or (), max((i + 1 for i, _ in answers), default=0)))
    kept = task._filters[0]  # the headline's, as in a cell
    asked = [
        Instance(request_type="generate_until", doc=docs[i], arguments=("", {}), idx=0, resps=[text])
        for i, text in answers
    ]
    if asked:
        kept.apply(asked)
    scores = []
    for instance in asked:
        found = task.process_results(instance.doc, [instance.filtered_resps[kept.name]])
        metric = next(name for name in task.aggregation() if name in found)
        try:
            score = float(found[metric])
        except (TypeError, ValueError):
            raise DataError(
                f"{task.task_name}: {metric} scores all rows together, so a single answer has no score."
            ) from None
        scores.append(score if task.higher_is_better()[metric] else -score)
    return scores


def rows_fingerprint(tasks: dict[str, Task]) -> dict[str, str]:
    """SHA-256 (16 digits) over the training and test rows of tasks from elsewhere: task -> digest.

    Of TRACE's tasks the files count (`Data.fingerprint`), of the sets to be judged theirs (`source_fingerprint`).
    """
    found = {}
    for name, task in tasks.items():
        if needs_data([name]) or name in JUDGED:
            continue
        trained = task.training_docs() if task.has_training_docs() else ()
        found[name] = rows_digest([trained or (), task.eval_docs or ()])
    return found


def data_record(data: Data, tasks: dict[str, Task]) -> dict[str, Any]:
    """The entry of a manifest about the rows of a run's tasks: TRACE's, and those from elsewhere."""
    record, own = data.record(), rows_fingerprint(tasks)
    folders = os.pathsep.join(map(str, _more_tasks()))
    if tasks.keys() & CL_BENCHMARK.keys():
        root = find_cl_benchmark()
        if data.root and data.demo != is_demo(root):
            raise DataError(
                f"{data.root} and {root}: only one of them is demo data. Use demo data for both, or for none."
            )
        record |= {"cl_benchmark": str(root), "demo": is_demo(root)}
    return record | ({"own_tasks": folders} if own and folders else {}) | {"fingerprint": record["fingerprint"] | own}


def use_own_tasks(run: Run) -> None:
    """Finds tasks from elsewhere where they were when a run began, unless TRACE_TASKS says otherwise.

    The same holds for the rows of CL_Benchmark and TRACE_CL_BENCHMARK.

    Raises:
        DataError: if the folder is gone, or the run brings it along: its YAMLs may call Python.
    """
    record = run.manifest["data"]
    if root := record.get("cl_benchmark"):
        gone = record["demo"] and not Path(root).is_dir()  # made on another machine: this one makes the same rows
        os.environ.setdefault("TRACE_CL_BENCHMARK", "demo" if gone else root)
    folders = record.get("own_tasks")
    if not folders or "TRACE_TASKS" in os.environ:
        return
    for folder in map(Path, folders.split(os.pathsep)):
        if not folder.is_dir():
            raise DataError(
                f"The run has tasks of the folder {folder}, which is missing: set TRACE_TASKS to its new place."
            )
        if not folder.is_absolute() or folder.resolve().is_relative_to(run.path.resolve()):
            raise DataError(
                f"{run.path} contains its own tasks in {folder}, and a task can run code. If you trust its author, "
                f"set TRACE_TASKS={word(folder)} and run the command again."
            )
    os.environ["TRACE_TASKS"] = folders
