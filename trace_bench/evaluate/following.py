"""`trace-bench evaluate RUN --follow`: each stage is evaluated as soon as it is trained, by another process.

The disk is the interface here, too: a stage is trained when its train.json exists, and the training is running while
its lock is held. Nothing is locked while this process waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_bench import records
from trace_bench.evaluate.filling import fill
from trace_bench.run import Run, RunError, Stage
from trace_bench.status import SILENT, progress_of, training
from trace_bench.text import printable, word
from trace_bench.waiting import InUse, in_use
from trace_tasks.errors import TraceError

log = logging.getLogger(__name__)

#: Seconds between two looks at the run.
POLL = 5.0
#: A training counts as ended after so many seconds without its lock: a restarted one takes time to lock it again.
GRACE = 60.0


@dataclass
class _Watch:
    """The state of the run at the last look.

    Attributes:
        ready: Stages that can be evaluated -> the fingerprint of their weights.
        missing: Stages that are not trained yet.
    """

    path: Path
    wanted: list[int] | None
    run: Run | None = None
    ready: dict[Stage, str | None] = field(default_factory=dict)
    missing: list[Stage] = field(default_factory=list)
    _sign: Any = None
    _alive: float = 0.0
    _said: str = ""

    def look(self) -> None:
        """Reads the files of the run again.

        Raises:
            RunError: if another run has begun in its folder.
        """
        if self.run is None and not (self.path / "manifest.json").exists():
            return
        run = Run.open(self.path)
        if self.run is not None and self.run.identity not in run.identities:
            raise RunError(
                f"{self.path} began again with a new configuration. Run the same command again to follow it."
            )
        self.run = run
        chosen = run.chosen(self.wanted)
        try:
            stale = records.stale(run)
            ready = [stage for stage in chosen if stage.is_trained and stage.index not in stale]
            # No fingerprint for a checkpoint from elsewhere: it does not change here, and takes long to read.
            self.ready = {stage: None if stage.external else stage.fingerprint() for stage in ready}
        except FileNotFoundError:  # a train.json was just deleted: the stage is trained again
            return
        self.missing = [stage for stage in chosen if stage not in self.ready]

    @property
    def may_begin(self) -> bool:
        """Whether to start: once a trained stage is ready, since its adapter decides how the engine starts."""
        return self.run is not None and (any(stage.index for stage in self.ready) or not self.missing or self.is_gone)

    @property
    def is_gone(self) -> bool:
        """Whether the training has ended: its lock is free, and nothing has changed for a while."""
        if self.run is None:
            return False
        held = in_use(self.run.path, "train")
        progress = progress_of(self.missing[0]) if self.missing else None
        sign, now = (progress, self.ready), time.monotonic()
        if held or sign != self._sign:
            self._sign, self._alive = sign, now
        return now - self._alive > (SILENT if held is None else GRACE)

    def say(self, text: str) -> None:
        """Prints what this process waits for, unless it was the last line printed."""
        if text != self._said:
            print(printable(text), flush=True)
        self._said = text


def follow(path: str | Path, *, stages: Iterable[int] | None = None, **asked: Any) -> int:
    """Evaluates each stage of a run as soon as it is trained, with one engine, until the last one is evaluated.

    Args:
        path: The run; it need not have begun.
        stages: The numbers of stages; None = all.
        **asked: See `evaluate`.

    Returns:
        The number of cells evaluated.

    Raises:
        RunError: as `evaluate`; and if the training ended before the last stage, after all trained stages were
            evaluated.
    """
    watch = _Watch(Path(path), None if stages is None else list(stages))
    done: dict[Stage, str | None] | None = None
    cells, lm = 0, None
    while True:
        watch.look()
        if watch.may_begin and watch.ready != done:
            assert watch.run is not None
            before = watch.ready
            try:
                made, lm = fill(watch.run, before, lm, **asked)
            except InUse as e:
                watch.say(f"waiting for {e.holder}, which is evaluating a stage of {path}")
            except (TraceError, OSError):
                watch.look()
                if all(watch.ready.get(stage) == weights for stage, weights in before.items()):
                    raise
                log.warning("%s: a stage was trained again during its evaluation, so it is evaluated again.", path)
            else:
                cells, done = cells + made, before
                continue
        elif watch.run is None:
            watch.say(f"waiting for {path} to begin")
        elif not watch.missing:
            return cells
        elif watch.is_gone:
            raise RunError(_ended(watch))
        else:
            watch.say(f"waiting for the training of {watch.missing[0].name}")
        time.sleep(POLL)


def _ended(watch: _Watch) -> str:
    stage = watch.missing[0]
    return (
        f"The training of {watch.path} ended before {stage.name} was trained ({training(stage, False)}). All trained "
        "stages are evaluated. Run the training command again to continue it, and then: "
        f"trace-bench evaluate {word(watch.path)} --follow"
    )
