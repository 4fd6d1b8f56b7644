"""Tests of `trace-bench`: it starts quickly, prints its results, and prints every error of ours as one message."""

import importlib
import inspect
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from conftest import error
from made_runs import make_rich_run
from trl import ModelConfig, TrlParser

from trace_bench import cli, ending, evaluate, packaged
from trace_bench.cli import main
from trace_bench.packaged import methods
from trace_tasks import data
from trainers.base import CLConfig, ConfigError

MODULE = [sys.executable, "-m", "trace_bench"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRACE_DATA", raising=False)


@pytest.fixture
def run(make):
    return make(tasks=["trace_fomc"], method="a–b")


@pytest.mark.parametrize("method", methods())
def test_the_help_of_a_method_has_the_options_of_its_config(method, capsys):
    from trl import ModelConfig, SFTConfig

    import trainers.help

    module = importlib.import_module(f"trainers.{method}")
    config = re.search(r"^    main\(\w+, (\w+)\)$", inspect.getsource(module), re.M)[1]
    own = {f.name: f for f in fields(getattr(module, config))}
    theirs = {f.name for c in (SFTConfig, ModelConfig) for f in fields(c)}
    assert trainers.help.show(packaged.methods()[method], "train it")
    shown = re.findall(r"^  --(\w+)", out := capsys.readouterr().out, re.M)
    assert len(shown) == len(set(shown)) and set(own) - theirs <= set(shown) <= set(own) | theirs | {"config", "like"}
    assert module.__doc__.splitlines()[0] in out
    for name in set(own) - theirs:
        text = re.sub(r"\s+", " ", re.search(rf"^  --{name}\s(.*?)(?=^  --|^\S|\Z)", out, re.M | re.S)[1])
        assert own[name].metadata["help"] in text
        assert all(choice in text for choice in own[name].metadata.get("choices", ()))
        default = own[name].default
        assert default in (None, MISSING) or text.endswith(f"[{default}] ")


@pytest.mark.parametrize("option", ["--help", "--help_all"])
def test_the_help_has_all_options_of_hf_on_request_or_without_a_named_config(option, capsys):
    import trainers.help
    from trainers.base import CLConfig, CLTrainer
    from trainers.base import main as train

    for name in ("memory", "nowhere"):  # a file that is no method, and no file
        assert not trainers.help.show(packaged.TRAINERS / f"{name}.py", "train it")
    with pytest.raises(SystemExit) as e:
        train(CLTrainer, CLConfig, [option])
    assert e.value.code == 0
    assert {"--tasks", "--lora_r", "--weight_decay"} <= set(capsys.readouterr().out.replace(",", " ").split())


@pytest.mark.parametrize(
    "words, said",
    [
        (["trace_bench", "--help"], "data|evaluate|report|tasks-path|make sequential-train"),
        (["trace_bench", "evaluate", "--help"], "--checkpoint|--general"),
        (["trace_bench", "data", "demo"], "export TRACE_DATA="),
        (["trainers.replay", "--help"], "python -m trainers.replay --config FILE.yaml"),
    ],
)
def test_commands_without_a_model_import_no_torch_and_no_lm_eval(words, said):
    command = [sys.executable, "-X", "importtime", "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and all(word in done.stdout for word in said.split("|"))
    assert not re.search(r"\| +(torch|trl|transformers|lm_eval|vllm|datasets)$", done.stderr, re.M)


def test_data_lists_tasks_sizes_and_fingerprints_of_the_demo(tmp_path, capsys):
    root = shutil.copytree(data.find_data("demo"), tmp_path / "in a folder")
    main(["data", str(root)])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:10]}
    prints = data.Data.at(root, data.FOLDERS).fingerprint
    assert lines == {task: ["64", "8", "24", prints[task]] for task in data.FOLDERS}
    assert "not comparable with TRACE" in out and f"export TRACE_DATA='{root}'\n" in out


