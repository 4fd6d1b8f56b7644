"""Finds prompts that are nearly the same: exact Jaccard similarity of runs of words, without comparing all pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trace_tasks.answers import nfkc

#: Two prompts are nearly the same if their shingles have at least this Jaccard similarity. A shingle is a run of
#: `SHINGLE` words.
SIMILAR = 0.9
SHINGLE = 3

# The frame of the question in the official prompts: an instruction before it, a cue for the answer after it.
_INSTRUCTION = re.compile(
    r"\A(?:判断以下文本对指定对象的态度|What is the monetary policy stance|Write a summary of|Complete the next line|"
    r"Choose an answer for|Solve the following math problem|Provide a simplified version)[^\n]*\n+"
    r"|\ATask:\w+\nDataset:[^\n]+\n(?:[^\n]*\nOption: [^\n]*\n)?"  # CL_Benchmark
)
_CUE = re.compile(
    r"(?:\n(?:态度|推理|Stance|Summary|Answer|Simplification|Reasoning)[:：])(?:(?:Reasoning|推理)[:：])*\s*\Z"
)
# Chinese and Japanese have no spaces, so each character is a word. Signs with a meaning in formulas are words, too.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+|[+<=>|~^$€£]")

Shingles = NDArray[np.uint64]


def words(prompt: str) -> list[str]:
    """The words of a prompt's question, without instruction, cue and punctuation, in one case and one Unicode form."""
    question = _CUE.sub("", _INSTRUCTION.sub("", prompt, count=1))
    return _WORD.findall(nfkc(question).casefold())


def shingles(prompt: str) -> Shingles:
    """The sorted, distinct hashes of all runs of `SHINGLE` words of a prompt, or of its words if it has fewer."""
    hashes = np.fromiter(map(hash, words(prompt)), np.int64).view(np.uint64)
    if len(hashes) >= SHINGLE:
        runs = np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE)
        hashes = runs @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 1], np.uint64)  # modulo 2^64
    return np.unique(hashes)


def similar(
    first: Sequence[Shingles], second: Sequence[Shingles], threshold: float = SIMILAR
) -> dict[int, tuple[int, float]]:
    """The best of `similar_pairs` for each set of `second`: index in `second` -> (index in `first`, similarity)."""
    found: dict[int, tuple[int, float]] = {}
    for i, j, similarity in similar_pairs(first, second, threshold):
        if j not in found or similarity > found[j][1]:
            found[j] = (i, similarity)
    return found


def similar_pairs(
    first: Sequence[Shingles], second: Sequence[Shingles], threshold: float = SIMILAR
) -> Iterator[tuple[int, int, float]]:
    """All pairs of a sorted set of `first` and one of `second` with at least this Jaccard similarity.

    The result is exact, and few pairs are compared: two sets of similarity t share an element among the rarest
    n - ceil(t n) + 1 of each set of n elements (prefix filtering, Bayardo et al. 2007).

    Yields:
        Index in `first`, index in `second`, similarity; in the order of `second`, then of `first`.
    """
    if not first or not second:
        return
    # The frequencies only decide the order, so it is enough to count by the first bits, which tell most shingles apart.
    every = np.concatenate([*first, *second])
    bits = len(every).bit_length()

    def bucket(s: Shingles) -> NDArray[np.int64]:
        return (s >> np.uint64(64 - bits)).astype(np.int64)

    frequency = np.bincount(bucket(every), minlength=2**bits)

    def rarest(s: Shingles) -> list[int]:
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
