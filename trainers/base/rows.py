"""Chooses the rows of a task that are remembered, to train on them again."""

from __future__ import annotations

from collections import defaultdict

import torch
from datasets import Dataset

#: "first" is what the official TRACE code replays, "random" our default.
CHOICES = ["first", "random", "balanced"]


def choose_rows(rows: Dataset, count: int, how: str, seed: int) -> Dataset:
    """Chooses the rows of a task that are remembered, in the order of the data.

    Args:
        rows: Training examples with labels, as `CLTrainer.task_dataset` returns them.
        count: How many; all rows if there are fewer.
        how: See `ranked_rows`.
        seed: See `ranked_rows`.
    """
    return rows.select(sorted(ranked_rows(rows, how, seed)[:count]))


def ranked_rows(rows: Dataset, how: str, seed: int) -> list[int]:
    """The numbers of all rows, in the order in which they are remembered: the first n are a memory of n rows.

    Args:
        rows: Training examples with labels, as `CLTrainer.task_dataset` returns them.
        how: "first" (as the official code); "random" (our default); or "balanced": random, with equally many rows of
            each answer as far as possible. If all answers differ it is the same as "random".
        seed: Decides "random" and "balanced".
    """
    order = list(range(len(rows)))
    if how != "first":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    if how == "balanced":
        seen: dict[tuple[int, ...], int] = defaultdict(int)
        rank = {}
        labels = rows["labels"]
        for i in order:
            answer = tuple(label for label in labels[i] if label != -100)
            rank[i] = seen[answer]
            seen[answer] += 1
        order.sort(key=lambda i: rank[i])  # stable: first the first row of every answer, then the second ones
    return order
