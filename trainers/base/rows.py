"""Which rows of a task are remembered, for whoever trains on them again."""

from __future__ import annotations

from collections import defaultdict

import torch
from datasets import Dataset

#: "first" is what the official TRACE code replays, "random" our default.
CHOICES = ["first", "random", "balanced"]


def choose_rows(rows: Dataset, count: int, how: str, seed: int) -> Dataset:
    """Chooses the rows of a task that are remembered, at most all of them, in the order of the data.

    Args:
        rows: Training examples with labels, as `CLTrainer.task_dataset` returns them.
        count: How many.
        how: See `ranked_rows`.
        seed: See `ranked_rows`.
    """
    return rows.select(sorted(ranked_rows(rows, how, seed)[:count]))


def ranked_rows(rows: Dataset, how: str, seed: int) -> list[int]:
    """The numbers of all rows, those first that are remembered first.

    Args:
        rows: Training examples with labels, as `CLTrainer.task_dataset` returns them.
        how: "first" (the official code's); "random" (ours); or "balanced": random, equally many of each answer as far
            as there are any. Where every row has an answer of its own this is "random".
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
        order.sort(key=lambda i: rank[i])  # stable: all first ones, then all second ones
    return order
