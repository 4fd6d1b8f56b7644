"""Gone or hidden: relearning old tasks at the end of a run, answers with given first tokens, and their section."""

import shutil
import sys

import pytest
from accelerate.state import AcceleratorState
from conftest import train

from trace_bench import cli, ending, evaluate
from trace_bench.report import Results
from trace_bench.report.relearn import sections
from trace_bench.run import Run
from trainers.base import relearn as module


@pytest.fixture
def in_this_process(monkeypatch):
    """Evaluates in this process what `evaluate_apart` would in one of its own."""

    def run_child(words, environment):
        assert words[:3] == [sys.executable, "-m", "trace_bench.cli"]
        cli.main(words[3:])
        AcceleratorState._reset_state()
        return 0

    monkeypatch.setattr(ending, "run_child", run_child)


def test_try(options, in_this_process):
    run = train({**options, "max_steps": 40, "train_rows": 64, "test_rows": 40, "max_new_tokens": 3})
    evaluate.evaluate(run)
    print(Results(run).R)
    for steps in (2, 4, 8):
        module.relearn(run.path, 10, steps)
    evaluate.evaluate(run, given=1)
    for block in sections(Results(run)):
        print(block)
    assert 0
