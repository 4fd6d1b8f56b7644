"""The likelihood of reference answers equals minus the training loss, and adding it generates and loses nothing."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import generate
from conftest import both_tokenizers, train
from forks import forked
from made_runs import TASKS, write_cell
from safetensors.torch import load_file, save_file
from scipy.special import stdtrit

from trace_bench import cli, engine, evaluate, report
from trace_bench.evaluate import likelihood
from trace_bench.measures.likelihood import rows_needed, share_of_gain
from trace_bench.report.likelihood import soft_bwt
from trace_bench.report.sections import sections
from trace_bench.run import Run, RunError, read_json, read_jsonl
from trace_bench.tasks import load_tasks, training_rows
from trace_tasks.data.files import write_json, write_jsonl
from trainers.base import CLTrainer

NAME = "log_likelihood"


@both_tokenizers
@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_the_likelihood_is_minus_the_training_loss_of_the_row(chat, tiny_model, options, demo_data, monkeypatch):
    """The adapter is unmerged, prompts and answers are cut, and training has single rows instead of batches."""
    losses, tokens = {}, {}

    class Measured(CLTrainer):
        def end_stage(self):
            model = self.model.eval()
            for task in self.run.tasks if self.stage.index == 2 else ():
                loaded = load_tasks([task])[task]
                loaded.training_docs = loaded.test_docs  # the same rows as if they were training rows
                rows = self.text_dataset(training_rows(loaded, 6, self.chat))
                losses[task] = [self.compute_loss(model, batch).item() for batch in self.batches(rows, 1)]
                tokens[task] = [sum(label != -100 for label in labels) for labels in rows["labels"]]

    tasks = ["trace_scienceqa", "trace_numglue_ds"]
    run = train({**options, "tasks": tasks, "max_answer_length": 8, "bf16": False, "chat_template": chat}, Measured)
    evaluate.evaluate(run, stages=[2], engine_args={"dtype": "float32", "batch_size": 4})
    assert max(tokens["trace_scienceqa"]) == 8 > min(tokens["trace_numglue_ds"]), "cut, and with EOS"
    for task in tasks:
        cell, rows = read_json(run.stages[2].eval_file(task)), read_jsonl(run.stages[2].samples_file(task))
        assert [row["target_tokens"] for row in rows] == tokens[task]
        assert [-row[NAME] for row in rows] == pytest.approx(losses[task], rel=1e-5)
        assert cell["metrics"][NAME]["value"] == pytest.approx(-sum(losses[task]) / 6, rel=1e-5)
        assert cell["headline"] != NAME and list(cell["metrics"])[-1] == NAME and cell["metrics"][NAME]["stderr"] > 0


def test_older_cells_get_likelihoods_without_generating(run, monkeypatch, capsys):
    whole = Run.open(run.path)
    assert evaluate.evaluate(run, likelihood=False) == 5
    before = {file: read_json(file) for file in run.path.rglob("eval/*.json")}
    answers = {file: read_jsonl(file) for file in run.path.rglob("samples/*.jsonl")}
    assert not any(NAME in cell["metrics"] for cell in before.values())
    assert evaluate.evaluate(run) == 0, "they are not made again"
    monkeypatch.setattr(engine.SwapLM, "generate_until", lambda *a: pytest.fail("it generated"))
    assert cli.main(["evaluate", str(run.path), "--likelihood", "--stages", "0,2"]) in (0, None)
    assert "0 written" in capsys.readouterr().out
    assert evaluate.evaluate(run, likelihood=True) == 1, "stage 1 is left"
    assert evaluate.evaluate(run, likelihood=True) == 0
    for file, cell in before.items():
        now = read_json(file)
        added = now["metrics"].pop(NAME)
        assert now["metrics"] == cell["metrics"] and now["headline"] == cell["headline"] and added["value"] < 0
        assert now["likelihood"]["served"] == now["served"]
    for file, rows in answers.items():
        assert [{k: v for k, v in row.items() if k not in (NAME, "target_tokens")} for row in read_jsonl(file)] == rows
    filled = report.Results(whole)
    assert {metric for _, _, metric in filled.intervals} >= {NAME}, "the scores are the means of the rows"
    # A run that had it from the beginning has the same.
    for file in before:
        file.unlink()
    monkeypatch.undo()

    def slow(*args):
        scores, rows = likelihood.with_likelihood(*args)
        scores["likelihood"]["seconds"] = 1000.0
        return scores, rows

    monkeypatch.setattr("trace_bench.evaluate.cells.with_likelihood", slow)
    evaluate.evaluate(run)
    assert report.Results(run).matrix(NAME) == pytest.approx(filled.matrix(NAME), nan_ok=True)
    assert all(read_json(file)["seconds"] > 1000 for file in before), "the seconds of a cell include them"


def test_a_kill_while_adding_likelihoods_to_a_cell_loses_nothing(run, monkeypatch):
    evaluate.evaluate(run, stages=[1], likelihood=False)
    (task,) = (t for t in run.tasks if run.stages[1].eval_file(t).exists())
    expected = report.Results(run).R
    writes = []
    for last in range(3):  # killed before each of its writes
        for name in ("write_json", "write_jsonl"):
            original = getattr(likelihood, name)

            def killed(path, value, original=original, last=last):
                if len(writes) == last:
                    raise KeyboardInterrupt
                writes.append(path)
                original(path, value)

            monkeypatch.setattr(likelihood, name, killed)
        writes.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(run, stages=[1], likelihood=True)
        monkeypatch.undo()
        results = report.Results(run)
        assert (results.R[1] == expected[1])[0] and results.rows[task].scores["accuracy"].shape[0] == 6
        assert NAME not in results.cells[1, task]["metrics"]
    assert evaluate.evaluate(run, stages=[1], likelihood=True) == 1
    assert not math.isnan(report.Results(run).matrix(NAME)[1, 0])


def test_likelihoods_are_refused_for_samples_with_different_prompts(run):
    evaluate.evaluate(run, stages=[1], likelihood=False)
    stage, task = run.stages[1], run.tasks[0]
    rows = read_jsonl(stage.samples_file(task))
    write_jsonl(stage.samples_file(task), [{**rows[0], "prompt": "another"}, *rows[1:]])
    with pytest.raises(RunError, match="fingerprint differs"):
        evaluate.evaluate(run, stages=[1], likelihood=True)
    write_json(stage.eval_file(task), {**read_json(stage.eval_file(task)), "samples": None})
    with pytest.raises(RunError, match="row 0 has a different prompt"):
        evaluate.evaluate(run, stages=[1], likelihood=True)


def test_likelihoods_of_rows_longer_than_the_context_are_missing(tiny_model):
    lm = engine.open_engine("hf", str(tiny_model), engine_args={"max_length": 12})
    (fits, n), (not_, m) = lm.log_likelihoods(["eight by", "eight by"], ["tes", "tes,"])
    assert (n, m) == (4, 5) and fits < 0 and math.isnan(not_)
    assert lm.log_likelihoods(["eight by"], ["tes,"], 4)[0][1] == 4, "unless it is cut"


# -------------------------------------------------------------------------------------------------- measures and report


def test_the_kept_share_of_the_gain_equals_values_worked_by_hand():
    nan = math.nan
    L = [[-4.0, -3.0, -2.0], [-1.0, nan, nan], [-2.5, -3.5, nan], [-5.5, -3.0, -1.0]]
    # (-5.5 + 1) / (-1 + 4); the second task's own stage made it worse; that of the third is the last.
    assert share_of_gain(L) == pytest.approx([-1.5, nan, 0], nan_ok=True)
    assert share_of_gain(L, 2) == pytest.approx([-0.5, nan, nan], nan_ok=True)
    full = [[-4.0, -3.0], [-1.0, -2.5], [-2.0, -1.0]]  # also measured before their own stages
    assert share_of_gain(full, 1) == pytest.approx([0, nan], nan_ok=True)


def test_the_needed_rows_equal_values_by_hand_and_simulation():
    # Mean -1, variance 8/3: (1.96 + 0.8416)^2 * 8/3 + 1.96^2 / 2 = 20.93 + 1.92.
    assert rows_needed([[-3.0, 1.0, -1.0, -1.0]]) == 23
    assert rows_needed([[-3.0, 1.0, -1.0, -1.0]] * 4) == 6, "of the mean of four: 20.93 / 4 + 1.92 / 4"
    assert rows_needed([[-2.0, -2.0, -2.0]]) == 2 and rows_needed([[-1.0, 1.0]]) is rows_needed([[-1.0]]) is None
    rng, rows = np.random.default_rng(0), np.array([-1.0] * 3 + [0.0] * 16 + [1.0])
    n = rows_needed([rows])
    drawn = rng.choice(rows, (20_000, n))
    t = drawn.mean(axis=1) / (drawn.std(axis=1, ddof=1) / n**0.5)
    assert 0.75 < (abs(t) > stdtrit(n - 1, 0.975)).mean() < 0.85


def test_the_report_has_the_matrix_of_likelihoods_and_the_rows_needed_to_see_a_loss(make):
    n, rng = 40, np.random.default_rng(1)
    noise = 0.1 * rng.standard_normal(n)
    run = make(np.full((4, 3), math.nan))
    text = "\n".join(map(str, sections(report.Results(run))["likelihood"]))
    assert text == "", "a run without it has no section"
    means = {0: [-3.0, -3.0, -3.0], 1: [-1.0], 2: [-1.5, -2.0], 3: [-2.0, -1.0, -0.0003]}
    for stage in run.stages:
        for i, mean in enumerate(means[stage.index]):
            right = np.ones(n) if stage.index == i + 1 else (np.arange(n) % 10 < 9).astype(float)
            columns = {"accuracy": right, NAME: mean + noise * (stage.index + 1) * (mean < -0.5)}
            write_cell(stage, TASKS[i], columns, scale={"accuracy": 1, NAME: None}, likelihood={"seconds": 0.5})
    results = report.Results(run)
    bwt = soft_bwt(results, 3)
    mean = noise.mean()
    assert bwt.value == pytest.approx(((-2 + 4 * mean) - (-1 + 2 * mean) + (-1 + 4 * mean) - (-2 + 3 * mean)) / 2)
    assert bwt.low < bwt.value < bwt.high and bwt.high - bwt.low < 0.2
    _, matrix, _, _, forgotten, cost = sections(results)["likelihood"]
    assert matrix.rows[1][1:] == [f"{-1 + 2 * mean:#.3g}", "–", "–"]
    assert matrix.rows[3][3] == "0.000", 'and not "-0.000"'
    first, second, together = forgotten.rows
    assert first[0] == "C-STANCE" and first[-4].startswith("-5") and first[-3:] == ["3", "75", "25.0"]
    assert second[-3:] == ["–", "75", "–"] and together[0] == "mean", "the second was not forgotten"
    assert cost == "Reading the likelihoods took 4 of the 14 seconds of the evaluation."
    # Beside a run that was evaluated without them there is no difference, but the comparison is there.
    other = make(np.full((4, 3), math.nan), name="other")
    for stage in other.stages:
        for i, task in enumerate(TASKS[: max(stage.index, 3 * (stage.index == 0))]):
            write_cell(stage, task, {"accuracy": np.full(n, 0.5 + 0.1 * i)}, scale={"accuracy": 1})
    for runs in ([run, other], [other, run]):
        versus = report.compare(runs).versus[runs[1].path.name]
        assert math.isnan(versus["soft BWT"].value) and not math.isnan(versus["BWT"].value)
    report.write_report(run)
    assert NAME in (run.path / "scores.csv").read_text()
    assert "Likelihood of the reference" in (run.path / "report.html").read_text()


# ---------------------------------------------------------------------------------------------------------------- vllm


def read_by_vllm(base: Path, adapter: Path, broken: Path, args: dict, prompts: list[str], answers: list[str]) -> tuple:
    engine_args = {"dtype": "float32", **args}
    lm = engine.open_engine("vllm", str(base), engine_args=engine_args, checkpoints=[adapter, broken])
    found = [lm.log_likelihoods(prompts, answers, 12)]
    generate(lm, [p for p in prompts if len(p) < 300] + [prompts[1]], 1)
    found.append(lm.log_likelihoods(prompts, answers, 12))  # now from the cache
    lm.load(adapter)
    found += [lm.log_likelihoods(prompts, answers, 12), lm.log_likelihoods(prompts[::-1], answers[::-1], 12)[::-1]]
    # What the generated answers tell of references: all, up to another last token, the first token, all but the last.
    wants = [lm.want(ids, 6, (), {}) for ids in lm._prompt_ids(["12 + 3 is", "Say it:", "Yes", "No"], None)]
    given = [tuple(ids) for ids in lm._answers(wants)]
    references = [given[0], (*given[1][:2], given[1][2] ^ 1), (given[2][0] ^ 1, *given[2][1:3]), (*given[3], 5)]
    lm._known.clear()
    asked = [replace(want, reference=ids) for want, ids in zip(wants, references, strict=True)]
    assert [tuple(ids) for ids in lm._answers(asked)] == given
    examples = [(want.ids, reference) for want, reference in zip(wants, references, strict=True)]
    told = [len(lm._told[lm.adapter, example]) for example in examples]
    with_told = lm.likelihoods_of(examples)
    lm._told.clear()
    lm.check_numbers("a stage")
    with pytest.raises(engine.EngineError, match="a broken stage gives NaN"):
        lm.load(broken)
        lm.check_numbers("a broken stage")
    lm.load(adapter)
    return found, lm.served["weights"], told, with_told, lm.likelihoods_of(examples)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("args", [{}, {"enable_lora": True}], ids=["merged", "unmerged"])
def test_vllm_gives_the_likelihoods_of_transformers(args, tiny_model, checkpoints, tmp_path):
    long = "A long question that is asked. " * 10
    # A token of the tiny model is a byte. Of the fourth the cache has the whole prompt: it ends with a block.
    prompts = ["12 + 3 is", long, "Say it:", long[:256], long]
    answers = [" 15", "A", "more words than twelve", "yes", "B"]
    lm = engine.open_engine("hf", str(tiny_model), engine_args={"dtype": "float32"})
    expected = 2 * [lm.log_likelihoods(prompts, answers, 12)]
    lm.load(checkpoints["adapter"])
    expected += 2 * [lm.log_likelihoods(prompts, answers, 12)]
    args = {**args, "max_model_len": len(long) + 2}  # the longest rows take the whole context
    adapter, broken = checkpoints["adapter"], tmp_path / "broken"
    shutil.copytree(adapter, broken)
    file = broken / "adapter_model.safetensors"
    save_file({name: weights * torch.nan for name, weights in load_file(file).items()}, file, {"format": "pt"})
    found, served, told, with_told, read = forked(read_by_vllm, tiny_model, adapter, broken, args, prompts, answers)
    assert told == [6, 3, 1, 6]
    assert with_told == pytest.approx(read, rel=1e-3)
    assert served == ("adapter" if "enable_lora" in args else "merged adapter")
    for each, wanted in zip(found, expected, strict=True):
        assert [n for _, n in each] == [n for _, n in wanted]
        assert [x for x, _ in each] == pytest.approx([x for x, _ in wanted], rel=1e-3)