def test_data_checks_every_data_set_of_an_archive(tmp_path, capsys):
    for name in ("LLM-CL-Benchmark_500", "LLM-CL-Benchmark_5000"):
        shutil.copytree(data.find_data("demo"), tmp_path / "in" / name)
    main(["data", shutil.make_archive(str(tmp_path / "good"), "zip", tmp_path / "in")])
    assert capsys.readouterr().out.count("export TRACE_DATA=") == 2
    (tmp_path / "in" / "LLM-CL-Benchmark_500" / "FOMC" / "test.json").unlink()
    said = error("data", shutil.make_archive(str(tmp_path / "bad"), "zip", tmp_path / "in"))
    assert "LLM-CL-Benchmark_500 cannot be used" in said and "test.json is missing" in said
    assert capsys.readouterr().out.count("export TRACE_DATA=") == 1, "the good one can be used all the same"


# ----------------------------------------------------------------------------------------------------------- evaluate


def test_the_options_of_the_command_reach_evaluate(run, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda run, **k: seen.update(k, path=run.path) or 0)
    argv = ["--stages", "0,1", "--cells", "all", "--backend", "hf", "--engine-args", '{"a": 1}', "--data", "demo"]
    extra = ["--general", "general,general_ifeval", "--general-rows", "3", "--judged", "safety", "--given", "2"]
    main(["evaluate", str(run.path), *argv, *extra, "--no-likelihood", "--distance"])
    assert seen == {
        "share": False,
        "path": run.path,
        "stages": [0, 1],
        "cells": "all",
        "given": 2,
        "backend": "hf",
        "engine_args": {"a": 1},
        "likelihood": False,
        "data_path": "demo",
        "extra": {"general": ["general", "general_ifeval"], "general_rows": 3, "judged": ["safety"], "distance": True},
    }
    assert "every cell is done" in capsys.readouterr().out
    alone, words = dict(seen), []
    monkeypatch.setattr(evaluate, "evaluate_on", lambda path, devices, options, **k: words.extend(options))
    main(["evaluate", str(run.path), *argv, *extra, "--no-likelihood", "--distance", "--devices", "cpu"])
    main(["evaluate", str(run.path), "--share", *words])  # each process of --devices is started so
    assert seen == {**alone, "share": True}


