"""A user's own methods, configs and tasks are found by name, path or module, and tried before training."""

import csv
import json
import multiprocessing
import os
import re
import shlex
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from conftest import command_line, config_of, error, quick_options

import trainers.help
from trace_bench import packaged, study
from trace_bench.cli import main
from trace_bench.own_task import make_task, recognise
from trace_bench.report.conditions import conditions
from trace_bench.run import Run
from trace_bench.tasks import load_tasks, task_manager, training_rows
from trace_tasks.data import DataError
from trace_tasks.data.files import write_json, write_jsonl
from trainers.base import CLConfig
from trainers.base.stages import parse

METHOD = '''"""Halves: the gradient times a strength."""

from dataclasses import dataclass

from trainers.base import CLConfig, CLTrainer, main, option


@dataclass
class HalfConfig(CLConfig):
    strength: float = option(0.5, "what the gradient is multiplied with", least=0)


class HalfTrainer(CLTrainer):
    def adjust_gradients(self, model):
        for parameter in self.trained().values():
            if parameter.grad is not None:
                parameter.grad.mul_(self.config.strength)


if __name__ == "__main__":
    main(HalfTrainer, HalfConfig)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory whose name has a space and an umlaut."""
    folder = tmp_path / "my wörk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", str(folder))  # a shell sets it
    return folder


# -------------------------------------------------------------------------------------------------------------- methods


def test_a_method_of_a_file_is_trained_and_named_after_it(here, tiny_model, monkeypatch, caplog):
    misspelt = "Trainer):\n    def end_stages(self): ...\n"
    misspelt += "    def before_step(self): self.before = self.started = self.idle = self.mixed_in = {'own': 1}\n"
    misspelt += "    class Buffer:\n        def __init__(self): self.state = []\n"  # of its own, not the trainer's
    (here / "half.py").write_text(METHOD.replace('"__main__"', "'__main__'").replace("Trainer):\n", misspelt))
    options = {**quick_options(tiny_model, here / "run"), "tasks": ["trace_fomc"], "strength": 0}
    main(["train", "half.py", *command_line(options)])
    assert "HalfTrainer.end_stages is not a hook: nothing calls it. Did you mean end_stage?" in caplog.text
    run = Run.open(here / "run")
    assert run.manifest["method"] == "half" and run.manifest["config"]["strength"] == 0
    losses = {entry["loss"] for entry in json.loads(run.stages[1].train_file.read_text())["losses"]}
    assert run.stages[1].is_trained and len(losses) >= 1
    from safetensors.torch import load_file

    adapter = load_file(run.stages[1].checkpoint / "adapter_model.safetensors")
    assert all(not t.any() for name, t in adapter.items() if "lora_B" in name), "a strength of 0 trains nothing"


def test_a_file_named_like_a_method_of_the_package_is_refused(here, tiny_model):
    (here / "ewc.py").write_text(METHOD)
    argv = command_line({**quick_options(tiny_model, here / "run"), "tasks": ["trace_fomc"]})
    assert "ewc.py has the name of the package's method ewc" in error("train", "ewc.py", *argv)
    assert not (here / "run").exists()


def test_a_method_that_hides_attributes_of_the_trainer_is_refused_before_training(here, tiny_model):
    """Otherwise the first stage would be trained, and lost when its record is written."""
    (here / "half.py").write_text(METHOD.replace("(self, model):\n", "(self, model):\n        self.record = {}\n"))
    argv = command_line({**quick_options(tiny_model, here / "run"), "tasks": ["trace_fomc"]})
    said = error("train", "half.py", *argv)
    assert "HalfTrainer sets self.record, which the trainer already uses" in said and "such as half_record" in said
    assert not (here / "run").exists()


@pytest.mark.parametrize("name", ["half.py", "own.half"])
def test_the_help_of_a_users_method_has_its_options(here, name, capsys):
    more = 'plain: int = 3\n    learning_rate: float = field(default=0.5, metadata={"help": "Larger."})\n    strength:'
    code = METHOD.replace("strength:", more).replace("import dataclass", "import dataclass, field")
    for file in (here / "half.py", here / "own" / "half.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    main(["train", name, "--help"])
    shown = capsys.readouterr().out
    assert f"trace-bench train {name}" in shown and "what the gradient is multiplied with [0.5]" in shown
    assert re.search(r"--learning_rate +Larger\. \[0\.5\]\n", shown) and re.search(r"--plain +\[3\]\n", shown)
    assert "--max_prompt_length" in shown, "those of every run, too"
    (here / "half.py").write_text(code.replace('"Larger."', "__name__"))
    assert not trainers.help.show(here / "half.py", "train it"), "a computed text: the full help has it"


@pytest.mark.parametrize(
    "name, said",
    [
        ("ecw", "Did you mean ewc?"),
        ("no/such.py", "There is no file"),
        ("no.such.module", "There is no module"),
        ("empty.py", "does not start a training"),
        ("idle.py", "does not start a training"),
    ],
)
def test_a_missing_method_is_a_clear_error(here, name, said):
    (here / "empty.py").write_text("x = 1\n")
    (here / "idle.py").write_text(METHOD.replace("    main(", "    print("))
    assert said in error("train", name)


def test_a_study_takes_methods_by_file_and_configs_by_name(here, tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text(METHOD)
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    (tmp_path / "mine.yaml").write_text("config: base.yaml\nruns: {a: {method: half.py}, b: {method: ewc}}\n")
    methods = {name: method for name, (method, _) in study.read_study(tmp_path / "mine.yaml").items()}
    assert methods == {"a": str(tmp_path / "half.py"), "b": "ewc"}
    seen = []
    monkeypatch.setattr(study, "run_child", lambda words: seen.append(words) or 1)

    def run(command, input, **_):
        """Runs a command in a fork of this process, which need not import torch again."""
        from trainers.commands.options import refused

        with multiprocessing.get_context("fork").Pool(1) as pool:
            return SimpleNamespace(returncode=0, stdout=json.dumps(pool.apply(refused, [json.loads(input)])))

    monkeypatch.setattr(study.subprocess, "run", run)
    wrong = "config: base.yaml\nruns: {a: {method: half.py, strength: 2}, b: {method: ewc, ewc_lamda: 2}}\n"
    (tmp_path / "wrong.yaml").write_text(wrong)
    with pytest.raises(study.StudyError, match=r"\A\S+wrong.yaml, runs, b: ewc has no option .*mean ewc_lambda"):
        study.run_study(tmp_path / "wrong.yaml", output_dir=tmp_path / "out")
    assert not seen, "before the first training"
    monkeypatch.setattr(study, "_refuse_options", lambda *args: None)
    study.run_study(tmp_path / "mine.yaml", output_dir=tmp_path / "out")
    assert [words[3:5] for words in seen] == [["train", str(tmp_path / "half.py")], ["train", "ewc"]]
    assert study.read_study("replay") == study.read_study(packaged.studies()["replay"])


# -------------------------------------------------------------------------------------------------------------- configs


def test_every_packaged_file_is_listed_with_its_purpose(here, capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    names = [*packaged.configs(), *packaged.studies(), *packaged.tuned()]
    assert len(names) > 15 and len(lines) == len(names) + 3
    for name in names:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 3, "says what it is for"


def test_a_copied_study_works_in_its_new_place(here):
    main(["configs", "--copy", "replay"])
    copied, original = study.read_study("replay.yaml"), study.read_study(packaged.studies()["replay"])
    assert copied.keys() == original.keys()
    assert all(os.path.isfile(arguments[arguments.index("--config") + 1]) for _, arguments in copied.values())
    assert "already exists" in error("configs", "--copy", "replay")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--config", "quikstart"], "Did you mean quickstart?"),
        (["--strenght", "2"], "sequential has no option strenght."),
        (["--learning-rat=2"], None),
        (["--tune", "7b"], "no option tune (did you mean tuned?)"),  # it would be recorded, but not used
        (["--max_promt_length", "2"], "max_promt_length (did you mean max_prompt_length?)"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["fast"], "fast does not belong to an option"),
        (["--config"], "cannot be read"),
        (["--config=quikstart"], "Did you mean quickstart?"),
        (["--config", "quickstart", "--config=quickstart"], "--config is given more than once"),
        (["--like=nowhere"], "nowhere is not a run"),
        ([], "Use a config that sets it"),
        (["--model_name_or_path", "m"], "output_dir is not set. Give the folder of the run: --output_dir runs/NAME"),
    ],
)
def test_an_unknown_option_is_an_error_with_the_most_similar_one(here, argv, said, capsys):
    message = error("train", "sequential", *argv)
    assert said is None or said in message
    assert "usage:" not in capsys.readouterr().err and message.count("\n") < 3


def test_an_unknown_option_in_a_file_is_an_error_with_the_most_similar_one(here):
    (here / "c.yaml").write_text("learning_rates: 1\n")
    assert "learning_rates (did you mean learning_rate?)" in error("train", "sequential", "--config", "c.yaml")


def test_a_config_beyond_ascii_in_a_locale_without_utf8_is_an_error_with_the_remedy(here, monkeypatch):
    (here / "c.yaml").write_text("# Größe\nlearning_rates: 1\n", encoding="utf-8")
    monkeypatch.setattr("trl.scripts.utils.open", partial(open, encoding="ascii"), raising=False)  # as TRL opens it
    assert "set PYTHONUTF8=1" in error("train", "sequential", "--config", "c.yaml")


# ---------------------------------------------------------------------------------------------------------------- tasks

DATE = "2024-01-01T10:00:00"
FROM = {"user": "human", "assistant": "gpt"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]
ROWS = {
    "messages": ({"messages": CHAT}, "system: Be brief.\n1+1?\nassistant:\n", "2"),
    "alpaca": ({"instruction": "Add.", "input": "1+1", "output": "2"}, "Add.\n1+1\n", "2"),
    "columns": ({"question": "1+1?", "label": "2"}, "1+1?\n", "2"),
    "sharegpt": (
        {"conversations": [{"from": FROM.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT]},
        "system: Be brief.\n1+1?\nassistant:\n",
        "2",
    ),
    "trl": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], "completion": CHAT[-1:]},
        "1+1?\nassistant:\n",
        "2",
    ),
    "dolly": ({"instruction": "Add.", "context": "1+1", "response": "2", "category": "math"}, "Add.\n1+1\n", "2"),
}
#: Further forms, which are tested in one kind of file.
FORMS = [
    *product(("messages", "alpaca", "columns"), (".jsonl", ".json", ".csv", ".parquet")),
    *(("sharegpt", ".json"), ("trl", ".jsonl"), ("dolly", ".jsonl")),
]


def write_rows(file, row, number=10):
    rows = [json.loads(json.dumps(row).replace("1+1", f"{i}+1")) for i in range(number)]
    if file.suffix == ".jsonl":
        write_jsonl(file, rows)
    elif file.suffix == ".json":
        write_json(file, rows)
    else:
        import pandas

        table = pandas.DataFrame(rows)
        table.to_parquet(file) if file.suffix == ".parquet" else table.to_csv(file, index=False)
    return file


@pytest.mark.parametrize(
    ("kind", "suffix"),  # a table of texts cannot contain lists
    [pair for pair in FORMS if pair != ("messages", ".csv")],
)
def test_a_file_of_rows_becomes_a_task(here, kind, suffix, monkeypatch):
    row, prompt, answer = ROWS[kind]
    folder = here / "data"
    folder.mkdir()
    shown = make_task(write_rows(folder / f"mine{suffix}", row))
    assert prompt.replace("1+1", "0+1") in shown
    assert ("does not use the columns category; the task keeps them" in shown) == (kind == "dolly")
    monkeypatch.setenv("TRACE_TASKS", str(folder))
    monkeypatch.chdir("/")  # paths in a YAML are relative to it
    task = load_tasks(["mine"])["mine"]
    assert training_rows(task)[1] == (prompt, answer) and len(task.eval_docs) == 2
    assert len(training_rows(task)) == 8, "the last fifth is kept apart"
    assert kind != "dolly" or next(iter(task.test_docs()))["category"] == "math", "for a prompt of one's own"


TABLES = [
    ("a.csv", "question,answer\nA?,1\nB?,\n", r"row 1 has no answer\. Give it an answer"),
    ("a.jsonl", '{"question": "A?", "answer": "\\ud800"}\n', "row 0 has half of a surrogate pair"),
    ("b.csv", "question,answer\nA?,1\nB, C?,2\n", "row 1 has more cells than the first line"),
    ("c.csv", "question;answer\nA?;1\nB?;2\n", r"in the columns question;answer\..* In a \.csv, separate columns"),
]


def test_a_refused_file_of_rows_leaves_no_task_and_no_change(here):
    with pytest.raises(DataError, match=r"in the columns a, b\. Rename them to messages"):
        recognise(["a", "b"])
    turned = {"messages": CHAT[:2]}
    with pytest.raises(DataError, match=r"row 0: there must be at least two messages"):
        make_task(write_rows(here / "turned.jsonl", turned))
    called = {"messages": [*CHAT[:2], CHAT[2] | {"tool_calls": [{"function": {"name": "add"}}]}]}
    with pytest.raises(DataError, match=r"row 0: a message has no role, or its content is not text \(tool calls"):
        make_task(write_rows(here / "turned.jsonl", called))
    (here / "bare.jsonl").write_text('{"prompt": null, "answer": "2"}\n{"prompt": "1+2", "answer": "3"}\n')
    with pytest.raises(DataError, match=r"bare.jsonl, row 0 has no prompt\. Give it a prompt, or remove the row"):
        make_task(here / "bare.jsonl")
    (here / "half.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2", "answer": null}\n')
    with pytest.raises(DataError, match=r"half.jsonl, row 1 has no answer\. Give it an answer, or remove the row"):
        make_task(here / "half.jsonl")
    for name, lines, said in TABLES:
        (here / name).write_text(lines)
        with pytest.raises(DataError, match=said):
            make_task(here / name)
        (here / name).unlink()
    write_jsonl(here / "empty.jsonl", [{"prompt": "", "answer": "2"}] * 5)
    with pytest.raises(DataError):
        make_task(here / "empty.jsonl")  # the trial refuses it after its files were made
    assert {file.name for file in here.iterdir()} == {"turned.jsonl", "bare.jsonl", "half.jsonl", "empty.jsonl"}
    make_task(write_rows(here / "good.jsonl", ROWS["columns"][0]), write_rows(here / "test.jsonl", ROWS["columns"][0]))
    with pytest.raises(DataError, match="already exists"):
        make_task(here / "good.jsonl")


TEXTS = [
    *(['["Berlin", "Paris"]', "[1, 2]"], ["2", "1.50"], ["0007", "0107"], ["None", "NA"], ["2024-01-03", "2024-02-01"]),
    ["def f():\n    pass\n\n\ndef g():\n    pass", "x = 1"],
    ["天气很好我们去公园散步吧今天的天气真的很好", "你"],
]


@pytest.mark.parametrize("kind", ["messages.jsonl", "columns.jsonl", "columns.csv", "columns.json", "alpaca.parquet"])
def test_texts_of_a_file_are_trained_and_scored_unchanged(here, monkeypatch, kind):
    def row(text):
        if kind.startswith("messages"):
            return {"messages": [{"role": "user", "content": "NA"}, {"role": "assistant", "content": text}], "at": DATE}
        if kind.startswith("alpaca"):
            return {"instruction": "NA", "input": None, "output": text, "at": DATE}
        return {"question": "NA", "answer": text, "at": DATE}

    for i, answers in enumerate(TEXTS):
        file, rows = here / f"mine{i}.{kind.partition('.')[2]}", list(map(row, answers))
        if file.suffix == ".csv":
            with file.open("w", newline="", encoding="utf-8") as table:
                writer = csv.DictWriter(table, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        elif file.suffix == ".parquet":
            pandas.DataFrame(rows).to_parquet(file)
        else:
            (write_jsonl if file.suffix == ".jsonl" else write_json)(file, rows)
        make_task(file, file)
    monkeypatch.setenv("TRACE_TASKS", str(here))
    prompt = "NA\nassistant:\n" if kind.startswith("messages") else "NA\n"
    for task, answers in zip(load_tasks([f"mine{i}" for i in range(len(TEXTS))]).values(), TEXTS, strict=True):
        assert training_rows(task) == [(prompt, answer) for answer in answers]
        made = task.config.generation_kwargs
        for doc, answer in zip(task.test_docs(), answers, strict=True):
            assert task.process_results(doc, [answer])["exact_match"] == 1
            assert made["until"] and not any(stop in answer for stop in made["until"])
            assert made["max_gen_toks"] >= len(answer.encode())


def test_numbers_of_a_json_file_keep_their_digits(here, monkeypatch):
    rows = ['{"prompt": 1, "answer": 2}', '{"prompt": "b", "answer": 1.50}', '{"prompt": "c", "answer": true}']
    json_text = '{"n": 1.50, "of": [1, "2", null, true], "é": {}}'  # numbers inside JSON stay numbers
    (here / "mine.jsonl").write_text("\n".join([*rows[:2], f'{{"prompt": "j", "answer": {json_text}}}', rows[2]]))
    make_task(here / "mine.jsonl")
    monkeypatch.setenv("TRACE_TASKS", str(here))
    trained = training_rows(load_tasks(["mine"])["mine"])
    assert trained == [("1\n", "2"), ("b\n", "1.50"), ("j\n", json_text)]


def test_a_task_name_that_means_something_else_is_refused(here):
    for name in ("trace_fomc", "order1", "general_mmlu", "none"):
        with pytest.raises(DataError, match=f"--name my_{name}"):
            make_task(write_rows(here / f"{name}.jsonl", ROWS["columns"][0]))


def test_a_run_records_the_folder_of_its_tasks(here, tiny_model, monkeypatch, capsys):
    row = ROWS["columns"][0]
    make_task(write_rows(here / "mine.jsonl", row))
    monkeypatch.setenv("TRACE_TASKS", str(here))
    options = {**quick_options(tiny_model, here / "run"), "tasks": ["mine"]}
    main(["train", "sequential", *command_line(options)])
    monkeypatch.delenv("TRACE_TASKS")
    main(["evaluate", "run"])
    assert "evaluated 2 cells" in capsys.readouterr().out
    monkeypatch.delenv("TRACE_TASKS", raising=False)
    (here / "run" / "stages" / "0_base" / "eval" / "mine.json").unlink()
    manifest = json.loads((here / "run" / "manifest.json").read_text())
    manifest["data"]["own_tasks"] = str(here / "gone")
    write_json(here / "run" / "manifest.json", manifest)
    assert "gone, which is missing: set TRACE_TASKS" in error("evaluate", "run")
    (here / "run" / "tasks").mkdir()
    for folder in ("run/tasks", str(here / "run" / "tasks"), os.curdir):  # functions from there would be run
        manifest["data"]["own_tasks"] = folder
        write_json(here / "run" / "manifest.json", manifest)
        assert "a task can run code. If you trust its author" in error("evaluate", "run")


def test_unknown_tasks_are_errors_with_the_most_similar_ones(here, monkeypatch):
    make_task(write_rows(here / "mine.jsonl", ROWS["columns"][0]))
    monkeypatch.setenv("TRACE_TASKS", str(here))
    ours = task_manager()  # without lm-eval's own, whose index takes seconds
    monkeypatch.setattr("trace_bench.tasks.task_manager", lambda include_defaults=False: ours)
    with pytest.raises(DataError, match=r"mien \(did you mean mine\?\).* TRACE_TASKS has: mine\."):
        load_tasks(["mien"])
    with pytest.raises(DataError, match=r"trace_fomk \(did you mean trace_fomc\?\).*trace_cstance"):
        load_tasks(["trace_fomk"])
    monkeypatch.setenv("TRACE_TASKS", "nowhere")
    with pytest.raises(DataError, match=r"TRACE_TASKS=nowhere: .* is not a folder with task YAMLs"):
        load_tasks(["mine"])


def test_the_commands_that_are_shown_can_be_pasted(here, capsys):
    main(["task", "new", str(write_rows(here / "mine.jsonl", ROWS["columns"][0]))])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[0] == f"TRACE_TASKS={here}" and words[-1] == "runs/mine"


# ------------------------------------------------------------------------------------ a mistake is never for good: runs


def save_adapter(model, folder, seed):
    """Saves an adapter with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return str(folder)


def cells(run):
    return {f"{f.parents[1].name}/{f.name}": f.read_bytes() for f in run.glob("stages/*/eval/*.json")}


def test_checkpoints_are_dropped_replaced_and_moved(here, tiny_model, capsys, monkeypatch):
    monkeypatch.setenv("TRACE_DATA", "demo")
    first, second = (save_adapter(tiny_model, here / f"v{i}", i) for i in (1, 2))
    begin = ["evaluate", "run", "--model", str(tiny_model), "--backend", "hf", "--tasks", "trace_fomc"]
    begin += ["--test-rows", "2", "--max-prompt-length", "96"]
    main([*begin, "--checkpoint", f"v1={first}", "--checkpoint", f"v2={second}"])
    made = cells(here / "run")
    assert len(made) == 3 and "evaluated 3 cells" in capsys.readouterr().out

    (here / "v2").rename(here / "elsewhere")
    main(["evaluate", "run"])
    assert "nothing to evaluate" in capsys.readouterr().out, "a copied run needs no checkpoint that is measured"
    main(["evaluate", "run", "--checkpoint", f"v2={here / 'elsewhere'}"])
    assert "nothing to evaluate" in capsys.readouterr().out and cells(here / "run") == made, "the files are equal"

    main(["evaluate", "run", "--drop", "v1"])
    assert [stage.index for stage in Run.open("run").chosen([2])] == [1], "--stages takes the numbers of folders"
    assert "no stage [1]: the run has 0, 2" in error("evaluate", "run", "--stages", "1")
    left = cells(here / "run")
    assert left.keys() == {"0_base/trace_fomc.json", "2_v2/trace_fomc.json"} and left.items() <= made.items()
    main(["evaluate", "run", "--checkpoint", f"v1={first}"])
    assert "evaluated 1 cell" in capsys.readouterr().out
    again = cells(here / "run")
    assert again.keys() == {*left, "3_v1/trace_fomc.json"}, "the others keep their folders"

    third = save_adapter(tiny_model, here / "v3", 3)
    main(["evaluate", "run", "--checkpoint", f"v2={third}"])
    replaced = cells(here / "run")
    assert replaced["2_v2/trace_fomc.json"] != again["2_v2/trace_fomc.json"], "other weights are measured again"
    assert replaced["3_v1/trace_fomc.json"] == again["3_v1/trace_fomc.json"]
    assert "Did you mean v2?" in error("evaluate", "run", "--drop", "v22")
    main(["report", "run"])


def test_a_bound_is_trained_like_the_run_that_it_bounds(here, tiny_model, monkeypatch, capsys):
    options = {**quick_options(tiny_model, here / "run"), "ewc_lambda": 7, "engine_args": '{"max_length": 256}'}
    main(["train", "ewc", *command_line(options)])
    make_task(write_rows(here / "mine.jsonl", ROWS["columns"][0]))
    manifest = json.loads((here / "run/manifest.json").read_text())
    manifest["tuned"] = {"learning_rate": 1e-2, "weight_decay": 9.0, "ewc_lambda": 7.0}
    manifest["data"]["own_tasks"] = str(here)
    write_json(here / "run/manifest.json", manifest)
    monkeypatch.setenv("TRACE_TASKS", "put back afterwards")
    monkeypatch.delenv("TRACE_TASKS")
    main(["train", "joint", "--like", "run", "--output_dir", "run-joint"])
    assert "joint uses --learning_rate 0.01, which ewc had from the table" in capsys.readouterr().out
    assert os.environ["TRACE_TASKS"] == str(here)
    run, bound = Run.open("run"), Run.open("run-joint")
    assert (bound.manifest["method"], bound.tasks) == ("joint", run.tasks)
    there, here_ = run.manifest["config"], bound.manifest["config"]
    assert {k for k in there if there[k] != here_.get(k)} == {k for k in there if k.startswith("ewc")}
    main(["train", "der", *command_line(quick_options(tiny_model, here / "repeats")), "--replay_ratio", "0.5"])
    for method, kept in (("joint", None), ("sequential", None), ("replay", 0.5)):
        words = ["--like", "repeats", "--output_dir", "x", *(["--replay", "mixed"] if kept else [])]
        assert parse(config_of(method), words, method)[0].manifest().get("replay_ratio") == kept, method
    assert "is not a run" in error("train", "joint", "--like", "gone", "--output_dir", "x")


def test_a_finished_run_can_be_extended_by_tasks(here, tiny_model, capsys):
    options = {
        **quick_options(tiny_model, here / "run"),
        "tasks": ["trace_fomc", "trace_numglue_ds"],
        "epochs": [1.0, 1.0],
        "max_steps": -1,
    }
    main(["train", "ewc", *command_line(options)])
    main(["evaluate", "run"])
    before, trained = cells(here / "run"), (here / "run/stages/2_trace_numglue_ds/train.json").read_bytes()
    longer = {**options, "tasks": [*options["tasks"], "trace_py150"], "epochs": [1.0, 1.0, 1.0]}
    main(["train", "ewc", *command_line(longer)])
    main(["evaluate", "run"])
    run, now = Run.open(here / "run"), cells(here / "run")
    assert run.stages[3].is_trained and before.items() <= now.items() and len(now) == len(before) + 4
    assert (run.stages[2].path / "train.json").read_bytes() == trained, "nothing is trained again"
    main(["report", "run"])
    assert "OP_3" in capsys.readouterr().out
    wrong = {**options, "tasks": ["trace_fomc", "trace_py150"]}
    assert "a different configuration" in error("train", "ewc", *command_line(wrong))
    assert "a different configuration" in error("train", "ewc", *command_line({**longer, "learning_rate": 0.5}))


def test_a_joint_run_cannot_be_extended_by_tasks(here, tiny_model):
    options = quick_options(tiny_model, here / "run")
    main(["train", "joint", *command_line(options)])
    longer = {**options, "tasks": [*options["tasks"], "trace_py150"]}
    assert "a different configuration" in error("train", "joint", *command_line(longer))


def test_only_the_unknown_task_among_known_ones_is_named(here):
    with pytest.raises(DataError, match=r"Unknown task\(s\) gsm8kk\. TRACE has"):
        load_tasks(["trace_fomc", "gsm8k", "gsm8kk"])  # lm-eval has gsm8k
    (here / "c.yaml").write_text("tasks: trace_fomc, trace_fomk\n")
    for argv in (["--tasks", "trace_fomc,trace_fomk"], ["--config", "c.yaml"]):
        assert "trace_fomk (did you mean trace_fomc?)" in error("train", "sequential", *argv)


def test_a_moved_base_model_is_accepted_and_a_different_one_refused(here, tiny_model, checkpoints, capsys):
    """A run is moved to a machine that has the same files in a different folder. Finished work stays."""
    shutil.copytree(tiny_model, here / "base")
    options = {**quick_options("base", here / "run"), "tasks": ["trace_fomc"], "test_rows": 2, "max_steps": 1}
    main(["train", "sequential", *command_line(options)])
    (here / "moved").mkdir()
    (here / "base").rename(here / "moved" / "base")
    assert "Give its new folder: trace-bench evaluate RUN --model FOLDER" in error("evaluate", "run")
    assert "its files differ" in error("evaluate", "run", "--model", str(checkpoints["full model"]))
    main(["evaluate", "run", "--model", "moved/base"])
    assert "evaluated 2 cells" in capsys.readouterr().out
    (here / "moved").rename(here / "again")
    longer = {**options, "model_name_or_path": "again/base", "tasks": ["trace_fomc", "trace_numglue_ds"]}
    trained = (here / "run/stages/1_trace_fomc/train.json").read_bytes()
    main(["train", "sequential", *command_line(longer)])
    assert (here / "run/stages/1_trace_fomc/train.json").read_bytes() == trained
    run = Run.open("run")
    assert run.stages[2].is_trained and run.manifest["model"]["name"] == "base"
    like = parse(CLConfig, ["--like", "run", "--output_dir", "x"], "joint")[1]
    assert Path(like.model_name_or_path) == (here / "again" / "base").absolute()
    elsewhere = {**run.manifest, "model": {**run.manifest["model"], "name": "/mnt/base"}}
    assert conditions(run) == conditions(Run(run.path, elsewhere)), "runs of two machines can be compared"
