"""`trace-bench evaluate RUN --follow`: each stage is evaluated as soon as it is trained, by another process.

The disk is the interface here, too: train.json says that a stage is trained, and the lock of the training whether it
goes on. Nothing is locked while a stage is waited for.
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
from trace_bench.run import InUse, Run, RunError, Stage, in_use
from trace_bench.status import SILENT, progress_of, training
from trace_bench.text import printable, word
from trace_tasks.errors import TraceError

log = logging.getLogger(__name__)

#: Seconds between two looks at the run.
POLL = 5.0
#: So many seconds without its lock a training counts as ended: one that is started again needs some until it has it.
GRACE = 60.0


@dataclass
class _Watch:
    """What was seen of a run by now.

    Attributes:
        ready: Stages that can be evaluated -> what identifies their weights.
        missing: Stages that are waited for.
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
            raise RunError(f"{self.path} has begun again with another configuration: begin to follow it again.")
        self.run = run
        chosen = run.chosen(self.wanted)
        try:
            stale = records.stale(run)
            ready = [stage for stage in chosen if stage.is_trained and stage.index not in stale]
            # A checkpoint from elsewhere is not trained while it is followed, and takes long to read.
            self.ready = {stage: None if stage.external else stage.fingerprint() for stage in ready}
        except FileNotFoundError:  # a train.json that was there a moment ago: the stage is trained again
            return
        self.missing = [stage for stage in chosen if stage not in self.ready]

    @property
    def may_begin(self) -> bool:
        """Whether to evaluate what is there: with the first stage, since its adapter decides how the engine starts."""
        return self.run is not None and (any(stage.index for stage in self.ready) or not self.missing or self.is_gone)

    @property
    def is_gone(self) -> bool:
        """Whether the training has ended, as far as its lock, its progress and its stages say."""
        if self.run is None:
            return False
        held = in_use(self.run.path, "train")
        progress = progress_of(self.missing[0]) if self.missing else None
        sign, now = (progress, self.ready), time.monotonic()
        if held or sign != self._sign:
            self._sign, self._alive = sign, now
        return now - self._alive > (SILENT if held is None else GRACE)

    def say(self, text: str) -> None:
        """Prints what is waited for, once."""
        if text != self._said:
            print(printable(text), flush=True)
        self._said = text


def follow(path: str | Path, *, stages: Iterable[int] | None = None, data_path: str | None = None, **asked: Any) -> int:
    """Evaluates the stages of a run as they are trained, with one engine, until the last of them is evaluated.

    The run need not have begun. What is `asked` for is as for `evaluate`; with `share=True` several processes do it
    together.

    Returns:
        The number of cells evaluated.

    Raises:
        RunError: as `evaluate` does; and if the training has ended before the last stage, when all that is there is
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
                made, lm = fill(watch.run, before, lm, data_path=data_path, **asked)
            except InUse as e:
                watch.say(f"waiting for {e.holder}, which evaluates a stage of {path}")
            except (TraceError, OSError):
                watch.look()
                if all(watch.ready.get(stage) == weights for stage, weights in before.items()):
                    raise
                log.warning("%s: a stage was trained again while it was evaluated, and is evaluated again.", path)
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
        f"The training of {watch.path} has ended before {stage.name} was trained ({training(stage, False)}). All that "
        "is trained is evaluated. Start the training again with the command that began it, which goes on where it was, "
        f"and then: trace-bench evaluate {word(watch.path)} --follow"
    )