FROM_ELSEWHERE = ["--test-rows=5", "--tasks=order2", "--max-prompt-length=64", "--max-new-tokens=2"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stages", "7"], "no stage [7]: the run has 0, 1"),
        (["--stages", "0,x"], "--stages must be numbers"),
        *((["--engine-args", text], "--engine-args must be a JSON object") for text in ("{", "[1]", '{"a": NaN}')),
        # A run has these settings in its manifest. An option without effect must not be accepted.
        *(([given], f"{given.partition('=')[0]}: only with --checkpoint") for given in FROM_ELSEWHERE),
        (["--chat-template"], "--chat-template: only with --checkpoint"),
        (["--model=m"], "m is not the base model that"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(run, argv, message, demo_data):
    assert message in error("evaluate", run.path, *argv)


@pytest.mark.parametrize(
    "given, said",
    [
        (["trace_fomc"], "trace_fomc: write each as NAME=PATH"),
        (["trace_fomc="], "trace_fomc=: write each as NAME=PATH"),
        (["=somewhere"], "=somewhere: write each as NAME=PATH"),
        (["same=a", "same=b"], "found same, same; give each NAME only once"),
        (["a=NOWHERE"], "NOWHERE: there is no such folder."),
        (["a=OWNER/NAME"], "there is no such folder. If it is on the hub: hf download OWNER/NAME --local-dir FOLDER"),
        (["a=~/EMPTY"], "no adapter (adapter_config.json)"),
        (["a=SHARDS"], "accelerate merge-weights"),
        (["a=NEMO"], "config.json). Export it with the tools of Megatron or NeMo"),
        (["a=ZERO"], "config.json). Combine DeepSpeed's parts: python zero_to_fp32.py"),
        (["a=EMPTY"], "no adapter (adapter_config.json) or model (config.json)."),
        (["a=."], "; its folders CONFIG do."),
        (["a=HALF"], "no adapter"),
        (["a=CONFIG"], ".safetensors"),
    ],
)
def test_checkpoint_takes_a_name_and_the_path_of_a_complete_checkpoint(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    files = {"EMPTY": "x", "HALF": "adapter_model.safetensors", "CONFIG": "config.json", "ZERO": "zero_to_fp32.py"}
    for folder, file in (files | {"SHARDS/pytorch_model_fsdp_0": "__0_0.distcp"}).items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).touch()
    shutil.copytree(tmp_path / "SHARDS", tmp_path / "NEMO")
    (tmp_path / "NEMO/pytorch_model_fsdp_0/common.pt").touch()
    pairs = [word for pair in given for word in ("--checkpoint", pair)]
    assert said in error("evaluate", "r", "--model", "m", *pairs)
    assert "needs --model" in error("evaluate", "r", "--checkpoint", "a=HALF")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("option", ["--test-rows", "--max-prompt-length", "--max-new-tokens"])
def test_a_number_below_1_is_an_error(tmp_path, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(tmp_path / "r"), "--model", "m", "--checkpoint", "a=b", f"{option}=0"])
    assert f"argument {option}: 0 is not allowed: use a number of at least 1" in capsys.readouterr().err


def test_an_option_spelt_as_in_training_is_an_error_with_the_right_option_and_the_usage(capsys):
    for argv in (["--test_rows", "4"], ["--test_rows=4"], ["--general", "general", "--general_rows", "4"]):
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", "runs/r", *argv])
        said = capsys.readouterr().err
        assert "usage: trace-bench evaluate RUN" in said
        assert re.search(r"unrecognized arguments: --(test|general)_rows[= ]4\. Did you mean --\1-rows\?", said)


# -------------------------------------------------------------------------------------------------------------- lists

FORMS = [["a", "b", "c"], ["a,b,c"], ["a,", "b", "c"], ["a", ",b,", "c"], ["a b, c"]]
JUDGE = ["--model", "m", "--base-url", "http://localhost:1/v1"]


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
@pytest.mark.parametrize(
    "argv, function, key, given",
    [
        (["evaluate", "RUN", "--stages"], "trace_bench.evaluate.evaluate", "stages", [0, 2, 1]),
        (["evaluate", "RUN", "--general"], "trace_bench.evaluate.evaluate", "extra.general", ["x", "y", "z"]),
        (["evaluate", "RUN", "--judged"], "trace_bench.evaluate.evaluate", "extra.judged", ["x", "y", "z"]),
        (
            ["evaluate", "new", "--model", "m", "--checkpoint", "n=p", "--tasks"],
            *("trace_bench.evaluate.external_run", "tasks", ["x", *data.ORDERS["order2"], "z"]),
        ),
        (["judge", "RUN", *JUDGE, "--stages"], "judges.judging.plan", "stages", [0, 2, 1]),
        (["judge", "RUN", *JUDGE, "--suites"], "judges.judging.plan", "suites", ["x", "y", "z"]),
        (
            ["annotate", "out", *JUDGE, "--data", "demo", "--tasks"],
            "judges.teacher.annotate.plan",
            "tasks",
            list("xyz"),
        ),
        (["study", "f.yaml", "--only"], "trace_bench.study.run_study", "only", ["x", "1", "z"]),
        (["data", "audit", "demo", "--against"], "trace_tasks.data.audit.audit", "against", ["x", "y", "z"]),
    ],
    ids=lambda value: value[0] + value[-1] if isinstance(value, list) and len(value) > 2 else None,
)
def test_lists_of_a_command_may_have_spaces_or_commas(run, monkeypatch, tmp_path, form, argv, function, key, given):
    class Reached(Exception):
        pass

    def reached(*args, **options):
        raise Reached(options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(function, reached)
    monkeypatch.setattr("trace_bench.engine.models.open_tokenizer", lambda name: None)
    monkeypatch.setattr(data, "find_all_data", lambda source: [source])
    words = ["x", "order2", "z"] if key == "tasks" and "new" in argv else [str(value) for value in given]
    text = [word.replace("a", words[0]).replace("b", words[1]).replace("c", words[2]) for word in form]
    if key == "against" and form == FORMS[-1]:
        text, given = ["x y, z"], ["x y", "z"]  # a path may have spaces
    with pytest.raises(Reached) as e:
        main([str(run.path) if word == "RUN" else word for word in [*argv, *text]])
    value = e.value.args[0]
    for part in key.split("."):
        value = value[part]
    assert value == given


@pytest.mark.parametrize(
    "argv, name",
    [
        (["evaluate", "--general", "general", "runs/x"], "RUN"),
        (["judge", *JUDGE, "--stages", "0,1", "runs/x"], "RUN"),
        (["annotate", *JUDGE, "--tasks", "trace_fomc", "out"], "OUT"),
        (["study", "--only", "a", "f.yaml"], "STUDY"),
        (["data", "audit", "--against", "a", "b"], "SOURCE"),
    ],
)
def test_a_list_that_swallowed_the_next_argument_is_an_error_that_says_so(argv, name, capsys):
    for given, said in ((argv, f"write {name} before the options"), (["evaluate", "r", "--tasks", ","], "is empty")):
        with pytest.raises(SystemExit, match="2"):
            main(given)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main([*(argv[:2] if argv[1] == "audit" else argv[:1]), "--help"])
    usage = capsys.readouterr().out.splitlines()[0]
    assert re.search(rf" \[?{re.escape(name)}\]? .*\[--OPTION VALUE ...\]$", usage)


@pytest.mark.parametrize(
    "option, words, value",
    [
        ("tasks", ["t1", "order1", "t2"], ["t1", *data.ORDERS["order1"], "t2"]),
        ("general", ["general_piqa", "general", "general_ifeval"], ["general_piqa", *data.SUITES]),
        ("judged", ["instruct_lima", "safety", "instruct_koala"], None),
        ("report_to", ["trackio", "wandb", "tensorboard"], None),
        ("epochs", ["5", "3", "0.5"], [5, 3, 0.5]),
    ],
)
def test_lists_of_a_trainer_may_have_spaces_or_commas(tmp_path, option, words, value):
    file = tmp_path / "c.yaml"
    argv = ["--output_dir", "r", *(["--tasks", "t1", "t2", "t3"] if option == "epochs" else [])]
    value = value or [member for word in words for member in data.GROUPS.get(word, [word])]
    for form in FORMS:
        text = [word.replace("a", "{0}").replace("b", "{1}").replace("c", "{2}").format(*words) for word in form]
        for given in (None, text, " ".join(text)):
            file.write_text(yaml.safe_dump({option: given} if given else {}))
            more = [f"--{option}", *text] if given is None else ["--config", str(file)]
            (config, _) = TrlParser((CLConfig, ModelConfig)).parse_args_and_config([*argv, *more])
            assert getattr(config, option) == list(dict.fromkeys(value)), (text, given)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"general": "general_mmul"}, r"Unknown name general_mmul.* Did you mean general_mmlu\?$"),
        ({"judged": "safty"}, r"Unknown name safty.* Did you mean safety\?$"),
        ({"tasks": "order3"}, r"There is no order order3: use order1.* Did you mean order"),
        ({"tasks": "reasoning-order2"}, r"Did you mean reasoning_order2\?$"),
        ({"epochs": "1,x", "tasks": "a,b"}, "epochs='x' is not allowed: use a number above 0"),
    ],
)
def test_an_unknown_name_in_a_training_is_an_error_with_the_most_similar_one(options, message):
    with pytest.raises(ConfigError, match=message):
        CLConfig(output_dir="r", **{k: [v] for k, v in options.items()})


