"""The audit of a TRACE data set: what is in it that a score depends on, above all test rows that are trained on.

    trace-bench data audit [SOURCE] [--against SOURCE ...] [--tokenizer MODEL] [--output FILE.json]
    trace-bench report RUN --without-leaked FILE.json

`data.check` refuses a data set at its first bad row. The audit reads what is there and reports: repeated rows,
contradicting answers, overlaps of the splits, lengths, broken characters, rows of the other variant.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trace_bench import data, shapes
from trace_bench.evaluate import _stderr
from trace_bench.models import QUICKSTART, ModelError, load_tokenizer, resolve_model
from trace_bench.run import Run, RunError, fingerprint, read_json
from trace_tasks import scoring
from trace_tasks.reasoning import FRAMES, row_variant
from trace_tasks.tokens import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Two prompts are nearly the same from this Jaccard similarity of their shingles on. A shingle is so many words.
SIMILAR = 0.9
SHINGLE = 3
#: The overlaps that are looked for. Only the first one makes test rows leaked: nothing is trained or chosen on eval.
PAIRS = (("train", "test"), ("train", "eval"), ("eval", "test"))
#: At most so many different answers, each twice or more on average, are labels, whose balance is counted.
LABELS = 10

# SHA-256 (16 digits) of official files: train, eval, test. Those of the 500 variant are in two public copies of the
# archive that do not know of each other, those of the 5000 variant in one. Other official files are not known here.
_OFFICIAL = {
    "LLM-CL-Benchmark_500": """
        C-STANCE    646ccbb96141b50f 175efa6b3ace29e9 fb29ad754a99f811
        FOMC        ad55548875b28afb bc258307c34bb277 8b257fcda84600ce
        MeetingBank 807d84a23285ee41 2aa60d6d97043f52 11715340354cecc0
        Py150       8a5439ee66d957f9 029302d12cda5332 418a4767caad60dd
        ScienceQA   8f796547542ffdf8 e4cf69626f1163be ed1314220ee5f370
        NumGLUE-cm  722bbb05819949ff 87edcff354115a4c 52a3fd70e1499530
        NumGLUE-ds  4eaff949885eef27 c787627006e4f615 8d74f9d2406df790
        20Minuten   f83be5bd734942d5 16e12c727a032471 c9ec851c744e3ae8
    """,
    "LLM-CL-Benchmark_5000": """
        C-STANCE    a67441f42a1c6e34 713a0ff3d81bcbbc fdb99faa91678559
        NumGLUE-cm  cc14f25cd7b768ef a6141669d310a778 a0a6c1e4a2f59b0a
        20Minuten   -                1b22612cf2c4316d a7c617d5c332df37
    """,
}
OFFICIAL = {
    digest: f"{variant}/{line.split()[0]}/{split}.json"
    for variant, table in _OFFICIAL.items()
    for line in table.strip().splitlines()
    for split, digest in zip(data.SPLITS, line.split()[1:], strict=True)
    if digest != "-"
}

# What frames the question in the official prompts: an instruction in front, a cue for the answer behind.
_INSTRUCTION = re.compile(
    r"\A(?:判断以下文本对指定对象的态度|What is the monetary policy stance|Write a summary of|Complete the next line|"
    r"Choose an answer for|Solve the following math problem|Provide a simplified version)[^\n]*\n+"
)
_CUE = re.compile(
    r"(?:\n(?:态度|推理|Stance|Summary|Answer|Simplification|Reasoning)[:：])(?:(?:Reasoning|推理)[:：])*\s*\Z"
)
_DOUBLED_CUE = re.compile(r"(\b\w+[:：])\s*\1\s*\Z")
_OTHER_VARIANT = dict(zip([*data.FOLDERS, *data.REASONING], [*data.REASONING, *data.FOLDERS], strict=True))
# Chinese and Japanese write no spaces: there a character is a word. Signs that carry meaning in a formula are words.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+|[+<=>|~^$€£]")

# What cp1252 makes of the second and later bytes of a UTF-8 character.
_CONTINUED = "[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_MOJIBAKE = re.compile(
    "\ufffd"  # decoded with errors ignored
    "|[\u0080-\u009f]"  # control characters that no text holds: cp1252 read as Latin-1
    f"|[ÂÃ]{_CONTINUED}"  # UTF-8 read as cp1252: "Ã¼" for "ü"
    "|â€|â„¢|â‚¬|âˆ’|ï»¿|ï¿½"  # quotation marks and dashes ("â€™"), ™, €, minus, byte order mark
    f"|(?:[ä-é]{_CONTINUED}{{2}}){{2}}"  # two Chinese characters in a row
)
# 1.4300000000000002: a sum of binary fractions, written with all its digits.
# The look-behinds let a run of zeros be read once, not once for each of them.
_FLOAT = re.compile(r"\d\.(?=\d{12})\d*?(?:(?<!0)0{6,}+[1-9]|(?<!9)9{6,}+[0-8])\d{0,2}(?!\d)")
_DECIMAL = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")


# ------------------------------------------------------------------------------------------------------- similarity


def words(prompt: str) -> list[str]:
    """The words of a prompt's question: without instruction and cue, case, punctuation and forms of a character."""
    question = _CUE.sub("", _INSTRUCTION.sub("", prompt, count=1))
    return _WORD.findall(scoring.nfkc(question).casefold())


