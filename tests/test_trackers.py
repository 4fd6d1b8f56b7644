"""Trackers of experiments (`report_to`): each stage is a separate run of the tracker, which is kept."""

import sys
import textwrap
from pathlib import Path

import pytest
from conftest import stop_at, train

from trace_bench.run import read_json
from trainers import base
from trainers.base import CLTrainer

WANDB = """
    run, runs = None, []

    class Config(dict):
        def update(self, values, allow_val_change):
            super().update(values)

    config = Config()

    class Run:
        def __init__(self, **kwargs):
            self.kwargs, self.logged, self.summary, self.ended = kwargs, [], {}, False

        def _label(self, code):
            pass

    def init(**kwargs):
        global run
        run = Run(**kwargs)
        runs.append(run)

    def log(values):
        run.logged.append(values)

    def finish():
        global run
        run.ended, run = True, None
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for wandb that records all calls."""
    folder = tmp_path / "packages" / "wandb"
    (folder / "sdk" / "lib").mkdir(parents=True)
    (folder / "__init__.py").write_text(textwrap.dedent(WANDB))
    (folder / "sdk" / "__init__.py").touch()
    (folder / "sdk" / "lib" / "__init__.py").touch()
    (folder / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(folder.parent)
    import wandb

    yield wandb
    for name in [n for n in sys.modules if n.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def losses(stage) -> list[tuple[int, float]]:
    return [(e["step"], pytest.approx(e["loss"])) for e in read_json(stage.train_file)["losses"]]


def test_each_stage_is_a_separate_wandb_run_and_the_callers_open_run_is_kept(options, wandb, tmp_path):
    run = train({**options, "report_to": ["wandb"], "run_name": "mine"})
    assert [r.kwargs["name"] for r in wandb.runs] == ["mine 1_trace_fomc", "mine 2_trace_numglue_ds"]
    for stage, theirs in zip(run.stages[1:], wandb.runs, strict=True):
        steps = [(v["train/global_step"], v["train/loss"]) for v in theirs.logged if "train/loss" in v]
        assert theirs.ended and steps == losses(stage)
    wandb.init(name="the caller's")  # who logs all stages into it
    train({**options, "report_to": ["wandb"], "output_dir": str(tmp_path / "other"), "max_steps": 1})
    assert len(wandb.runs) == 3 and not wandb.run.ended


def test_tensorboard_logs_of_a_stage_are_kept(options, monkeypatch, tmp_path):
    logged = {}

    class Writer:
        def __init__(self, log_dir):
            self.losses = logged[Path(log_dir)] = []

        def add_scalar(self, name, value, step):
            if name == "train/loss":
                self.losses.append((step, value))

        add_text = flush = close = lambda *args: None

    monkeypatch.setattr(
        "transformers.integrations.integration_utils.TensorBoardCallback._init_summary_writer",
        lambda self, args: setattr(self, "tb_writer", Writer(self.logging_dir)),
    )
    run = train({**options, "report_to": ["tensorboard"]})
    assert logged == {run.path / "tensorboard" / s.name: losses(s) for s in run.stages[1:]}
    logged.clear()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    train({**options, "output_dir": str(tmp_path / "other"), "report_to": ["tensorboard"], "max_steps": 1})
    assert list(logged) == [tmp_path / "elsewhere" / stage.name for stage in run.stages[1:]]


def test_a_restarted_stage_has_one_curve_and_trackers_may_change_within_a_run(options):
    options = {**options, "tasks": ["trace_fomc"], "max_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train({**options, "report_to": ["tensorboard"]}, stop_at(1, CLTrainer))
    run = train({**options, "report_to": ["tensorboard"], "run_name": "other", "project": "other"})
    train(options)
    (file,) = (run.path / "tensorboard" / "1_trace_fomc").glob("events.out.tfevents.*")
    assert b"train/loss" in file.read_bytes()


@pytest.mark.parametrize("tracker, words", [("mlfow", "mlfow is not supported"), ("comet_ml", "comet")])
def test_a_missing_tracker_is_refused_before_any_work(options, tracker, words):
    with pytest.raises(base.ConfigError, match=rf"report_to=\['{tracker}'\]: .*{words}"):
        train({**options, "report_to": [tracker]})
    assert not Path(options["output_dir"]).exists()