def test_an_unknown_name_in_a_command_is_an_error_with_the_most_similar_one(make, tmp_path, monkeypatch):
    run = make_rich_run(make, tasks=["trace_fomc"], n=2)
    annotate = ["annotate", tmp_path / "out", *JUDGE, "--data", "demo", "--tasks"]
    (tmp_path / "c.yaml").touch()
    study = tmp_path / "s.yaml"
    study.write_text("config: c.yaml\nruns: {lora: {method: sequential}}")
    for argv, near in (
        (["evaluate", run.path, "--general", "general_mmul"], "general_mmlu"),
        (["judge", run.path, *JUDGE, "--suites", "instruct_lma"], "instruct_lima"),
        ([*annotate, "trace_fmoc"], "trace_fomc"),
        ([*annotate, "oder1"], "order1"),
        (["study", study, "--only", "lara"], "lora"),
    ):
        assert error(*argv).endswith(f" Did you mean {near}?")
    monkeypatch.setenv("TRACE_TASKS", str(tmp_path))
    assert data.expand_orders(["oder1", "order1"]) == ["oder1", *data.FOLDERS], "it may be a task of one's own"


# --------------------------------------------------------------------------------- stopped, or with nobody who listens

STOPPED = re.compile(r"^stopped: .* To continue: (.*)$", re.M)


