"""The audit of a TRACE data set: it finds what can distort scores, above all test rows that are also training rows.

    trace-bench data audit [SOURCE] [--against SOURCE ...] [--tokenizer MODEL] [--output FILE.json]

`Data.check` refuses a data set at its first bad rows. The audit reads all readable files and reports repeated rows,
contradicting answers, overlaps of the splits, lengths, broken characters and rows of the other variant.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from trace_tasks.answers import extract_answer, offered_labels
from trace_tasks.data.demo import is_demo
from trace_tasks.data.files import sha256
from trace_tasks.data.names import CL_BENCHMARK, FOLDERS, REASONING, SPLITS, task_variant
from trace_tasks.data.packs import FILES, is_cl_benchmark, read_file
from trace_tasks.data.rows import folder_fingerprint, rows_digest, sift_rows
from trace_tasks.data.similarity import SHINGLE, SIMILAR, Shingles, shingles, similar, similar_pairs
from trace_tasks.data.sources import find_reasoning
from trace_tasks.errors import DataError
from trace_tasks.reasoning import FRAMES, row_variant
from trace_tasks.tokens import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The pairs of splits whose overlaps are reported. Only train/test is a leak: nothing is trained or chosen on eval.
PAIRS = (("train", "test"), ("train", "eval"), ("eval", "test"))
#: Answers are labels, which are counted, if there are at most this many and each occurs twice or more on average.
LABELS = 10
#: Task -> the same task in the other variant of the data.
OTHER_VARIANT = dict(zip([*FOLDERS, *REASONING], [*REASONING, *FOLDERS], strict=True))
_FOLDER = {**FOLDERS, **REASONING}

_DOUBLED_CUE = re.compile(r"(\b\w+[:：])\s*\1\s*\Z")
#: The characters that cp1252 decodes from the second and later bytes of a UTF-8 character.
CONTINUED = "[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_MOJIBAKE = re.compile(
    "\ufffd"  # decoded with errors ignored
    "|[\u0080-\u009f]"  # control characters that no text contains: cp1252 read as Latin-1
    f"|[ÂÃ]{CONTINUED}"  # UTF-8 read as cp1252: "Ã¼" for "ü"
    "|â€|â„¢|â‚¬|âˆ’|ï»¿|ï¿½"  # quotation marks and dashes ("â€™"), ™, €, minus, byte order mark
    f"|(?:[ä-é]{CONTINUED}{{2}}){{2}}"  # two Chinese characters in a row
)
# A sum of binary fractions, written with all its digits: 1.4300000000000002.
# With the look-behinds, a run of zeros is read once instead of once for each zero.
_FLOAT = re.compile(r"\d\.(?=\d{12})\d*?(?:(?<!0)0{6,}+[1-9]|(?<!9)9{6,}+[0-8])\d{0,2}(?!\d)")
_DECIMAL = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")


@cache
def official() -> dict[str, str]:
    """SHA-256 (16 digits) of official files -> which file it is.

    The files of the 500 variant are in two independent public copies of the archive, those of the 5000 variant in one,
    and those of CL_Benchmark in O-LoRA's repository. Other official files are not listed.
    """
    return json.loads(Path(__file__).with_name("official.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Split:
    """One file: its good rows and its bad rows, by row number. The row number is the `doc_id` of a run's samples."""

    file: Path
    rows: dict[int, dict[str, str]]
    bad: dict[int, str]

    @cached_property
    def prompts(self) -> dict[str, list[int]]:
        """Each prompt -> its row numbers."""
        numbers: dict[str, list[int]] = {}
        for i, row in self.rows.items():
            numbers.setdefault(row["prompt"], []).append(i)
        return numbers

    @cached_property
    def shingles(self) -> dict[str, Shingles]:
        """Each prompt -> its shingles."""
        return {prompt: shingles(prompt) for prompt in self.prompts}

    def rows_of(self, prompts: Iterable[str]) -> list[int]:
        """The numbers of all rows with one of these prompts."""
        return sorted(row for prompt in prompts for row in self.prompts[prompt])


# ---------------------------------------------------------------------------------------------------------- overlaps