def shingles(prompt: str) -> NDArray[np.uint64]:
    """Hashes of all runs of `SHINGLE` words of a prompt (of the words, where it has fewer), sorted, each once."""
    hashes = np.fromiter(map(hash, words(prompt)), np.int64).view(np.uint64)
    if len(hashes) >= SHINGLE:
        runs = np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE)
        hashes = runs @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 1], np.uint64)  # modulo 2^64
    return np.unique(hashes)


def similar(
    first: Sequence[NDArray[np.uint64]], second: Sequence[NDArray[np.uint64]], threshold: float = SIMILAR
) -> dict[int, tuple[int, float]]:
    """The most similar set of `first` for each set of `second` that has one, by Jaccard similarity.

    Args:
        first: Sorted sets of shingles.
        second: The same.
        threshold: The least similarity t.

    Returns:
        Index in `second` -> (index in `first`, similarity).
    """
    found: dict[int, tuple[int, float]] = {}
    for i, j, similarity in similar_pairs(first, second, threshold):
        if j not in found or similarity > found[j][1]:
            found[j] = (i, similarity)
    return found


def similar_pairs(
    first: Sequence[NDArray[np.uint64]], second: Sequence[NDArray[np.uint64]], threshold: float = SIMILAR
) -> Iterator[tuple[int, int, float]]:
    """All pairs of a set of `first` and one of `second` with at least this Jaccard similarity.

    Exact, and quick since few pairs are looked at: two sets of similarity t have one of their rarest elements in
    common, among the first n - ceil(t n) + 1 of each (prefix filtering, Bayardo et al. 2007).

    Args:
        first: Sorted sets of shingles.
        second: The same.
        threshold: The least similarity t.

    Yields:
        Index in `first`, index in `second`, similarity; in the order of `second`, then of `first`.
    """
    if not first or not second:
        return
    # How often a shingle occurs only orders them, so it is counted by as many first bits as tell most of them apart.
    every = np.concatenate([*first, *second])
    bits = len(every).bit_length()

    def bucket(s: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (s >> np.uint64(64 - bits)).astype(np.int64)

    frequency = np.bincount(bucket(every), minlength=2**bits)

    def rarest(s: NDArray[np.uint64]) -> list[int]:
        n = len(s) - math.ceil(threshold * len(s) - 1e-9) + 1
        return s[np.lexsort((s, frequency[bucket(s)]))[:n]].tolist()

    index: dict[int, list[int]] = {}
    for i, s in enumerate(first):
        for element in rarest(s):
            index.setdefault(element, []).append(i)
    for j, s in enumerate(second):
        for i in sorted({i for element in rarest(s) for i in index.get(element, ())}):
            # Sets whose sizes differ too much need not be compared.
            if min(len(first[i]), len(s)) < threshold * max(len(first[i]), len(s)):
                continue
            common = len(np.intersect1d(first[i], s, assume_unique=True))
            similarity = common / (len(first[i]) + len(s) - common)
            if similarity >= threshold:
                yield i, j, similarity


@dataclass(frozen=True)
class Split:
    """One file: its good rows and its bad ones, by row number, which is the `doc_id` of a run's samples."""

    rows: dict[int, dict[str, str]]
    bad: dict[int, str]

    @classmethod
    def read(cls, file: Path) -> Split:
        """Reads a file.

        Raises:
            data.DataError: if it is no JSON list.
        """
        values = data.read_list(file)
        bad = {i: problem for i, value in enumerate(values) if (problem := data.row_problem(value))}
        return cls({i: value for i, value in enumerate(values) if i not in bad}, bad)

    @cached_property
    def prompts(self) -> dict[str, list[int]]:
        """Each prompt -> its row numbers."""
        numbers: dict[str, list[int]] = {}
        for i, row in self.rows.items():
            numbers.setdefault(row["prompt"], []).append(i)
        return numbers

    @cached_property
    def shingles(self) -> dict[str, NDArray[np.uint64]]:
        """Each prompt -> its shingles."""
        return {prompt: shingles(prompt) for prompt in self.prompts}


def overlap(first: Split, second: Split) -> dict[str, Any]:
    """The rows of a split whose prompt is in another split too, exactly or nearly.

    Returns:
        "exact": numbers of rows of `second`; "near": {"row", "twin", "similarity"} of its other rows that have a twin
        in `first`, "twin" being a row of that; "exact_prompts", "near_prompts": how many different prompts these are.
    """
    exact = [rows for prompt, rows in second.prompts.items() if prompt in first.prompts]
    rest = [prompt for prompt in second.prompts if prompt not in first.prompts]
    twins = similar(list(first.shingles.values()), [second.shingles[prompt] for prompt in rest])
    rows_of_first = list(first.prompts.values())
    near = [
        {"row": row, "twin": rows_of_first[i][0], "similarity": round(similarity, 4)}
        for j, (i, similarity) in twins.items()
        for row in second.prompts[rest[j]]
    ]
    return {
        "exact": sorted(row for rows in exact for row in rows),
        "exact_prompts": len(exact),
        "near": sorted(near, key=lambda twin: twin["row"]),
        "near_prompts": len(twins),
    }


def overlaps_across(sets: Mapping[str, Mapping[str, Split]]) -> list[dict[str, Any]]:
    """The test rows of each set whose prompt is in the training rows of another set, exactly or nearly.

    Args:
        sets: Name of a set -> its splits; train and test are looked at where they are there.

    Returns:
        {"test", "train": names of the two sets; "rows": how many test rows there are; "exact", "near": numbers of those
        that are in the other's training rows}, only of pairs that have some; the largest part of the test rows first.
    """
    trained = [
        (name, prompt) for name, splits in sets.items() if "train" in splits for prompt in splits["train"].prompts
    ]
    tested = [(name, prompt) for name, splits in sets.items() if "test" in splits for prompt in splits["test"].prompts]
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    # Pairs of all sets at once: the shingles that are rare in all of them are the same for each pair of sets.
    for i, j, _ in similar_pairs(
        [sets[name]["train"].shingles[prompt] for name, prompt in trained],
        [sets[name]["test"].shingles[prompt] for name, prompt in tested],
    ):
        (train, seen), (test, prompt) = trained[i], tested[j]
        if train != test:
            kinds = found.setdefault((test, train), {"exact": set(), "near": set()})
            kinds["exact" if seen == prompt else "near"].add(prompt)
    rows = [
        {
            "test": test,
            "train": train,
            "rows": len(sets[test]["test"].rows),
            **{
                kind: sorted(n for prompt in prompts for n in sets[test]["test"].prompts[prompt])
                for kind, prompts in (("exact", kinds["exact"]), ("near", kinds["near"] - kinds["exact"]))
            },
        }
        for (test, train), kinds in found.items()
    ]
    return sorted(rows, key=lambda r: (-(len(r["exact"]) + len(r["near"])) / r["rows"], r["test"], r["train"]))


# -------------------------------------------------------------------------------------------------------- the audit


def audit(
    root: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_length: int = 1024,
    max_answer_length: int = 512,
    against: Sequence[Path] = (),
) -> dict[str, Any]:
    """Audits a data set and, where it is in or beside it, its reasoning variant (as the tasks reasoning_*).

    Args:
        root: A folder in the official layout. It may hold only some of the tasks and splits.
        tokenizer: Counts the tokens of prompts, as they are tested, and of answers; None = characters only.
        max_prompt_length: The most tokens of a prompt, as in a run: longer ones are cut.
        max_answer_length: The most tokens of an answer, EOS included.
        against: More data sets in the official layout: other variants, whose training rows may hold test rows of this
            one, or the other way round.

    Returns:
        What can be written as JSON. "tasks": task -> {"splits": split -> its facts, None where it is missing;
        "overlaps": pair of splits -> `overlap`; "fingerprint": that of `data.data_fingerprint`, None where a split is
        missing}. "leaked": task -> numbers of the test rows that are in its training rows ("exact", "near"), in those
        of its other variant ("other_variant"), or in those of another task ("other_tasks": task -> numbers). "across":
        what `overlaps_across` found between different tasks and data sets, named "data set/folder"; the two variants
        of one task here are in "overlaps". "missing": tasks that are not there. "unreadable": what is wrong with files
        that are no JSON list.
    """
    reasoning = _find_reasoning(root)
    report: dict[str, Any] = {
        "source": str(root),
        "reasoning": str(reasoning) if reasoning else None,
        "demo": data.is_demo(root),
        "tokenizer": tokenizer.name_or_path if tokenizer else None,
        "max_prompt_length": max_prompt_length,
        "max_answer_length": max_answer_length,
        "near": f"Jaccard similarity of the runs of {SHINGLE} words at least {SIMILAR}",
        "tasks": {},
        "leaked": {},
        "across": [],
        "missing": [],
        "unreadable": [],
    }
    count_prompts, count_answers = _counters(tokenizer) if tokenizer else (None, None)

    def facts(task: str, file: Path, split: Split) -> dict[str, Any]:
        return {
            **_identity(file),
            **_facts(task, split),
            "prompt": _lengths(split, "prompt", count_prompts, max_prompt_length),
            "answer": _lengths(split, "answer", count_answers, max_answer_length - 1),  # EOS is one
        }

    roots = list(dict.fromkeys(path.resolve() for path in (root, reasoning, *against) if path))
    sets: dict[str, dict[str, Split]] = {}
    tasks_of: dict[str, str] = {}  # set -> task, of the data set that is audited
    tasks = list(zip(data.FOLDERS, data.REASONING, strict=True))
    for plain, reasoned in tqdm(tasks, unit="task", disable=None):  # no bar where nobody sees it
        folders = {} if root == reasoning else {plain: root / data.FOLDERS[plain]}
        if reasoning:
            folders[reasoned] = reasoning / data.REASONING[reasoned]
        splits: dict[str, dict[str, Split]] = {}
        for task, folder in folders.items():
            if not folder.is_dir():
                report["missing"].append(task)
                continue
            files = {split: folder / f"{split}.json" for split in data.SPLITS}
            mine = splits[task] = _read(files, report["unreadable"])
            name = _set_name(folder.resolve(), roots)
            sets[name], tasks_of[name] = mine, task
            report["tasks"][task] = {
                "fingerprint": fingerprint(folder, [f.name for f in files.values()])
                if len(mine) == len(files)
                else None,
                "splits": {s: facts(task, file, mine[s]) if s in mine else None for s, file in files.items()},
                "overlaps": {f"{a}/{b}": overlap(mine[a], mine[b]) for a, b in PAIRS if a in mine and b in mine},
            }
        for task, mine in splits.items():
            overlaps, other = report["tasks"][task]["overlaps"], splits.get(_OTHER_VARIANT[task], {})
            if "test" in mine and "train" in other:
                pair = f"{'plain' if task == reasoned else 'reasoning'} train/test"
                overlaps[pair] = overlap(other["train"], mine["test"])
            report["leaked"][task] = _leaked(overlaps)
    for path in roots:
        for folder in (path / name for name in data.FOLDERS.values()):
            if folder.is_dir() and _set_name(folder, roots) not in sets:
                files = {split: folder / f"{split}.json" for split in ("train", "test")}
                sets[_set_name(folder, roots)] = _read(files, report["unreadable"])
    for both in overlaps_across(sets):
        test, train = (tasks_of.get(both[split], "") for split in ("test", "train"))
        if _OTHER_VARIANT.get(test) != train:
            report["across"].append(both)
        if test and train and _OTHER_VARIANT[test] != train:
            report["leaked"][test]["other_tasks"][train] = sorted([*both["exact"], *both["near"]])
    return report


def _set_name(folder: Path, roots: Sequence[Path]) -> str:
    """A task's folder with the name of its data set, or the whole path where two data sets have the same name."""
    alone = [root.name for root in roots].count(folder.parent.name) == 1
    return f"{folder.parent.name}/{folder.name}" if alone else str(folder)


def _read(files: dict[str, Path], unreadable: list[str]) -> dict[str, Split]:
    """Reads the files that are there; what is wrong with those that cannot be read is added to `unreadable`."""
    splits = {}
    for split, file in files.items():
        if file.is_file():
            try:
                splits[split] = Split.read(file)
            except data.DataError as e:
                unreadable.append(str(e))
    return splits


def _leaked(overlaps: dict[str, dict[str, Any]]) -> dict[str, Any]:
    leaked: dict[str, Any] = {"exact": [], "near": [], "other_variant": [], "other_tasks": {}}
    for pair, both in overlaps.items():
        near = [twin["row"] for twin in both["near"]]
        if pair == "train/test":
            leaked |= {"exact": both["exact"], "near": near}
        elif pair.endswith("train/test"):
            leaked["other_variant"] = sorted([*both["exact"], *near])
    return leaked


def open_tokenizer(name: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; with no name that of the quickstart model, or None where it is not installed.

    Raises:
        ModelError: if a named model or its tokenizer cannot be had.
    """
    try:
        path = resolve_model(name or QUICKSTART)
    except ModelError:
        if name:
            raise
        return None
    return load_tokenizer(path)


def _find_reasoning(root: Path) -> Path | None:
    try:
        return data.find_reasoning(root)
    except data.DataError:
        if os.environ.get("TRACE_REASONING"):
            raise
        return None


def _identity(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"sha256": digest, "official": OFFICIAL.get(digest[:16])}


def _facts(task: str, split: Split) -> dict[str, Any]:
    """What there is to say of one file but for lengths; every finding is a list of rows."""
    rows = split.rows
    decisive = {i: _decisive(task, row["answer"]) for i, row in rows.items()}
    labels = Counter(decisive.values())

    def having(test: Callable[[dict[str, str]], object]) -> list[int]:
        return [i for i, row in rows.items() if test(row)]

    folder = {**data.FOLDERS, **data.REASONING}[task]
    words = [i for i, answer in decisive.items() if not _DECIMAL.fullmatch(answer.strip())]
    broken = {i: (field, match) for i, row in rows.items() for field in row if (match := _MOJIBAKE.search(row[field]))}
    return {
        "rows": len(rows) + len(split.bad),
        "unique_prompts": len(split.prompts),
        "repeated_rows": len(rows) - len({(row["prompt"], row["answer"]) for row in rows.values()}),
        "labels": dict(sorted(labels.items())) if len(labels) <= min(LABELS, len(rows) / 2) else None,
        "bad_rows": [{"row": i, "problem": problem} for i, problem in split.bad.items()],
        "contradicting": [same for same in split.prompts.values() if len({decisive[i] for i in same}) > 1],
        "other_variant": having(lambda row: row_variant(folder, row) == data.task_variant(_OTHER_VARIANT[task])),
        "doubled_cue": having(lambda row: _DOUBLED_CUE.search(row["prompt"])),
        "mojibake": [
            {"row": i, "field": field, "text": match.string[max(0, match.start() - 20) : match.end() + 20]}
            for i, (field, match) in broken.items()
        ],
        "white_space": having(lambda row: row["answer"] != row["answer"].rstrip()),
        "floats": having(lambda row: _FLOAT.search(row["answer"])),
        "words": words if len(words) < len(rows) / 2 else [],
    }


def _decisive(task: str, answer: str) -> str:
    """The part of an answer that decides: without the reasoning; of ScienceQA the letter."""
    if task in data.REASONING:
        return scoring.extract_answer(FRAMES[data.REASONING[task]].form, answer) or answer  # test answers are bare
    return answer[:1] if task == "trace_scienceqa" else answer


def _lengths(
    split: Split, field: str, count: Callable[[list[str]], list[int]] | None, limit: int
) -> dict[str, dict[str, int]]:
    texts = [row[field] for row in split.rows.values()]
    lengths = {"characters": _spread([len(text) for text in texts])}
    if count:
        unique = list(dict.fromkeys(texts))
        batches = [unique[i : i + 256] for i in range(0, len(unique), 256)]
        tokens = dict(zip(unique, (n for batch in batches for n in count(batch)), strict=True))
        sizes = [tokens[text] for text in texts]
        lengths["tokens"] = {**_spread(sizes), "cut": sum(size > limit for size in sizes)}
    return lengths


def _spread(sizes: list[int]) -> dict[str, int]:
    values = np.percentile(sizes, [50, 95, 100], method="inverted_cdf") if sizes else [0, 0, 0]
    return dict(zip(("median", "p95", "max"), map(int, values), strict=True))


def _counters(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[list[str]], list[int]], ...]:
    """Functions that count the tokens of prompts, as they are tested, and of answers, without EOS."""

    def prompts(texts: list[str]) -> list[int]:
        return [len(ids) for ids in prompt_ids(tokenizer, texts)]

    def answers(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]

    return prompts, answers


# --------------------------------------------------------------------------------------------------------- as text

#: The findings of a file, and how they are told.
_FINDINGS = {
    "bad_rows": "rows that are left out here since they cannot be used",
    "contradicting": "prompts with different answers",
    "other_variant": "rows of the other variant (asking for reasoning, or not)",
    "doubled_cue": "prompts with the cue for the answer twice",
    "mojibake": "rows with broken characters",
    "white_space": "answers that end in white space",
    "floats": "answers with a number such as 1.4300000000000002",
    "words": "answers that are no number, where most are one",
}


def as_text(report: dict[str, Any]) -> str:
    """What `audit` found, for reading: a table for each task, and below it what is worth a look."""
    unit = "tokens" if report["tokenizer"] else "characters"
    lines = [report["source"] + (" (demo data made by this program)" if report["demo"] else "")]
    if report["tokenizer"]:
        lines.append(
            f"Lengths in tokens of {report['tokenizer']}; cut: prompts longer than {report['max_prompt_length']}, "
            f"answers longer than {report['max_answer_length']} with EOS."
        )
    else:
        lines.append("Lengths in characters, as there is no tokenizer at hand (--tokenizer MODEL).")
    for task, found in report["tasks"].items():
        lines += ["", *_table(task, found["splits"], unit), *_findings(found)]
    lines.append("")
    if report["missing"]:
        lines.append(f"Not there: {', '.join(report['missing'])}.")
    lines += [f"Unreadable: {problem}" for problem in report["unreadable"]]
    leaked = {task: (len(rows["exact"]), len(rows["near"])) for task, rows in report["leaked"].items()}
    counts = "; ".join(f"{task} {exact} and nearly {near}" for task, (exact, near) in leaked.items() if exact or near)
    lines.append(f"Test rows whose prompt is in the training rows: {counts or 'none'}.")
    if report["across"]:
        lines.append("Test rows whose prompt is in the training rows of another task or data set:")
        lines += [
            f"  {both['test']} test in {both['train']} train: {len(both['exact'])} and nearly {len(both['near'])} of "
            f"{both['rows']}"
            for both in report["across"]
        ]
    else:
        lines.append("Test rows whose prompt is in the training rows of another task or data set: none.")
    return "\n".join(lines)


def _table(task: str, splits: dict[str, dict[str, Any] | None], unit: str) -> Iterator[str]:
    sizes = ["median", "95 %", "max", *(["cut"] if unit == "tokens" else [])]
    head = [f"{field} {sizes[0]}" if i == 0 else name for field in ("prompt", "answer") for i, name in enumerate(sizes)]
    yield f"{task:<22}{'rows':>6}{'prompts':>9} " + "".join(f"{h:>{max(8, len(h) + 2)}}" for h in head) + "  file"
    for split, facts in splits.items():
        if facts is None:
            yield f"  {split:<20}  missing"
            continue
        numbers = [n for field in ("prompt", "answer") for n in facts[field][unit].values()]
        cells = "".join(f"{n:>{max(8, len(h) + 2)}}" for n, h in zip(numbers, head, strict=True))
        official = f"  official: {facts['official']}" if facts["official"] else ""
        yield f"  {split:<20}{facts['rows']:>6}{facts['unique_prompts']:>9} {cells}  {facts['sha256'][:16]}{official}"


def _findings(found: dict[str, Any]) -> Iterator[str]:
    splits = {split: facts for split, facts in found["splits"].items() if facts}
    labels = [
        f"{split} " + ", ".join(f"{label!r} {n}" for label, n in facts["labels"].items())
        for split, facts in splits.items()
        if facts["labels"]
    ]
    if labels:
        yield f"  answers: {'; '.join(labels)}"
    for pair, both in found["overlaps"].items():
        if both["exact"] or both["near"]:
            a, b = pair.split("/")
            same = f"{len(both['exact'])} ({both['exact_prompts']} prompts), nearly {len(both['near'])}"
            yield f"  {pair}: rows of {b} that are in {a}: " + (same if " " not in a else str(len(both["near"])))
    for key, what in _FINDINGS.items():
        counts = ", ".join(f"{split} {len(facts[key])}" for split, facts in splits.items() if facts[key])
        if counts:
            first = next(facts[key][0] for facts in splits.values() if facts[key])
            example = {"bad_rows": "problem", "mojibake": "text"}.get(key)
            yield f"  {what}: {counts}" + (f", as {first[example]!r}" if example else "")


# ------------------------------------------------------------------------------------------- scores without leaked rows


def without_leaked(run: Run, file: Path) -> Run:
    """The run as seen without its leaked test rows: `report` then makes all scores from the other rows.

    Left out are the test rows whose prompt is in the training rows of the task, exactly or nearly; where the run
    trains on the task's other variant or on other tasks as well, also those that are in their training rows. All rows
    of the training file count, though a run may train on the first of them only. Near ones are left out with the exact
    ones: one that is no leak costs a row of precision, one that stays counts what was memorised.

    Args:
        run: A run with samples.
        file: An audit of the run's data, as `trace-bench data audit --output` writes it.

    Raises:
        RunError: if the file is no audit, or one of other data than the run's.
    """
    prints = {k: v for k, v in run.manifest["data"]["fingerprint"].items() if data.needs_data([k])}
    if not prints:
        raise RunError(f"{run.path} has none of the TRACE tasks, so there are no leaked rows to leave out.")
    try:
        found = read_json(file)
        shapes.check(shapes.Audit, found)
    except (OSError, ValueError) as e:
        raise RunError(f"{file} is no audit ({e}). Make one: trace-bench data audit SOURCE --output {file}") from e
    others = [task for task in prints if found["tasks"].get(task, {}).get("fingerprint") != prints[task]]
    if others:
        raise RunError(
            f"{file} is an audit of {found['source']}, which is not the data of {run.path} in: {', '.join(others)}. "
            f"Audit the run's own: trace-bench data audit {run.manifest['data']['path']} --output {file}"
        )
    left_out = {}
    for task in prints:
        rows = found["leaked"][task]
        other_variant = rows["other_variant"] if _OTHER_VARIANT[task] in run.tasks else []
        tasks = rows.get("other_tasks", {})  # older audits have none
        of_other_tasks = [row for other in tasks if other in run.tasks for row in tasks[other]]
        left_out[task] = {*rows["exact"], *rows["near"], *other_variant, *of_other_tasks}
    return replace(run, left_out=left_out)


def without_rows(cell: dict[str, Any], samples: Iterable[dict[str, Any]], left_out: Collection[int]) -> dict[str, Any]:
    """A cell of the matrix made anew from some of its rows.

    Args:
        cell: The content of its eval file; each metric is a mean over rows.
        samples: The rows of its samples file.
        left_out: `doc_id` of the rows that do not count.

    Returns:
        Another cell, with "n_left_out" beside the "n" rows that count. Without any of these, its values are None; so
        is that of a metric whose rows are no numbers, such as BLEU's.
    """
    rows = [row for row in samples if row["doc_id"] not in left_out]

    def mean(values: list[Any]) -> float | None:
        return sum(values) / len(values) if values and not any(isinstance(v, list) for v in values) else None

    return cell | {
        "n": len(rows),
        "n_left_out": cell["n"] - len(rows),
        "metrics": {
            name: {
                "value": mean([row[name] for row in rows]),
                "stderr": _stderr([row[name] for row in rows]),
            }
            for name in cell["metrics"]
        },
    }
