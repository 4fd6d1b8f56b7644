"""Measurements in addition to the matrix: lm-eval's suites from a local copy, and answers for the judges."""

import csv
import json
import re
import sys
import warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from conftest import SHARED, both_tokenizers, train
from forks import run_module
from lm_eval.api.model import LM
from made_runs import cell

from trace_bench import cli, engine, evaluate
from trace_bench.evaluate import cells, suites
from trace_bench.evaluate.tasks import run_tasks
from trace_bench.report import Results, write_report
from trace_bench.run import Run, RunError, read_json
from trace_bench.tasks import load_suites, load_tasks, task_manager
from trace_tasks import data, general
from trace_tasks.data.files import write_json
from trainers.base import CLConfig, ConfigError

GENERAL = SHARED / "data" / "general"
LANGUAGES = ("arabic", "bengali", "english", "finnish", "indonesian", "korean", "russian", "swahili", "telugu")
needs_shared = pytest.mark.skipif(not GENERAL.is_dir(), reason="needs ../shared/data/general, rows of the real suites")


def write_lines(file: Path, rows: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def local(tmp_path, monkeypatch) -> Path:
    """A local copy of two suites in our own words, with three test rows each."""
    root = tmp_path / "general"
    sums = [{"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(1, 5)]
    write_lines(root / "gsm8k" / "test.jsonl", sums[:3])
    write_lines(root / "gsm8k" / "train.jsonl", sums[3:])
    facts = [
        {
            "question": f"is {c} warm",
            "passage": f"Colours\u2028-- {c} is {'' if i % 2 else 'not '}warm.",
            "label": i % 2 == 1,
        }
        for i, c in enumerate(("blue", "red", "green", "orange"))
    ]
    write_lines(root / "boolq" / "val.jsonl", facts[:3])
    write_lines(root / "boolq" / "train.jsonl", facts[3:])
    monkeypatch.setenv("GENERAL_DATA", str(root))
    return root


# ------------------------------------------------------------------------- the local suites are lm-eval's own tasks


class Fake(LM):
    """A model whose answers depend only on the request and are right for about half of the documents."""

    def loglikelihood(self, requests):
        return [(-float(sum(map(ord, "".join(r.args))) % 97), False) for r in requests]

    def generate_until(self, requests):
        return [self.answer(r.doc) if len(r.args[0]) % 2 else "the answer is 1." for r in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def answer(self, doc):
        if "answers" in doc:
            return doc["answers"][0]
        return f"so the answer is {doc.get('target') or doc['answer'].split('#### ')[1]}."


def lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def rows_of_the_hub(path: str, name: str | None = None, **_) -> datasets.DatasetDict:
    """The local rows in the splits, columns and types of the hub's data sets, read independently."""
    text = datasets.Value("string")
    features: dict = {}
    if path == "openai/gsm8k":
        assert name == "main"
        splits = {s: lines(GENERAL / "gsm8k" / f"{s}.jsonl") for s in ("train", "test")}
        features = {"question": text, "answer": text}
    elif path == "cais/mmlu":
        splits = {}
        for split in ("dev", "test"):
            with (GENERAL / "mmlu" / split / f"{name}_{split}.csv").open(encoding="utf-8", newline="") as f:
                splits[split] = [
                    {"question": q, "subject": name, "choices": choices, "answer": "ABCD".index(letter)}
                    for q, *choices, letter in csv.reader(f)
                ]
        features = {"question": text, "subject": text, "choices": datasets.List(text)}
        features["answer"] = datasets.ClassLabel(names=list("ABCD"))
    elif path == "SaylorTwift/bbh":
        splits = {"test": json.loads((GENERAL / "bbh" / f"{name}.json").read_text(encoding="utf-8"))["examples"]}
        features = {"input": text, "target": text}
    elif path == "google-research-datasets/tydiqa":
        assert name == "secondary_task"
        splits = {"train": [], "validation": []}
        for (split, folder), language in product((("train", "fewshot"), ("validation", "dev")), LANGUAGES):
            file = GENERAL / "tydiqa" / folder / f"{language}.json"
            for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
                for paragraph in article["paragraphs"]:
                    for qa in paragraph["qas"]:
                        answers = {k: [a[k] for a in qa["answers"]] for k in ("text", "answer_start")}
                        row = {"id": qa["id"], "title": article["title"], "context": paragraph["context"]}
                        splits[split].append({**row, "question": qa["question"], "answers": answers})
        features = dict.fromkeys(("id", "title", "context", "question"), text)
        features["answers"] = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
    elif (path, name) == ("aps/super_glue", "boolq"):
        splits = {s: lines(GENERAL / "boolq" / f) for s, f in (("train", "train.jsonl"), ("validation", "val.jsonl"))}
        splits = {s: [{**r, "label": int(r["label"])} for r in rows] for s, rows in splits.items()}
        features = {"question": text, "passage": text, "idx": datasets.Value("int32")}
        features["label"] = datasets.ClassLabel(names=["False", "True"])
    else:
        assert path == "baber/piqa"
        splits = {}
        for split, stem in (("train", "fewshot"), ("validation", "valid")):
            labels = (GENERAL / "piqa" / f"{stem}-labels.lst").read_text().split()
            rows = lines(GENERAL / "piqa" / f"{stem}.jsonl")
            splits[split] = [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]
        features = {"goal": text, "sol1": text, "sol2": text, "label": datasets.ClassLabel(names=["0", "1"])}
    columns = datasets.Features(features)
    return datasets.DatasetDict({k: datasets.Dataset.from_list(rows, columns) for k, rows in splits.items()})


OWN = {  # suite -> lm-eval's own name, shots of the paper, key of the score, whether lm-eval aggregates, tasks
    "general_mmlu": ("mmlu", 5, "acc,none", True, 57),
    "general_gsm8k": ("gsm8k_cot", 8, "exact_match,flexible-extract", False, 1),
    "general_bbh": ("bbh_cot_fewshot", 3, "exact_match,get-answer", True, 27),
    "general_tydiqa": ("tydiqa_goldp", 1, "f1,none", None, 9),
    "general_boolq": ("boolq", 0, "acc,none", False, 1),
    "general_piqa": ("piqa", 0, "acc,none", False, 1),
}


@needs_shared
@pytest.mark.parametrize("suite", OWN)
def test_suites_have_the_prompts_and_scores_of_lm_evals_own_tasks(suite, monkeypatch):
    """Compares all requests, samples and scores for the local copy with lm-eval's task on the hub's form of it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    name, shots, key, aggregated, number = OWN[suite]
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds
    monkeypatch.setenv("GENERAL_DATA", str(GENERAL))
    (group,) = load_suites([suite]).values()
    assert [task.config.num_fewshot for task in group.get_all_tasks()] == [shots] * number
    settings = {"limit": 2 if aggregated else 6, "bootstrap_iters": 0, "task_manager": task_manager()}
    ours = lm_eval.simple_evaluate(model=Fake(), tasks=[group], **settings)

    monkeypatch.delenv("GENERAL_DATA")
    monkeypatch.setattr(datasets, "load_dataset", rows_of_the_hub)
    tasks = Path(lm_eval.__file__).parent / "tasks"
    folder = {"general_mmlu": "mmlu/default", "general_bbh": "bbh/cot_fewshot", "general_boolq": "super_glue/boolq"}
    path = tasks / folder.get(suite, suite.removeprefix("general_"))
    settings["task_manager"] = TaskManager(include_path=path, include_defaults=False)
    if name not in ("gsm8k_cot", "bbh_cot_fewshot"):  # which have the paper's shots by themselves
        settings["num_fewshot"] = shots
    own = lm_eval.simple_evaluate(model=Fake(), tasks=[name], **settings)

    def compared(sample: dict) -> dict:
        return {k: v for k, v in sample.items() if k not in ("doc", "doc_hash")}

    assert {t.task_name for t in group.get_all_tasks()} == own["samples"].keys()
    for task, rows in own["samples"].items():
        assert list(map(compared, ours["samples"][task])) == list(map(compared, rows))
        assert ours["results"][task] == own["results"][task] and ours["versions"][task] == own["versions"][task]
    scores = [own["results"][task][key] for task in own["samples"]]
    expected = own["results"][name][key] if aggregated else sum(scores) / len(scores)
    assert ours["results"][suite][key] == pytest.approx(expected)
    assert 0 < expected < 1, "the test tells right from wrong"


def test_a_missing_or_damaged_suite_in_a_local_copy_is_an_error_that_names_it(local):
    with pytest.raises(data.DataError, match=r"GENERAL_DATA=.* has no folder piqa.*unset GENERAL_DATA"):
        load_suites(["general_piqa"])
    (local / "piqa").mkdir()
    with pytest.raises(data.DataError, match=r"fewshot\.jsonl is missing"):
        load_suites(["general_piqa"])
    for stem in ("fewshot", "valid"):
        write_lines(local / "piqa" / f"{stem}.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}])
        (local / "piqa" / f"{stem}-labels.lst").write_text("0\n1\n")
    with pytest.raises(data.DataError, match=r"1 rows, but fewshot-labels\.lst has 2 labels"):
        load_suites(["general_piqa"])
    (local / "boolq" / "val.jsonl").write_text("{")
    with pytest.raises(data.DataError, match=r"val\.jsonl is not JSON"):
        load_suites(["general_boolq"])


def test_a_malformed_csv_row_is_an_error_with_its_number(local):
    file = local / "mmlu" / "dev" / "abstract_algebra_dev.csv"
    file.parent.mkdir(parents=True)
    file.write_text('"one\nline",a,b,c,d,A\nq,a,b,c,d,E\n')
    with pytest.raises(data.DataError, match=r"abstract_algebra_dev\.csv, row 1: .*'E'"):
        load_suites(["general_mmlu"])


def test_the_csv_of_mmlu_gives_the_rows_of_the_hub(tmp_path):
    for split, letter in (("dev", "C"), ("test", "A")):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"virology_{split}.csv").write_text(f'"{split},\n1?",a,b,"c, d",e,{letter}\n')
    rows = {split: list(found) for split, found in general._mmlu(tmp_path, "virology").items()}
    same = {"subject": "virology", "choices": ["a", "b", "c, d", "e"]}
    assert rows == {
        "dev": [{"question": "dev,\n1?", "answer": 2, **same}],
        "test": [{"question": "test,\n1?", "answer": 0, **same}],
    }


def test_without_local_copy_and_hub_the_error_names_both_ways_out(monkeypatch):
    monkeypatch.delenv("GENERAL_DATA", raising=False)

    def offline(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        data.DataError, match=r"piqa: baber/piqa cannot.*HF_HUB_OFFLINE.*GENERAL_DATA=FOLDER with piqa/"
    ):
        load_suites(["general_piqa"])


def test_ifeval_without_its_packages_or_data_says_what_to_install(monkeypatch):
    for name in [m for m in sys.modules if m.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "immutabledict", None)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(data.DataError, match=r"general_ifeval.*lm-eval\[ifeval\]"):
        load_suites(["general_ifeval"])
    # With the packages, and without the data of nltk's that lm-eval misses when it scores.
    monkeypatch.setitem(sys.modules, "immutabledict", SimpleNamespace(immutabledict=dict))
    monkeypatch.setitem(sys.modules, "langdetect", SimpleNamespace())
    rows = {"train": datasets.Dataset.from_list([{"prompt": "Say three sentences.", "key": 0}])}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr("nltk.download", lambda *_: False)
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(data.DataError, match=r"general_ifeval .*punkt_tab.*nltk\.downloader"):
        load_suites(["general_ifeval"])


# ------------------------------------------------------------------------------------------ prompts for the judges


def test_demo_data_has_prompts_for_every_judged_set(monkeypatch):
    monkeypatch.setenv("TRACE_DATA", "demo")
    for name, task in load_tasks(list(data.JUDGED)).items():
        assert len(task.test_docs()) >= 2 and task.config.generation_kwargs["max_gen_toks"] == 512
        doc = task.test_docs()[0]
        assert task.fewshot_context(doc, 0) == doc["prompt"] and task.doc_to_target(doc) == "", name
        assert task.process_results(doc, ["a b"]) == {"characters": 3.0, "empty": 0.0}
        assert task.process_results(doc, [" \n"]) == {"characters": 2.0, "empty": 1.0}


@pytest.mark.skipif(not (SHARED / "data" / "instruct").is_dir(), reason="needs ../shared/data, the official sets")
def test_the_official_judged_sets_are_read_completely(monkeypatch):
    for kind in ("instruct", "safety"):
        monkeypatch.setenv(f"{kind.upper()}_DATA", str(SHARED / "data" / kind))
    sizes = [len(t.test_docs()) for t in load_tasks(list(data.JUDGED)).values()]
    assert sizes == [175, 300, 180, 50, 125, 178, 40, 100, 100]


def test_judged_sets_without_a_folder_are_an_error_that_names_the_variable(monkeypatch, tmp_path):
    for name in ("INSTRUCT_DATA", "TRACE_DATA"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(data.DataError, match=r"INSTRUCT_DATA is not set.*LIMA/test\.json.*INSTRUCT_DATA=demo"):
        data.source_fingerprint("instruct_lima")
    monkeypatch.setenv("INSTRUCT_DATA", str(tmp_path))
    with pytest.raises(data.DataError, match=r"LIMA/test\.json is missing"):
        data.source_fingerprint("instruct_lima")


# ------------------------------------------------------------------------------------------------- configurations


def test_groups_of_suites_and_judged_sets_are_expanded_and_unknown_names_refused(tmp_path):
    config = CLConfig(
        output_dir=str(tmp_path), general=["general", "general_ifeval"], judged=["safety", "instruct_lima"]
    )
    assert config.general == list(data.SUITES) and config.judged == [*data.GROUPS["safety"], "instruct_lima"]
    for wrong, message in (
        ({"general": ["mmlu"]}, r"general=\['mmlu'\]: Unknown name mmlu: use general_mmlu.*a group \(general\)"),
        ({"judged": ["general"]}, r"Unknown name general:.*a group \(instruct, safety\)"),
        ({"general_stages": "first"}, r"general_stages='first'.*last or all"),
    ):
        with pytest.raises(ConfigError, match=message):
            CLConfig(output_dir=str(tmp_path), **wrong)


def test_a_manifest_has_settings_of_suites_only_if_they_are_set(tmp_path):
    plain = CLConfig(output_dir=str(tmp_path)).manifest()
    assert not [k for k in plain if k.startswith(("general", "judged"))], "runs from before resume"
    some = CLConfig(output_dir=str(tmp_path), general=["general_piqa"], general_rows=5).manifest()
    assert {k: v for k, v in some.items() if k not in plain} == {"general": ["general_piqa"], "general_rows": 5}


def test_missing_data_of_suites_is_an_error_before_training(options, local):
    with pytest.raises(data.DataError, match="has no folder bbh"):
        train(options | {"general": ["general_bbh"]})
    assert not Path(options["output_dir"]).exists()


# ------------------------------------------------------------------------------------------------------ evaluation

SUITES = ["general_gsm8k", "general_boolq"]
SETS = ["instruct_lima", "safety_cona"]
BESIDES = {"general": SUITES, "general_rows": 2, "judged": SETS, "judged_rows": 2, "judged_max_new_tokens": 8}


def there(run: Run) -> list[list[str]]:
    return [[n for n in (*SETS, *SUITES) if s.eval_file(n).exists()] for s in run.stages]


def test_suites_and_judged_sets_are_measured_at_stage_0_and_the_last(run, local, monkeypatch):
    assert evaluate.evaluate(run, extra=BESIDES) == 5 + 2 * 4
    assert there(run) == [[*SETS, *SUITES], [], [*SETS, *SUITES]]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "open_engine", lambda *a, **k: pytest.fail("the engine was started"))
        assert evaluate.evaluate(run, extra=BESIDES) == 0

    stage = run.stages[2]
    matrix = read_json(stage.eval_file("trace_fomc"))["settings"]
    assert matrix["chat_template"] is False and matrix["max_prompt_length"] == 96, "the matrix keeps its own settings"
    cell = read_json(stage.eval_file("instruct_lima"))
    samples = lines(stage.samples_file("instruct_lima"))
    assert cell["settings"]["chat_template"] is True and cell["n"] == len(samples) == 2
    assert all(s["given"] == f"<s>user\n{s['prompt']}</s>\n<s>assistant\n" for s in samples)
    assert all(set(s) >= {"doc_id", "prompt", "target", "response"} and len(s["response"]) <= 8 for s in samples)

    cell = read_json(stage.eval_file("general_boolq"))
    samples = lines(stage.samples_file("general_boolq"))
    docs = lines(local / "boolq" / "val.jsonl")
    assert cell["headline"] == "acc" and cell["n"] == 2 and cell["n_cut"] == 0
    assert cell["metrics"]["acc"]["value"] == sum(s["acc"] for s in samples) / 2
    assert cell["subtasks"]["boolq"]["metrics"]["acc"] == cell["metrics"]["acc"]
    for sample, doc in zip(samples, docs, strict=False):
        assert sample["prompt"] == f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
        assert sample["choices"] == [" no", " yes"] and sample["target"] == doc["label"]
        assert sample["acc"] == float(sample["response"] == sample["target"])

    cell = read_json(stage.eval_file("general_gsm8k"))
    samples = lines(stage.samples_file("general_gsm8k"))
    assert list(cell["metrics"]) == ["exact_match,flexible-extract", "exact_match,strict-match"]
    assert cell["headline"] == "exact_match,flexible-extract" and cell["n"] == len(samples) == 2
    assert all(s["prompt"].count("\nA:") == 9 for s in samples), "8 shots"
    assert cell["n_cut"] == 2, "no limit of the matrix, but the context of the model: 1024 bytes"

    assert "; general ability " in write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "gsm8k at 0_base 2 of 2" in text
    assert "## Answers for the judges" in text and "| instruct_lima<br>2 prompts | safety_cona<br>2 prompts |" in text


def test_an_interrupted_evaluation_loses_at_most_one_suite(run, local, monkeypatch, capsys):
    calls = []
    besides = BESIDES | {"general": ["general_boolq"], "general_rows": 1, "judged_rows": 1}

    def interrupted(lm, tasks, **kwargs):
        calls.append([getattr(t, "name", None) or t.task_name for t in tasks])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_tasks(lm, tasks, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells, "run_tasks", interrupted)
        patch.setattr(suites, "run_tasks", interrupted)
        evaluate.evaluate(run, stages=[0], extra=besides)
    assert calls == [run.tasks, SETS, ["general_boolq"]]
    assert there(run)[0] == SETS
    assert evaluate.evaluate(run, stages=[0], extra=besides) == 1 and there(run)[0] == [*SETS, "general_boolq"]
    read = re.search(r"engine work .*: ([\d,]+) tokens read, 0 written", capsys.readouterr().out)
    assert read is not None and int(read[1].replace(",", "")) > 0, "choices that are read count as the engine's work"


def test_the_command_line_can_add_suites_to_a_run(run, local, capsys):
    assert evaluate.evaluate(run) == 5
    command = ["evaluate", str(run.path), "--general", "general_boolq", "--judged", "safety_cona", "--judged-rows", "1"]
    cli.main([*command, "--judged-max-new-tokens", "4", "--general-stages", "all"])
    assert "evaluated 6 cells of 3 stages" in capsys.readouterr().out
    assert there(run) == [["safety_cona", "general_boolq"]] * 3
    with pytest.raises(SystemExit) as e:
        cli.main(["evaluate", str(run.path), "--stages", "1", "--general", "general_boolq", "--general-rows", "1"])
    assert "general_rows: None -> 1" in str(e.value.code) and "eval/general_boolq.json" in str(e.value.code)
    # Different rows with the same name count as different settings.
    write_lines(local / "boolq" / "train.jsonl", [{"question": "q", "passage": "p", "label": True}])
    with pytest.raises(RunError, match=r"data: '\w{16}' -> "):
        evaluate.evaluate(run, extra={"general": ["general_boolq"], "general_stages": "all"})
    with pytest.raises(data.DataError, match="Unknown name general_nothing"):
        evaluate.evaluate(run, extra={"general": ["general_nothing"]})


@pytest.fixture
def alone(trained, options, local, tmp_path):
    """Measures checkpoints without a matrix: the stages of a run, without the run's data."""
    run = Run.open(trained)
    command = ["evaluate", str(tmp_path / "theirs")]
    new = ["--model", options["model_name_or_path"], "--tasks", "none", "--backend", "hf", "--judged-rows", "1"]
    new += ["--general", "general_boolq", "--judged", "safety_cona", "--judged-max-new-tokens", "4"]

    def checkpoint(name: str, stage: int) -> list[str]:
        return ["--checkpoint", f"{name}={run.stages[stage].checkpoint}"]

    return command, new, checkpoint


def test_external_checkpoints_can_be_measured_on_suites_only(alone, tmp_path, capsys):
    command, new, checkpoint = alone
    cli.main([*command, *new, *checkpoint("v1", 1)])
    assert "evaluated 4 cells of 2 stages" in capsys.readouterr().out
    cli.main([*command, *checkpoint("v2", 2)])  # what it is measured on is the run's own
    assert "evaluated 2 cells of 1 stages" in capsys.readouterr().out
    cli.main([*command, *checkpoint("v2", 2)])
    run = Run.open(tmp_path / "theirs")
    assert [s.name for s in run.stages] == ["0_base", "1_v1", "2_v2"] and run.tasks == []
    assert there(run) == [["safety_cona", "general_boolq"]] * 3, "those in between as well"

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # means of nothing
        cli.main(["report", str(run.path)])
        assert "report.md: 6 cells; general ability " in capsys.readouterr().out
        cli.main(["report", str(run.path), "--output", str(tmp_path / "runs.md")])
    compared = (tmp_path / "runs.md").read_text(encoding="utf-8")
    assert re.search(r"\| theirs \| external \| none \|", compared)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "| 2_v2 | " in text.split("## General ability")[1] and "## Answers for the judges" in text
    assert "## Scores" not in text and "## Changes" not in text and "task versions" not in text
    assert "<h2>General ability</h2>" in (run.path / "report.html").read_text(encoding="utf-8")
    cli.main(["status", str(run.path)])
    assert "2_v2    trained elsewhere; 1 general suites; judged 0 of 1 sets" in capsys.readouterr().out


def test_a_failed_command_for_suites_leaves_no_run(alone, tmp_path):
    command, new, checkpoint = alone
    nothing = new[: new.index("--judged-rows")]
    for options, message in (
        (nothing, "--tasks none leaves nothing to measure"),
        ([*nothing, "--general", "general_nothing"], "Unknown name general_nothing"),
        ([*new, "--general", "general_gsm8k,general_piqa"], "piqa"),  # not in the local copy
        ([*new, "--test-rows", "3", "--chat-template"], "--test-rows, --chat-template: only for tasks, and --tasks"),
        ([*nothing, "--distance", "--chat-template-args", '{"a": 1}'], "the chat template has no variable a"),
        (
            [*nothing, "--general", "general_boolq", "--chat-template-args", '{"a": 1}'],
            "chat_template_args has no effect",
        ),
        ([*new, "--engine-args", '{"hf_token": "hf_' + 34 * "x" + '"}'], "hf_token"),
    ):
        with pytest.raises(SystemExit) as e:
            cli.main([*command, *options, *checkpoint("v1", 1)])
        assert message in str(e.value.code) and not (tmp_path / "theirs").exists()


def test_an_attempt_without_results_does_not_fix_the_settings(alone, tmp_path):
    command, new, checkpoint = alone
    wrong = ["--engine-args", '{"max_lenght": 512}']
    with pytest.raises(SystemExit) as e:
        cli.main([*command, *new, *wrong, "--general-rows", "2", *checkpoint("v1", 1)])
    assert "max_lenght" in str(e.value.code)
    right = ["--engine-args", '{"max_length": 1024}']
    cli.main([*command, *new, *right, *checkpoint("v1", 1)])
    run = Run.open(tmp_path / "theirs")
    assert (
        run.manifest["config"]["engine_args"] == {"max_length": 1024} and "general_rows" not in run.manifest["config"]
    )
    assert there(run) == [["safety_cona", "general_boolq"]] * 2
    cli.main([*command, *checkpoint("v2", 2)])
    assert there(Run.open(run.path)) == [["safety_cona", "general_boolq"]] * 3, "with the engine arguments of the run"


def test_a_suite_with_answers_longer_than_the_context_is_refused_before_anything_runs(run, local, monkeypatch):
    monkeypatch.setattr(suites, "run_tasks", lambda *a, **k: pytest.fail("something ran"))
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"gsm8k generates up to \d+.*context has 101"):
        patch.setattr(engine, "open_engine", lambda *a, **k: SimpleNamespace(max_length=101))
        evaluate.evaluate(run, extra={"general": SUITES})  # the model's own, known when the engine is open
    monkeypatch.setattr(engine, "open_engine", lambda *a, **k: pytest.fail("the engine was started"))
    with pytest.raises(RunError, match=r"context has 102"):
        evaluate.evaluate(run, extra={"general": SUITES}, engine_args={"max_length": 102})


@pytest.mark.slow
@pytest.mark.timeout(900)
@both_tokenizers
def test_vllm_gives_the_scores_of_transformers(options, local, tmp_path):
    """Compares answers to the tasks, likelihoods, and answers of full length."""
    besides = {"general": SUITES, "judged": SETS, "judged_max_new_tokens": 8}
    runs = {}
    for backend, context in (("hf", "max_length"), ("vllm", "max_model_len")):
        engine_args = json.dumps({context: 1024, "dtype": "float32"})
        output = {"output_dir": str(tmp_path / backend), "engine_args": engine_args}
        runs[backend] = train({**options, **besides, **output, "backend": backend})
        run_module("trace_bench", "evaluate", runs[backend].path)
    answers: list[tuple[str, str]] = []
    for stages in zip(*(run.stages for run in runs.values()), strict=True):
        index = stages[0].index
        seen = runs["hf"].tasks[: index or 2]
        for name in (*seen, *([] if index == 1 else [*SETS, *SUITES])):
            (a, b), both = (read_json(s.eval_file(name)) for s in stages), [lines(s.samples_file(name)) for s in stages]
            assert a["n"] == b["n"] and a["metrics"].keys() == b["metrics"].keys() and a.get("n_cut") == b.get("n_cut")
            for x, y in zip(*both, strict=True):
                answers += [(x["response"], y["response"])] if name in seen else []
                assert x.get("loglikelihoods", []) == pytest.approx(y.get("loglikelihoods", []), abs=1e-2)
    # The engines sum in different orders, so a tie between two tokens may be decided either way.
    assert len(answers) == 5 * 6 and sum(x == y for x, y in answers) >= 0.95 * 5 * 6


# ---------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def measured(make) -> Run:
    """A run of two stages whose suites have known scores; the last stage lacks nothing, stage 1 a suite."""
    run = make(np.full((3, 2), np.nan), tasks=["trace_fomc", "trace_cstance"])
    scores = [{"mmlu": 0.5, "piqa": 0.7, "ifeval": 0.2}, {"mmlu": 0.4}, {"mmlu": 0.3, "piqa": 0.8, "ifeval": 0}]
    for stage, of_stage in zip(run.stages, scores, strict=True):
        for suite, value in of_stage.items():
            name, settings = f"general_{suite}", {"general_rows": 10, "data": "hub" if suite == "ifeval" else "f00"}
            metrics = {"acc": {"value": value, "stderr": None}}
            own = {"headline": "acc", "metrics": metrics, "n": 20, "n_cut": 0, "settings": settings, "version": "1.0"}
            write_json(stage.eval_file(name), {**cell(stage, name, value), **own})
    return run


def test_the_report_has_the_suites_with_their_mean_and_delta(measured):
    assert write_report(measured).endswith("; general ability -5.0")  # ((30 - 50) + (80 - 70)) / 2
    text = (measured.path / "report.md").read_text(encoding="utf-8")
    section = text.split("## General ability\n", 1)[1].split("\n## ", 1)[0]
    for line in (
        "| stage | mmlu<br>acc<br>20 rows | piqa<br>acc<br>20 rows | mean | delta | ifeval<br>acc<br>20 rows |",
        "| 0_base | 50.0 | 70.0 | 60.0 | – | 20.0 |",
        "| 1_trace_fomc | 40.0 | – | – | – | – |",  # no mean over other suites
        "| 2_trace_cstance | 30.0 | 80.0 | 55.0 | -5.0 | 0.0 |",
        "**Limited rows** (at least 10 of each suite, the first ones of each subtask)",
        "**Local copy** of the data of mmlu, piqa:",
    ):
        assert line in section
    assert Results(measured).general[2].value == pytest.approx(-0.05)
