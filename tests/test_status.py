"""`trace-bench status`: what it says of a run that is being trained, was interrupted, or is done."""

import json
import time

import pytest
from conftest import stop_at, train

from trace_bench import cli, evaluate
from trace_bench.run import Run
from trainers.base import CLTrainer


def lines(run: Run, capsys) -> list[str]:
    capsys.readouterr()
    cli.main(["status", str(run.path)])
    return capsys.readouterr().out.splitlines()


def test_a_run_is_followed_from_outside(options, capsys, monkeypatch):
    seen = []

    class Watched(stop_at(2, CLTrainer)):
        def end_stage(self):
            if self.stage.index == 2:
                seen.append(lines(self.run, capsys))
            super().end_stage()

    Watched.__module__ = CLTrainer.__module__
    with pytest.raises(KeyboardInterrupt):
        train(options, Watched)
    run = Run.open(options["output_dir"])
    (during,) = seen
    assert during[0].endswith("2 stages") and "base model; evaluated 0 of 2 tasks" in during[1]
    assert "trained: 3 steps" in during[2] and "evaluated 0 of 1 tasks" in during[2]
    progress = json.loads(run.stages[2].progress_file.read_text())
    assert progress["steps"] == 3 and 1 <= progress["step"] <= 3 and progress["tokens"] > 0
    assert f"training: step {progress['step']} of 3, loss {progress['loss']:.3f}" in during[3]
    assert during[4].startswith("left to train: 1 of 2 stages, ")

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    assert "training was interrupted 2.0 h ago at step" in lines(run, capsys)[3]
    monkeypatch.undo()
    run = train(options)
    evaluate.evaluate(run)
    after = lines(run, capsys)
    assert len(after) == 4 and "evaluated 2 of 2 tasks" in after[3] and not run.stages[2].progress_file.exists()
