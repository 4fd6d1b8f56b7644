"""Merges adapters into full models on the disk, for an engine that takes only these; on a GPU one stage ahead."""

from __future__ import annotations

import atexit
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from trace_bench.ending import start_child
from trace_bench.engine import models
from trace_bench.engine.gpu import has_gpu
from trace_tasks.data.files import temporary_dir

log = logging.getLogger(__name__)

_MERGE = "import json, sys; from trace_bench.engine import models; print(models.save_merged(**json.loads(sys.argv[1])))"
#: The share of an update that rounding may lose before a warning says so.
MOST_LOST = 0.05


def _folder() -> AbstractContextManager[Path]:
    return temporary_dir(Path(tempfile.gettempdir()), "trace-merged-")


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


class Merging:
    """Merges adapters into one base model.

    `dtype` is the precision of the engine, in which merged weights are written; auto = that of the base model's file.
    """

    def __init__(self, base: str, revision: str | None, trust_remote_code: bool, dtype: str = "auto") -> None:
        self._model = {"base": base, "revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype}
        self._ahead: tuple[Path, Path, subprocess.Popen] | None = None
        #: Ends the process that merges ahead, and removes its folder.
        self._until_taken = ExitStack()
        atexit.register(self._until_taken.close)

    def prepare(self, adapter: Path, below: Sequence[Path] = ()) -> None:
        """Starts to merge the adapter that is needed next, in a separate process."""
        if not has_gpu():  # on a CPU merging would slow the engine down
            return
        self._until_taken.close()
        folder = self._until_taken.enter_context(_folder())
        # Not in a thread: transformers changes global settings while it loads a model.
        command = [sys.executable, "-c", _MERGE, json.dumps(self._arguments(adapter, below, folder))]
        process = start_child(command, stdout=subprocess.PIPE, text=True)
        self._until_taken.callback(_end, process)
        self._ahead = adapter, folder, process

    def forget(self) -> None:
        """Discards a model that was merged ahead but not used."""
        self._ahead = None
        self._until_taken.close()

    @contextmanager
    def full_model(self, adapter: Path, below: Sequence[Path] = ()) -> Iterator[tuple[str, float]]:
        """A temporary folder with the merged model, and the share of the update that its rounding lost."""
        ahead, self._ahead = self._ahead, None
        with self._until_taken:
            if ahead and ahead[0] == adapter and ahead[2].wait() == 0:
                assert ahead[2].stdout is not None
                *_, lost = ahead[2].stdout.read().split()  # the last word: a library may have printed something
                yield str(ahead[1]), _checked(adapter, float(lost))
                return
        with _folder() as folder:
            yield str(folder), _checked(adapter, models.save_merged(**self._arguments(adapter, below, folder)))

    def _arguments(self, adapter: Path, below: Sequence[Path], folder: Path) -> dict:
        paths = {"checkpoint": str(adapter), "folder": str(folder), "below": [str(path) for path in below]}
        return {**self._model, **paths}


def _checked(adapter: Path, lost: float) -> float:
    if lost > MOST_LOST:
        log.warning(
            "%s loses %.0f %% of its update when it is merged into weights of the engine's precision. Evaluate "
            "with --backend hf, which does not merge.",
            adapter,
            100 * lost,
        )
    return round(lost, 5)
