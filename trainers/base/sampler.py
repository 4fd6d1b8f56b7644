"""The order of the rows: batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class LengthGrouped(Sampler[int]):
    """Batches of rows of similar length, in random order, a different one in each epoch.

    The rows are shuffled and sorted by length within windows of `window` batches; then the batches are shuffled. HF's
    own sampler sorts at most a quarter of the rows at a time, so a small stage is hardly grouped, and its windows begin
    with their longest batch.
    """

    def __init__(self, lengths: list[int], size: int, seed: int, window: int = 50) -> None:
        self.lengths, self.size, self.seed, self.window = lengths, size, seed, window
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader. The order depends on the seed and the epoch only, so a resumed epoch keeps it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=random).tolist()
        whole = len(order) // self.size * self.size
        batches = []
        for start in range(0, whole, self.size * self.window):
            rows = sorted(order[start : min(start + self.size * self.window, whole)], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.size] for i in range(0, len(rows), self.size)]
        for i in torch.randperm(len(batches), generator=random).tolist():
            yield from batches[i]
        yield from order[whole:]  # an incomplete batch can only be the last one
