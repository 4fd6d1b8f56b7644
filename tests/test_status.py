"""`trace-bench status` on a run that is being trained, was interrupted, or is finished."""

import json
import math
import re
import time

import pytest
from conftest import interrupted, train

from trace_bench import cli, evaluate
from trace_bench.run import Run
from trace_bench.status import seconds_left
from trace_bench.waiting import locked
from trace_tasks.data.files import write_json
from trainers.base import CLTrainer


def lines(run: Run, capture) -> list[str]:
    capture.readouterr()
    cli.main(["status", str(run.path)])
    return capture.readouterr().out.splitlines()


def test_status_and_the_progress_bar_show_the_same(options, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    options |= {"disable_tqdm": False, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}

    def bars(stage):
        """The lines that were shown for a stage."""
        shown = (line.strip() for line in re.split("[\r\n]", capfd.readouterr().err))
        return [line for line in shown if line.startswith(f"stage {stage}")]

    with pytest.raises(KeyboardInterrupt):
        train(options, interrupted(CLTrainer, 2))
    view = r"stage 1/2 FOMC .*step 4/4, \d\d:\d\d<\d\d:\d\d, loss \d+\.\d{3}, \d+ tokens/s, whole run \d+ s left"
    shown = bars("1/2 FOMC")
    assert re.fullmatch(view, shown[-1]) and len(shown) <= 3, "nobody watches: the beginning and the end"

    run = Run.open(options["output_dir"])
    during, progress = lines(run, capfd), json.loads(run.stages[2].progress_file.read_text())
    assert during[0].endswith("2 stages") and "base model; evaluated 0 of 2 tasks" in during[1]
    assert "trained: 4 steps" in during[2] and "evaluated 0 of 1 tasks" in during[2]
    assert progress["steps"] == 4 and 1 <= progress["step"] <= 2 and progress["tokens"] > 0
    assert re.search(rf"interrupted \d+ s ago at step {progress['step']} of 4, loss {progress['loss']:.3f}", during[3])
    assert during[4].startswith("left to train: 1 of 2 stages, ")
    # For the last stage the time left is that of the bar. A resumed stage begins where it was.
    run = train(options)
    shown = bars("2/2 NumGLUE-ds")
    assert "step 2/4" in shown[0] and "step 4/4" in shown[-1]
    assert "tokens/s" in shown[-1] and "run" not in shown[-1]
    evaluate.evaluate(run)
    after = lines(run, capfd)
    assert len(after) == 4 and "evaluated 2 of 2 tasks" in after[3] and not run.stages[2].progress_file.exists()


def test_the_time_left_assumes_that_stages_take_as_long_as_the_known_ones():
    assert seconds_left([], 4, 10, 0.5) == 10 + 3 * 20
    assert seconds_left([10.0, 30.0], 4, 10, 0.5) == 10 + 1 * 20
    assert seconds_left([10.0, 30.0], 4, 0, 0) == 2 * 20
    assert seconds_left([10.0], 2, 6, 1) == 0


def test_the_time_left_counts_the_stages_that_are_not_trained(make, capfd):
    run = make(tasks=["trace_fomc", "trace_py150", "trace_meetingbank"])
    seconds = json.loads(run.stages[1].train_file.read_text())["seconds"]
    for stage in run.stages[2:]:
        stage.train_file.unlink()
    assert lines(run, capfd)[-1] == f"left to train: 2 of 3 stages, {2 * seconds:.0f} s at the speed so far"
    run.stages[2].attempt.mkdir()
    write_json(run.stages[2].progress_file, PROGRESS | {"seconds": 5.0})  # a quarter of it
    assert f"2 of 3 stages, {15 + (20 + seconds) / 2:.0f} s" in lines(run, capfd)[-1]


PROGRESS = {"step": 2, "steps": 8, "loss": 1.5, "tokens": 400, "seconds": 4.0, "time": 1e9}


@pytest.mark.parametrize("key", PROGRESS)
def test_odd_values_in_the_progress_file_are_named(make, capsys, key):
    run = make(tasks=["trace_fomc", "trace_py150"])
    run.stages[2].train_file.unlink()
    run.stages[2].attempt.mkdir()
    for value in (None, [], "x", -1, 0, math.nan, 10**400):
        run.stages[2].progress_file.write_text(json.dumps({**PROGRESS, key: value}))
        try:
            shown = lines(run, capsys)
        except SystemExit as e:
            assert re.match(rf"error: .*progress\.json is damaged .*({key}|NaN|401 digits|surrogates)", e.code), e.code
            assert "\n" not in e.code
        else:  # at the very beginning
            assert (key, value) == ("loss", -1) or (value == 0 and key in ("step", "loss", "tokens", "time"))
            assert "training" in shown[3]
    for content in ("[]", "null", "7", "{}"):
        run.stages[2].progress_file.write_text(content)
        with pytest.raises(SystemExit, match=r"error: .*progress\.json is damaged"):
            cli.main(["status", str(run.path)])


@pytest.mark.parametrize("key", ["steps", "seconds", "tokens_per_second"])
def test_odd_values_in_training_records_are_named(make, key):
    run = make(tasks=["trace_fomc"])
    content = json.loads(run.stages[1].train_file.read_text())
    for value in (None, [], "x", float("inf"), -1, ...):
        odd = {**content, key: value} if value is not ... else {k: v for k, v in content.items() if k != key}
        run.stages[1].train_file.write_text(json.dumps(odd))
        with pytest.raises(SystemExit, match=rf"train\.json is damaged.*({key}|Infinity).*delete it and run") as e:
            cli.main(["status", str(run.path)])
        assert "\n" not in e.value.code


def test_status_distinguishes_a_dead_process_from_a_living_one(run, capfd):
    stage = run.stages[1]
    stage.train_file.unlink()

    def seen(seconds_ago):
        state = {"step": 1, "steps": 4, "tokens": 100, "loss": 2.0, "seconds": 10.0, "time": time.time() - seconds_ago}
        write_json(stage.progress_file, state)
        return lines(run, capfd)[2]

    with locked(run.path, "train"):
        assert "training: step" in seen(0) and "training: step" in seen(7200), "one that lives may have long steps"
    assert "training was interrupted 20 s ago at step 1 of 4" in seen(20)
    (run.path / ".train.lock").unlink()
    assert "training: step" in seen(20) and "interrupted 2.0 h ago" in seen(7200), (
        "where locks do not tell, by the time"
    )
    with locked(run.stages[0].path, "evaluate"):
        assert "(running)" in lines(run, capfd)[1]
    assert "(running)" not in lines(run, capfd)[1]
