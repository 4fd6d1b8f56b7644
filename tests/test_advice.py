"""What an error of a run says to do is done here, as the message has it: then the command works."""

import glob
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import quick_options, train
from judge_server import Server, with_key

from trace_bench.cli import main
from trace_bench.judgements import judge_file
from trace_bench.records import stale
from trace_bench.run import Run, read_json, read_jsonl
from trace_tasks.data.files import fingerprint, write_json, write_jsonl

FIRST, SECOND, JUDGED = "trace_fomc", "trace_numglue_ds", "instruct_koala"


@dataclass
class Case:
    """A finished run, and the commands that made it."""

    run: Run
    options: dict
    url: str

    def train(self, **changes):
        train({**self.options, "output_dir": str(self.run.path), **changes})

    def evaluate(self, *argv):
        main(["evaluate", str(self.run.path), *argv])

    def judge(self, *argv):
        main(["judge", str(self.run.path), "--model", "fake/judge", "--base-url", self.url, *argv])

    def report(self):
        main(["report", str(self.run.path)])

    def stage(self, index):
        return self.run.stages[index]


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def finished(tiny_models, tmp_path_factory, server):
    """A run that is trained, evaluated, judged and reported."""
    folder = tmp_path_factory.mktemp("advice")
    options = {
        **quick_options(tiny_models["bytes"], folder / "run"),
        **{"test_rows": 4, "max_steps": 2, "general_stages": "all"},
        **{"judged": [JUDGED], "judged_rows": 3, "judged_max_new_tokens": 8},
    }
    case = Case(Run(folder / "run", {}), options, server.url)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with with_key(patch, folder):
            case.train()
            case.run = Run.open(case.run.path)
            case.evaluate()
            case.judge()
            case.report()
    return case


@pytest.fixture
def case(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.run.path.parent, tmp_path / "runs")
    with with_key(monkeypatch, tmp_path):
        yield Case(Run.open(tmp_path / "runs" / "run"), finished.options, finished.url)


def follow(message: str) -> None:
    """Deletes what a message says to delete: the files that it names there, or "it" and what belongs to it."""
    before, _, after = re.sub(r"\s+", " ", message).partition("elete ")
    assert after, f"the message gives no such advice: {message}"
    named = [path for path in re.findall(r"/[^\s,;:()]+", after) if glob.glob(path.rstrip("."))]
    if not named:
        named = re.findall(r"/[^\s,;:()]+", before)[: 2 if after.startswith("both") else 1]
    for path in (Path(p) for pattern in named for p in glob.glob(pattern.rstrip("."))):
        if "its score" in after or "their scores" in after:
            (path.parents[1] / f"{path.stem}.json").unlink(missing_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def change(file, **changes):
    write_json(file, {**read_json(file), **changes})


def lines(file, new):
    write_jsonl(file, new(read_jsonl(file)))


def retrained(case):
    """The first stage as another machine would train it: other weights, by the same settings."""
    weights = case.stage(1).checkpoint / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({k: v * 1.5 for k, v in load_file(weights).items()}, weights)
    change(case.stage(1).train_file, checkpoint=fingerprint(case.stage(1).checkpoint))


#: What is wrong -> how it came, and the commands that notice it, one by one; the first is what the message is followed
#: for, and then all of `again` work.
DAMAGE = {
    "manifest cut": (lambda c: cut(c.run.path / "manifest.json"), ["evaluate", "train", "evaluate", "report"]),
    "record of the first stage cut": (lambda c: cut(c.stage(1).train_file), ["train", "evaluate", "judge", "report"]),
    "record of another stage": (
        lambda c: shutil.copy(c.stage(1).train_file, c.stage(2).train_file),
        ["train", "evaluate", "report"],
    ),
    "weights changed": (
        lambda c: cut(c.stage(2).checkpoint / "adapter_model.safetensors") or c.stage(2).eval_file(FIRST).unlink(),
        ["evaluate", "train", "evaluate", "report"],
    ),
    "first stage trained again": (retrained, ["train", "train", "evaluate", "judge", "report"]),
    "cell cut": (lambda c: cut(c.stage(1).eval_file(FIRST)), ["evaluate", "evaluate", "report"]),
    "cell of another task": (
        lambda c: shutil.copy(c.stage(2).eval_file(FIRST), c.stage(2).eval_file(SECOND)),
        ["report", "evaluate", "report"],
    ),
    "impossible score": (lambda c: change(c.stage(1).eval_file(FIRST), n=-1), ["report", "evaluate", "report"]),
    "samples changed": (
        lambda c: lines(c.stage(1).samples_file(FIRST), lambda rows: [{**rows[0], "response": "x"}, *rows[1:]]),
        ["report", "evaluate", "report"],
    ),
    "judged samples changed": (
        lambda c: lines(c.stage(1).samples_file(JUDGED), lambda rows: [{**rows[0], "response": "x"}, *rows[1:]]),
        ["judge", "evaluate", "judge", "report"],
    ),
    "judgement cut": (lambda c: cut(judge_file(c.stage(1), JUDGED)), ["judge", "judge", "report"]),
    "judgement that does not add up": (
        lambda c: change(judge_file(c.stage(1), JUDGED), direct={"n": 7}),
        ["report", "judge", "report"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_after_what_the_message_says_the_command_works(case, damage):
    damaging, (first, *again) = DAMAGE[damage]
    damaging(case)
    with pytest.raises((SystemExit, Exception)) as e:
        getattr(case, first)()
    message = str(e.value.code if isinstance(e.value, SystemExit) else e.value)
    follow(message)
    for step in again or [first]:
        getattr(case, step)()
    assert stale(case.run) == {} and (case.run.path / "report.md").exists()


@pytest.mark.parametrize(
    "command, argv",
    [
        ("evaluate", ["--engine-args", '{"dtype": "float64"}']),
        ("judge", ["--sampling", '{"temperature": 1}']),
    ],
)
def test_other_settings_after_what_the_message_says(case, command, argv):
    with pytest.raises(SystemExit) as e:
        getattr(case, command)(*argv)
    follow(str(e.value.code))
    getattr(case, command)(*argv)
    case.report()