def overlap(first: Split, second: Split) -> dict[str, Any]:
    """The rows of split `second` whose prompt is also in split `first`, exactly or nearly.

    Returns:
        "exact": the row numbers in `second`. "near": {"row", "twin", "similarity"} for the other rows of `second` with
        a similar prompt in `first`; "twin" is its row number there. "exact_prompts", "near_prompts": the numbers of
        different prompts.
    """
    exact = [prompt for prompt in second.prompts if prompt in first.prompts]
    rest = [prompt for prompt in second.prompts if prompt not in first.prompts]
    twins = similar(list(first.shingles.values()), [second.shingles[prompt] for prompt in rest])
    rows_of_first = list(first.prompts.values())
    near = [
        {"row": row, "twin": rows_of_first[i][0], "similarity": round(similarity, 4)}
        for j, (i, similarity) in twins.items()
        for row in second.prompts[rest[j]]
    ]
    return {
        "exact": second.rows_of(exact),
        "exact_prompts": len(exact),
        "near": sorted(near, key=lambda twin: twin["row"]),
        "near_prompts": len(twins),
    }


def overlaps_across(sets: Mapping[str, Mapping[str, Split]]) -> list[dict[str, Any]]:
    """The test rows of each set whose prompt is in the training rows of a different set, exactly or nearly.

    Args:
        sets: Name of a set -> its splits. Only train and test are read, if they exist.

    Returns:
        One dictionary for each pair of sets with an overlap: "test", "train": the names of the two sets; "rows": the
        number of test rows; "exact", "near": the row numbers of the test rows that are in the training rows. The pair
        with the largest share of test rows comes first.
    """
    trained, tested = (
        [(name, prompt) for name, splits in sets.items() if split in splits for prompt in splits[split].prompts]
        for split in ("train", "test")
    )
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    # Compare all sets at once: then one index of rare shingles serves every pair of sets.
    for i, j, _ in similar_pairs(
        [sets[name]["train"].shingles[prompt] for name, prompt in trained],
        [sets[name]["test"].shingles[prompt] for name, prompt in tested],
    ):
        (train, seen), (test, prompt) = trained[i], tested[j]
        if train != test:
            kinds = found.setdefault((test, train), {"exact": set(), "near": set()})
            kinds["exact" if seen == prompt else "near"].add(prompt)
    rows = []
    for (test, train), kinds in found.items():
        split = sets[test]["test"]
        exact, near = split.rows_of(kinds["exact"]), split.rows_of(kinds["near"] - kinds["exact"])
        rows.append({"test": test, "train": train, "rows": len(split.rows), "exact": exact, "near": near})
    return sorted(rows, key=lambda r: (-(len(r["exact"]) + len(r["near"])) / r["rows"], r["test"], r["train"]))


def _leaked(overlaps: dict[str, dict[str, Any]]) -> dict[str, Any]:
    leaked: dict[str, Any] = {"exact": [], "near": [], "other_variant": [], "other_tasks": {}}
    for pair, both in overlaps.items():
        near = [twin["row"] for twin in both["near"]]
        if pair == "train/test":
            leaked |= {"exact": both["exact"], "near": near}
        elif pair.endswith("train/test"):
            leaked["other_variant"] = sorted([*both["exact"], *near])
    return leaked


# -------------------------------------------------------------------------------------------------------- the audit