def listens(pid, ended=lambda: None):
    """Waits until a process handles SIGTERM."""
    while ended() is None:
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1:
                return
        time.sleep(0.001)


def start(*command, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # nohup makes all programs that it starts ignore SIGHUP.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **options}, **pipes, **heed)


def the_line(process, number):
    """The command in the one line that a process prints when a signal ends it."""
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, (process.returncode, out, err)
    assert "Traceback" not in err and "Exception ignored" not in err, err
    (command,) = STOPPED.findall(err)
    return command


@pytest.mark.parametrize(
    "words, number",
    [
        (["trainers.sequential", "--config", "a file.yaml", "--output_dir", "runs/$x"], signal.SIGINT),
        (["trace_bench", "train", "ewc", "--output_dir", "it's"], signal.SIGHUP),
    ],
)
def test_ctrl_c_during_imports_prints_one_line_with_the_command_to_repeat(words, number):
    process = start(sys.executable, "-m", *words)
    listens(process.pid, process.poll)
    time.sleep(0.1 if words[0].startswith("trainers") else 0)
    assert the_line(process, number) == shlex.join([sys.executable, "-m", *words])


def test_the_command_to_repeat_names_the_script_as_it_was_called(monkeypatch, tmp_path):
    script = tmp_path / "trace-bench"
    script.write_text("#!")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "evaluate", "runs/a b"])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *sys.argv])
    assert ending._given() == f"{script} evaluate 'runs/a b'"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert ending._given() == "trace-bench evaluate 'runs/a b'"


def test_the_command_to_repeat_includes_the_launcher():
    """A launcher (accelerate launch, torchrun) is a separate program whose command ends with the same words."""
    launcher = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    words = ["-m", "trainers.sequential", "--config", "a b.yaml"]
    process = start(sys.executable, "-c", launcher, *words)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        time.sleep(0.001)
    child = int(children.read_text())
    listens(child)
    os.kill(child, signal.SIGTERM)
    assert process.wait() == 143
    assert STOPPED.findall(process.stderr.read()) == [shlex.join([sys.executable, "-c", launcher, *words])]


