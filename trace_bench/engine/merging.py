"""Merged adapters on the disk, for an engine that takes full models only; made ahead where that costs it nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trace_bench import models
from trace_bench.engine.start import has_gpu

log = logging.getLogger(__name__)

_MERGE = "import json, sys; from trace_bench import models; print(models.save_merged(**json.loads(sys.argv[1])))"
#: The share of an update that rounding may lose before a warning says so.
MOST_LOST = 0.05


@dataclass
class Merging:
    """Merges adapters into one base model."""

    base: str
    revision: str | None
    trust_remote_code: bool
    dtype: str = "auto"
    """The precision of the engine, in which the merged weights are written; auto = that of the base model's file."""
    _ahead: tuple[Path, tempfile.TemporaryDirectory, subprocess.Popen] | None = None

    def prepare(self, adapter: Path, below: Sequence[Path] = ()) -> None:
        """Begins to merge the adapter that is needed next, in a process of its own."""
        # On a CPU merging would take from the engine what it needs itself.
        if has_gpu():
            folder = tempfile.TemporaryDirectory(prefix="trace-merged-")
            # Not in a thread: transformers loads models under settings that hold for all threads.
            command = [sys.executable, "-c", _MERGE, json.dumps(self._arguments(adapter, below, folder.name))]
            self._ahead = adapter, folder, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    @contextmanager
    def full_model(self, adapter: Path, below: Sequence[Path] = ()) -> Iterator[tuple[str, float]]:
        """A temporary folder with the merged model, and the share of the update that its rounding lost."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == adapter and ahead[2].wait() == 0:
            assert ahead[2].stdout is not None
            with ahead[1] as folder:
                yield folder, self._checked(adapter, float(ahead[2].stdout.read()))
            return
        with tempfile.TemporaryDirectory(prefix="trace-merged-") as folder:
            yield folder, self._checked(adapter, models.save_merged(**self._arguments(adapter, below, folder)))

    def _arguments(self, adapter: Path, below: Sequence[Path], folder: str) -> dict:
        return {
            "base": self.base,
            "checkpoint": str(adapter),
            "folder": folder,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "below": [str(path) for path in below],
            "dtype": self.dtype,
        }

    @staticmethod
    def _checked(adapter: Path, lost: float) -> float:
        if lost > MOST_LOST:
            log.warning(
                "Merged into weights of the engine's precision, %s loses %.0f %% of its update. Evaluate with "
                "--backend hf, which does not merge.",
                adapter,
                100 * lost,
            )
        return round(lost, 5)