def audit(
    root: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_length: int = 1024,
    max_answer_length: int = 512,
    against: Sequence[Path] = (),
) -> dict[str, Any]:
    """Audits a data set and, if it is in or next to the data set, its reasoning variant (as the tasks reasoning_*).

    Args:
        root: A folder in the official layout, or CL_Benchmark. Tasks and splits may be missing.
        tokenizer: Counts the tokens of prompts, as they are tested, and of answers; None = only characters are counted.
        max_prompt_length: The most tokens of a prompt, as in a run.
        max_answer_length: The most tokens of an answer, including EOS.
        against: More data sets, which are searched for rows that they share with this one.

    Returns:
        A report that can be written as JSON. "tasks": task -> {"splits": split -> its facts, None if it is missing;
        "overlaps": pair of splits -> `overlap`; "fingerprint": of its three files, or of its rows for CL_Benchmark}.
        "equal": the tasks whose eval and test rows are the same. "leaked": task -> row numbers of the test rows that
        are also training rows. "across": the result of `overlaps_across` for different tasks and data sets. "missing":
        the missing tasks. "unreadable": the problems of files that cannot be read.
    """
    reasoning, folders = _find(root)
    unreadable: list[str] = []
    read = {task: _read(folder, SPLITS, unreadable) for task, folder in folders.items() if folder.is_dir()}
    limits = {"prompt": max_prompt_length, "answer": max_answer_length - 1}  # EOS takes one
    tasks: dict[str, dict[str, Any]] = {}
    for task, splits in tqdm(read.items(), unit="task", disable=None):  # no bar if stderr is no terminal
        overlaps = {f"{a}/{b}": overlap(splits[a], splits[b]) for a, b in PAIRS if a in splits and b in splits}
        other = read.get(OTHER_VARIANT.get(task, ""), {})
        if "test" in splits and "train" in other:
            overlaps[f"{task_variant(OTHER_VARIANT[task])} train/test"] = overlap(other["train"], splits["test"])
        tasks[task] = {
            "fingerprint": _fingerprint(task, folders[task], splits),
            "splits": {s: _facts(task, splits[s], tokenizer, limits) if s in splits else None for s in SPLITS},
            "overlaps": overlaps,
        }
    leaked = {task: _leaked(facts["overlaps"]) for task, facts in tasks.items()}
    roots = list(dict.fromkeys(path.resolve() for path in (root, reasoning, *against) if path))
    across = _across(read, folders, roots, leaked, unreadable)
    return {
        "source": str(root),
        "reasoning": str(reasoning) if reasoning else None,
        "demo": is_demo(root),
        "tokenizer": tokenizer.name_or_path if tokenizer else None,
        "max_prompt_length": max_prompt_length,
        "max_answer_length": max_answer_length,
        "near": f"Jaccard similarity of the runs of {SHINGLE} words at least {SIMILAR}",
        "tasks": tasks,
        "equal": [task for task, splits in read.items() if _are_equal(splits.get("eval"), splits.get("test"))],
        "leaked": leaked,
        "across": across,
        "missing": [task for task in folders if task not in read],
        "unreadable": unreadable,
    }


def _fingerprint(task: str, folder: Path, splits: dict[str, Split]) -> str | None:
    """The fingerprint of a task's rows, as in a run's manifest. None if splits are missing."""
    if task in CL_BENCHMARK:
        whole = not any(split.bad for split in splits.values())
        rows = [splits[name].rows.values() for name in ("train", "test") if name in splits]
        return rows_digest(rows) if whole and len(rows) == 2 else None
    return folder_fingerprint(folder) if len(splits) == len(SPLITS) else None


def _are_equal(first: Split | None, second: Split | None) -> bool:
    return first is not None and second is not None and (first.rows, first.bad) == (second.rows, second.bad)


def _find(root: Path) -> tuple[Path | None, dict[str, Path]]:
    """The reasoning variant in or next to a data set, if there is one, and task -> folder for both variants."""
    if is_cl_benchmark(root):
        return None, {task: root / folder for task, folder in CL_BENCHMARK.items()}
    try:
        reasoning = find_reasoning(root)
    except DataError:
        if os.environ.get("TRACE_REASONING"):
            raise
        reasoning = None
    folders: dict[str, Path] = {}
    for plain, reasoned in zip(FOLDERS, REASONING, strict=True):
        folders |= {} if root == reasoning else {plain: root / FOLDERS[plain]}
        folders |= {reasoned: reasoning / REASONING[reasoned]} if reasoning else {}
    return reasoning, folders


def _across(
    read: dict[str, dict[str, Split]],
    folders: dict[str, Path],
    roots: Sequence[Path],
    leaked: dict[str, dict[str, Any]],
    unreadable: list[str],
) -> list[dict[str, Any]]:
    """The overlaps between different tasks and data sets. Those between two audited tasks are added to `leaked`."""
    task_of = {_set_name(folders[task].resolve(), roots): task for task in read}  # two tasks may be links to one folder
    sets = {name: read[task] for name, task in task_of.items()}
    for folder in [root / name for root in roots for name in (*FOLDERS.values(), *CL_BENCHMARK.values())]:
        if (name := _set_name(folder, roots)) not in sets:
            sets[name] = _read(folder, ("train", "test"), unreadable)
    across = []
    for both in overlaps_across(sets):
        test, train = task_of.get(both["test"], ""), task_of.get(both["train"], "")
        if not train or OTHER_VARIANT.get(test) != train:
            across.append(both)
            if test and train:
                leaked[test]["other_tasks"][train] = sorted([*both["exact"], *both["near"]])
    return across


def _read(folder: Path, names: Iterable[str], unreadable: list[str]) -> dict[str, Split]:
    """Reads the existing splits. The problems of those that cannot be read are added to `unreadable`."""
    splits = {}
    pack = "/".join(folder.parts[-2:]) in CL_BENCHMARK.values()
    for split in names:
        file = folder / f"{FILES[split] if pack else split}.json"
        if file.is_file():
            try:
                splits[split] = Split(file, *(read_file(folder, split) if pack else sift_rows(file)))
            except DataError as e:
                unreadable.append(str(e))
    return splits