def test_ctrl_c_while_waiting_for_a_judge_prints_one_line(make):
    run = make_rich_run(make, tasks=["trace_fomc"], n=2)
    for stage in run.stages:
        shutil.rmtree(stage.path / "judge")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        words = [*MODULE, "judge", str(run.path), "--model", "m", "--base-url", url]
        process = start(*words, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        silent.accept()
        time.sleep(0.2)
        assert the_line(process, signal.SIGINT) == shlex.join(words)


@pytest.mark.parametrize(
    "command, kept",
    [
        ("train", "trained stages"),
        ("evaluate", "finished cells"),
        ("judge", "replies"),
        ("annotate", "replies"),
        ("study", "the finished work"),
        ("data", "nothing is lost"),
    ],
)
def test_ctrl_c_in_any_command_prints_what_is_kept(command, kept, monkeypatch, capfd):
    def stopped(*args):
        raise KeyboardInterrupt

    if command == "train":
        from trainers import base

        monkeypatch.setattr(base.stages, "train", stopped)
        argv = ["--output_dir", "r"]
        function, given = (lambda: base.main(base.CLTrainer, base.CLConfig, argv)), "python -m trainers.sequential "
    else:
        monkeypatch.setattr(cli.module_of(command), "run", stopped)
        argv = [command, "a b", *(["--model", "m"] if command in ("judge", "annotate") else [])]
        function, given = (lambda: main(argv)), "trace-bench "
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e:
        function()
    assert e.value.code == 130 and signal.getsignal(signal.SIGTERM) is before
    (line,) = re.findall("^stopped: .*$", capfd.readouterr().err, re.M)
    assert kept in line and line.endswith(f"To continue: {given}{shlex.join(argv)}")


CHILD = """
import time; from trace_bench import ending
with ending.command('train'): print('on', flush=True); time.sleep(60)
"""
PARENT = f"""
import sys; from trace_bench import ending
with ending.command("study"):
    sys.exit(ending.run_child([sys.executable, "-c", {CHILD!r}]))
"""


def test_a_folder_of_the_user_does_not_hide_our_packages_from_a_child(tmp_path, monkeypatch):
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "__init__.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    for environment in (None, dict(os.environ)):
        assert ending.run_child([sys.executable, "-c", "import trainers"], environment) == 0


def test_a_child_runs_the_code_of_a_checkout_that_another_installation_would_hide(tmp_path, monkeypatch):
    for package in ("trace_bench", "trace_tasks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    where = "import trace_bench; print(trace_bench.__file__, flush=True)"
    code = f"{where}; import sys; from trace_bench import ending; ending.run_child([sys.executable, '-c', {where!r}])"
    said = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    assert said.splitlines() == [str(tmp_path / "trace_bench" / "__init__.py")] * 2


@pytest.mark.parametrize("number, whole_group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_stopped_command_ends_its_child_and_prints_one_line_for_both(number, whole_group):
    process = start(sys.executable, "-c", PARENT)
    assert process.stdout.readline() == "on\n"
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.wait(30) == 128 + number
    assert process.stderr.read().count("stopped: ") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.timeout(60)
def test_a_signal_during_a_destructor_is_not_lost():
    code = """
import os, signal, time; from trace_bench import ending
class Late:
    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)
with ending.command("train"):
    Late()
    time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.count("stopped: ")) == (143, 1) and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["trace_bench", "status", "RUN"], ["trainers.replay", "--help"]], ids=" ".join)
def test_a_command_whose_output_is_closed_ends_silently(run, words):
    words = [str(run.path) if word == "RUN" else word for word in words]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode in ((0, 141) if "--help" in words else (141,))  # argparse ignores a closed output
    assert done.stderr == ""
    closed = subprocess.run(
        ["sh", "-c", f"exec {shlex.join([sys.executable, '-m', *words])} >&-"], cwd=ROOT, capture_output=True, text=True
    )
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_full_output_is_a_one_line_error(run):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MODULE, "status", str(run.path)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and re.fullmatch("error: .*No space left on device.*\n", done.stderr)


@pytest.mark.parametrize("ascii_only", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=str)
def test_an_ascii_terminal_gets_readable_output(run, ascii_only):
    for name, code in ((run.path, 0), ("é–…→", 1)):
        done = subprocess.run([*MODULE, "status", name], capture_output=True, env={**os.environ, **ascii_only})
        assert done.returncode == code and (done.stdout + done.stderr).isascii(), done
        assert b"Traceback" not in done.stderr
        assert code or b"a\\u2013b" in done.stdout, "a dash is shown as what it is"


# -------------------------------------------------------------------------------------------------------- requirements


@pytest.mark.parametrize("file", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda f: f.name)
def test_every_requirement_is_an_exact_pin(file):
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    assert any(lines)
    for line in filter(None, lines):
        assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[A-Za-z0-9.]+", line), line
