"""Tests of `trace_bench.study`: the packaged studies, the content of study files, and a tiny study from end to end."""

import csv
import runpy
import subprocess
import sys

import pytest
import yaml
from conftest import config_of

from trace_bench import packaged, study
from trace_bench.cli import main
from trace_bench.report.tables import DASH
from trace_bench.study import StudyError, read_study, run_study
from trace_tasks.errors import TraceError

STUDIES = sorted((packaged.TRAINERS / "configs" / "studies").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(runs, config="config.yaml", **more):
        (tmp_path / "config.yaml").touch()
        file = tmp_path / "mine.yaml"
        content = runs if isinstance(runs, str) else yaml.safe_dump({"config": config, "runs": runs, **more})
        file.write_text(f"# What is asked?\n{content}", encoding="utf-8")
        return file

    return write


# -------------------------------------------------------------------------------------------- the files of the project


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_options_of_packaged_studies_exist_in_their_methods(file):
    from trl import ModelConfig, TrlParser

    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[0].endswith("?")
    assert f"make study STUDY=trainers/configs/studies/{file.name}" in lines[2]
    # Only one of the runs that differ only in values is parsed, because parsing is slow.
    both = [run for full in (False, True) for run in read_study(file, full).values()]
    runs = {(method, frozenset(a for a in arguments if a.startswith("--"))): arguments for method, arguments in both}
    for (method, _), arguments in runs.items():
        parser = TrlParser((config_of(method), ModelConfig))
        config, model = parser.parse_args_and_config([*arguments, "--output_dir", "nowhere"])
        assert config.tasks and model.model_name_or_path, arguments


# ------------------------------------------------------------------------------------------------ what a file may hold


def test_values_of_a_study_become_arguments(write, tmp_path):
    run = {
        "method": "sequential",
        "tasks": ["trace_fomc", "my_task"],
        "learning_rate": 1e-4,
        "use_peft": False,
        "engine_args": {"max_model_len": 64},
        "epochs": None,
    }
    method, arguments = read_study(write({"a": run}))["a"]
    assert method == "sequential"
    assert arguments == [
        *("--config", str(tmp_path / "config.yaml")),
        *("--engine_args", '{"max_model_len": 64}'),
        *("--learning_rate", "0.0001"),
        *("--tasks", "trace_fomc", "my_task"),
        *("--use_peft", "false"),
    ]


def test_values_runs_and_config_of_a_study_may_depend_on_the_scale(write, tmp_path):
    (tmp_path / "large.yaml").touch()
    both = {"method": "sequential", "train_rows": {"small": 2, "full": None}}
    file = write(
        {"both": both, "large": {"small": None, "full": {"method": "sequential", "train_rows": 9}}},
        config={"small": "config.yaml", "full": "large.yaml"},
    )
    assert read_study(file) == {
        "both": ("sequential", ["--config", str(tmp_path / "config.yaml"), "--train_rows", "2"])
    }
    large = ["--config", str(tmp_path / "large.yaml")]
    assert read_study(file, full=True) == {
        "both": ("sequential", large),
        "large": ("sequential", [*large, "--train_rows", "9"]),
    }


def test_each_makes_a_run_for_every_combination(write, tmp_path):
    run = {
        "method": {"each": ["sequential", "ewc"]},
        "train_rows": 8,
        "tasks": {"each": {"there": ["x", "y"], "back": ["y", "x"]}},
        "seed": {"each": {"small": [0, 1], "full": [0, 1, 2]}},
    }
    file = write({"lora": run, "other": GOOD})
    runs = read_study(file)
    assert list(runs) == [
        *(f"lora-{m}-seed{s}-{o}" for m in ("sequential", "ewc") for s in (0, 1) for o in ("back", "there")),
        "other",
    ]
    config = ["--config", str(tmp_path / "config.yaml")]
    one = ["--seed", "1", "--tasks", "y", "x", "--train_rows", "8"]
    assert runs["lora-ewc-seed1-back"] == ("ewc", [*config, *one])
    assert len(read_study(file, full=True)) == 2 * 2 * 3 + 1


def test_a_run_of_a_method_of_a_file_is_named_after_the_method(write, tmp_path):
    for folder in ("mine", "older"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "si.py").write_text('if __name__ == "__main__": main()')
    runs = read_study(write({"m": {"method": {"each": ["ewc", "mine/si.py"]}}}))
    assert {name: method for name, (method, _) in runs.items()} == {
        "m-ewc": "ewc",
        "m-si": str(tmp_path / "mine/si.py"),
    }
    with pytest.raises(StudyError, match="m-si: two runs have this name"):
        read_study(write({"m": {"method": {"each": ["mine/si.py", "older/si.py"]}}}))


def test_the_known_methods_are_the_runnable_files():
    assert {"sequential", "single", "joint", "icl"} <= packaged.methods().keys()
    assert not {"base", "__init__", "help", "memory"} & packaged.methods().keys()


GOOD = {"method": "sequential"}


@pytest.mark.parametrize(
    "content, words",
    [
        ("runs: [", ["is not YAML", "line 2"]),
        ("runs: {a: {<<: {seed: 1}, <<: {seed: 2}, seed: 3, seed: 4}}", ["seed is given twice", "line 2"]),
        ("just text", ["config and runs", "str"]),
        ("config: config.yaml", ["config and runs", "['config']"]),
        ("config: config.yaml\nruns: {a: {method: icl}}\nsteps: 3", ["config and runs", "'steps'"]),
        ("config: other.yaml\nruns: {a: {method: icl}}", ["no config other.yaml", "relative to"]),
        ({"a": {"method": "sequental"}}, ["runs, a", "no method sequental", "icl", "Did you mean sequential?"]),
        ({"a": {"method": "base"}}, ["no method base"]),
        ({"a": {"train_rows": 3}}, ["runs, a", "found {'train_rows': 3}", "method: NAME"]),
        ({"a": "sequential"}, ["runs, a", "found 'sequential'", "method: NAME"]),
        ({"a": {**GOOD, "output_dir": "x"}}, ["'output_dir' is not allowed"]),
        ({"a": {**GOOD, "--train_rows": 3}}, ["'--train_rows' is not allowed", "without '--'"]),
        ({"a": {**GOOD, "train_rows": {"small": 3}}}, ["a, train_rows", "both small and full"]),
        ({"a/b": GOOD}, ["a/b", "folder"]),
        ({"a": {**GOOD, "seed": {"each": []}}}, ["a, seed", "under each use a list of words or numbers"]),
        ({"a": {**GOOD, "tasks": {"each": [["x"], ["y"]]}}}, ["a, tasks", "a mapping of names to values"]),
        ({"a": {**GOOD, "seed": {"each": [1], "or": [2]}}}, ["a, seed", "no other key next to each"]),
        ({"a": {"method": {"each": ["ewc", "x"]}}}, ["runs, a-x", "no method x"]),
        ({"a": {**GOOD, "seed": {"each": [1]}}, "a-seed1": GOOD}, ["a-seed1", "two runs have this name"]),
        ({}, ["no run"]),
        (["a"], ["runs: expected run names"]),
    ],
)
def test_an_error_in_a_study_is_named_with_the_allowed_values(write, content, words, monkeypatch, capsys):
    monkeypatch.setattr(study, "run_child", lambda *a, **k: pytest.fail("it began"))
    file = write(content)
    with pytest.raises(StudyError) as e:
        run_study(file)
    assert all(word in str(e.value) for word in [str(file), *words]), e.value


def test_a_missing_study_file_and_run_are_errors(write, tmp_path):
    with pytest.raises(SystemExit, match=r"error: There is no study .*nowhere\.yaml"):
        main(["study", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(StudyError, match=r"--only c: no such run\. Use a, b"):
        run_study(write({"a": GOOD, "b": GOOD}), only=["a", "c"])
    with pytest.raises(StudyError, match=r"--launch '.: a shell cannot read this command"):
        run_study(file := write({"a": GOOD}), launch="'x")
    file.write_text("config: c.yaml\nruns: &x {a: *x}\n")  # without an end
    with pytest.raises(TraceError, match="nested more than 100 deep"):
        read_study(file)


def test_a_file_in_place_of_the_folder_ends_the_study_before_its_first_run(write, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_child", lambda *a, **k: pytest.fail("it began"))
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit, match=r"error: .*taken.*name a different path"):
        main(["study", str(write({"a": GOOD})), "--output_dir", str(tmp_path / "taken")])


def test_a_dry_run_of_a_study_prints_its_commands(write, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(study, "run_child", lambda *a, **k: pytest.fail("it began"))
    checked: list[list[str]] = []
    monkeypatch.setattr(study, "_refuse_options", lambda file, runs: checked.append([*runs]))
    monkeypatch.chdir(tmp_path)
    file = write({"a": {**GOOD, "tasks": ["x", "y"]}, "b": GOOD})
    main(["study", str(file), "--full", "--dry-run", "--only", "a"])
    config, program = tmp_path / "config.yaml", f"{sys.executable} -m trace_bench"
    assert capsys.readouterr().out.splitlines() == [
        f"{program} train sequential --config {config} --tasks x y --output_dir runs/mine-full/a",
        f"{program} evaluate runs/mine-full/a",
    ]
    assert not (tmp_path / "runs").exists()
    # A run by its number, and by another launcher.
    file = write({"a": {**GOOD, "seed": {"each": [0, 1]}}, "b": GOOD})
    main(["study", str(file), "--dry-run", "--only", "2", "--launch", "accelerate launch --num_processes 8"])
    training, evaluation = capsys.readouterr().out.splitlines()
    start = "accelerate launch --num_processes 8 -m trace_bench train sequential --config"
    assert training.startswith(start) and training.endswith("--seed 1 --output_dir runs/mine-small/a-seed1")
    assert evaluation == f"{sys.executable} -m trace_bench evaluate runs/mine-small/a-seed1"
    main(["study", str(file), "--dry-run", "--only", "a"])
    assert [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()[1::2]] == ["a-seed0", "a-seed1"]
    assert checked == [["a"], ["a-seed1"], ["a-seed0", "a-seed1"]], "their options, without beginning them"


# ------------------------------------------------------------------------------------------------------ from end to end


def in_this_process(command):
    """Runs `python -m MODULE ...` in this process to save the import of torch. Returns the exit code."""
    module, *arguments = command[2:]
    if "." in module:  # a program is never imported already, but for the package that its parts are in
        sys.modules.pop(module, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
                return 1
            return e.code or 0
    return 0


def test_a_study_trains_evaluates_compares_and_resumes(options, write, tmp_path, monkeypatch, capfd):
    """There are two runs of the tiny model, and between them one with an impossible option."""
    monkeypatch.setattr(study, "run_child", in_this_process)
    monkeypatch.setattr(study, "_refuse_options", lambda *args: None)  # as if it were a fault of another kind
    runs = {"few": {**GOOD, "train_rows": 8}, "wrong": {**GOOD, "keep": "nothing"}, "many": {**GOOD, "train_rows": 16}}
    file = write(yaml.safe_dump({"config": "config.yaml", "runs": runs}, sort_keys=False))
    options = {k: v for k, v in options.items() if k not in ("output_dir", "train_rows")} | {"max_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    folder = tmp_path / "out"
    with pytest.raises(SystemExit) as e:
        main(["study", str(file), "--output_dir", str(folder)])
    assert e.value.code == 1
    printed = capfd.readouterr()
    assert "keep: invalid choice: 'nothing'" in printed.err and "Traceback" not in printed.err
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("# mine-small\n\nWhat is asked?\n\n> **Failed:** `wrong`: training ended with exit")
    assert printed.out.endswith(summary)
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as f:
        rows = {row["run"]: row for row in csv.DictReader(f)}
    assert [name for name in rows if not name.startswith("paper: ")] == ["few", "many"]
    assert rows["few"]["train rows"] == "first 8" and rows["many"]["train rows"] == "first 16"
    assert float(rows["few"]["trained tokens"]) > 0
    assert {rows["few"][k] for k in ("OP", "FOMC", "NumGLUE-ds")} & {"", DASH} == set()
    assert (folder / "few" / "report.md").is_file()
    page = (folder / "summary.html").read_text(encoding="utf-8")
    assert "<h1>mine-small</h1>" in page and "What is asked?" in page and "<strong>Failed:</strong>" in page
    assert 'href="few/report.html"' in page and (folder / "summary-figures" / "runs.svg").is_file()

    files = [*folder.glob("*/stages/*/train.json"), *folder.glob("*/stages/*/eval/*.json")]
    assert len(files) == 2 * (2 + 2 + 1 + 2)  # two runs: two stages; all tasks of the base model, one, and two
    before = {f: f.stat().st_mtime_ns for f in files}
    lost = folder / "many" / "stages" / "2_trace_numglue_ds" / "eval" / "trace_fomc.json"
    lost.unlink()
    monkeypatch.setattr(study.packaged, "studies", lambda: {"mine": file})  # by its name, as those of the package
    assert run_study("mine", output_dir=folder, only=["few", "many"]) is True
    after = {f: f.stat().st_mtime_ns for f in files}
    assert [f for f in files if before[f] != after[f]] == [lost]
    printed = capfd.readouterr().out
    assert "What is asked?\n\n> Not done: `wrong`" in printed and "other settings" not in printed

    # A study that was edited afterwards says so, whichever runs are asked for.
    file.write_text(file.read_text(encoding="utf-8").replace("train_rows: 8", "train_rows: 9"), encoding="utf-8")
    assert run_study("mine", output_dir=folder, only=["many"]) is True
    assert "> **Trained with other settings** than the study has now: `few`.\n" in capfd.readouterr().out
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options | {"max_steps": 2}), encoding="utf-8")
    assert run_study("mine", output_dir=folder, only=["wrong"]) is False
    assert "settings** than the study has now: `few`, `many`." in capfd.readouterr().out


@pytest.mark.parametrize("trains", [True, False])
def test_what_a_study_asked_is_on_record_once_a_run_is_trained(tmp_path, trains):
    """Also if its evaluation fails: without the record, nobody sees that the study was edited since."""
    commands = {"training": ["true" if trains else "false"], "evaluation": ["false"]}
    said = study._do(tmp_path, commands, ["asked"])
    assert said == f"{'evaluation' if trains else 'training'} ended with exit code 1"
    assert (tmp_path / study.ASKED).exists() is trains


def test_reading_a_study_imports_no_torch_and_the_help_no_numpy(write):
    code = """
import sys
from trace_bench.cli import main
try:
    main(["--help"])
except SystemExit:
    assert not {"matplotlib", "numpy", "trace_bench.report"} & set(sys.modules)
from trace_bench import study
study._refuse_options = lambda *args: None  # asks another process
main(["study", sys.argv[1], "--dry-run"])
heavy = {"torch", "lm_eval", "transformers", "vllm", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code, str(write({"a": GOOD}))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