def _set_name(folder: Path, roots: Sequence[Path]) -> str:
    """A task's folder with the name of its data set, or the whole path if two data sets have the same name."""
    names = [root.name for root in roots]
    root = folder.parent if folder.parent.name in names else folder.parent.parent  # a set of CL_Benchmark
    return f"{root.name}/{folder.relative_to(root)}" if names.count(root.name) == 1 else str(folder)


# ---------------------------------------------------------------------------------------------------- facts of a file


def _facts(
    task: str, split: Split, tokenizer: PreTrainedTokenizerBase | None, limits: dict[str, int]
) -> dict[str, Any]:
    """The findings about one file; each is a list of rows."""
    rows = split.rows
    decisive = {i: _decisive(task, row["answer"]) for i, row in rows.items()}
    labels = Counter(decisive.values())
    offered = offered_labels(next(iter(split.prompts), ""))
    most, other = max(LABELS, len(offered) + 1), task_variant(OTHER_VARIANT.get(task, ""))

    def having(test: Callable[[dict[str, str]], object]) -> list[int]:
        return [i for i, row in rows.items() if test(row)]

    words = [i for i, answer in decisive.items() if not _DECIMAL.fullmatch(answer.strip())]
    broken = {i: (field, match) for i, row in rows.items() for field in row if (match := _MOJIBAKE.search(row[field]))}
    digest = sha256(split.file)
    return {
        "sha256": digest,
        "official": official().get(digest[:16]),
        "rows": len(rows) + len(split.bad),
        "unique_prompts": len(split.prompts),
        "repeated_rows": len(rows) - len({(row["prompt"], row["answer"]) for row in rows.values()}),
        "labels": dict(sorted(labels.items())) if len(labels) <= min(most, len(rows) / 2) else None,
        "bad_rows": [{"row": i, "problem": problem} for i, problem in split.bad.items()],
        "contradicting": [same for same in split.prompts.values() if len({decisive[i] for i in same}) > 1],
        "not_offered": having(lambda row: row["answer"] not in offered) if offered else [],
        "other_variant": [] if task in CL_BENCHMARK else having(lambda row: row_variant(_FOLDER[task], row) == other),
        "doubled_cue": having(lambda row: _DOUBLED_CUE.search(row["prompt"])),
        "mojibake": [
            {"row": i, "field": field, "text": match.string[max(0, match.start() - 20) : match.end() + 20]}
            for i, (field, match) in broken.items()
        ],
        "white_space": having(lambda row: row["answer"] != row["answer"].rstrip()),
        "floats": having(lambda row: _FLOAT.search(row["answer"])),
        "words": words if len(words) < len(rows) / 2 else [],
        **{f: _lengths([row[f] for row in rows.values()], f, tokenizer, limits[f]) for f in limits},
    }


def _decisive(task: str, answer: str) -> str:
    """The part of an answer that decides: the answer without its reasoning; for ScienceQA the letter."""
    if task in REASONING:
        return extract_answer(FRAMES[REASONING[task]].form, answer) or answer  # test answers have no marker
    return answer[:1] if task == "trace_scienceqa" else answer


def _lengths(
    texts: list[str], field: str, tokenizer: PreTrainedTokenizerBase | None, limit: int
) -> dict[str, dict[str, int]]:
    """Lengths in characters and, with a tokenizer, in tokens: of prompts as they are tested, of answers without EOS."""
    lengths = {"characters": _spread([len(text) for text in texts])}
    if tokenizer:
        tokens: dict[str, int] = {}
        unique = list(dict.fromkeys(texts))
        for batch in (unique[i : i + 256] for i in range(0, len(unique), 256)):
            as_answers = field == "answer"
            ids = tokenizer(batch, add_special_tokens=False).input_ids if as_answers else prompt_ids(tokenizer, batch)
            tokens |= zip(batch, map(len, ids), strict=True)
        sizes = [tokens[text] for text in texts]
        lengths["tokens"] = {**_spread(sizes), "cut": sum(size > limit for size in sizes)}
    return lengths


def _spread(sizes: list[int]) -> dict[str, int]:
    values = np.percentile(sizes, [50, 95, 100], method="inverted_cdf") if sizes else [0, 0, 0]
    return dict(zip(("median", "p95", "max"), map(int, values), strict=True))
