"""The engine has to give training rows the log-likelihoods that they had at the end of the training."""

import pytest
import torch
from conftest import train
from method_runs import method
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trace_bench import evaluate
from trace_bench.engine import EngineError, hf
from trace_bench.run import AS_TRAINED, read_json, read_jsonl
from trace_tasks.data.files import write_jsonl
from trainers.base import CLTrainer


@pytest.fixture
def exact(options) -> dict:
    """Options of a run of one stage in float32, whose answers change much."""
    return {**options, "tasks": ["trace_fomc"], "bf16": False, "lora_dropout": 0.5, "max_steps": 8}


def test_training_measures_rows_of_all_lengths_with_the_weights_that_it_saves(exact, tiny_model):
    lengths = []

    class Looks(CLTrainer):
        def end_stage(self):
            lengths.extend(len(ids) for ids in self.train_dataset["input_ids"])

    (stage,) = train(exact, Looks).stages[1:]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, stage.checkpoint).eval()
    rows = read_jsonl(stage.path / AS_TRAINED)
    assert [len(row["ids"]) for row in rows] == sorted(len(row["ids"]) for row in rows)
    assert (len(rows), len(rows[0]["ids"]), len(rows[-1]["ids"])) == (8, min(lengths), max(lengths))
    for row in rows:
        ids = torch.tensor(row["ids"])
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        before, answer = row["parts"]["before"], row["parts"]["answer"]
        assert before["start"] + 32 == before["stop"] == answer["start"] and answer["stop"] == len(ids)
        for part in (before, answer):
            expected = logprobs[part["start"] - 1 : part["stop"] - 1].sum().item()
            assert part["nats"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["sequential", "full", "inclora", "milora", "nlora", "osf", "pp"])
def test_the_difference_from_training_is_on_record(name, exact):
    """Also for checkpoints that have a form of their own."""
    run = train({**exact, "use_peft": name not in ("full", "osf")}, *method(name.replace("full", "sequential")))
    evaluate.evaluate(run, engine_args={"dtype": "float32"})
    base, trained = (read_json(stage.eval_file("trace_fomc")) for stage in run.stages)
    assert trained["from_training"] < 1e-4
    if name in ("sequential", "full"):
        assert base["from_training"] < 1e-4
    else:
        assert "from_training" not in base, "what the method begins with need not be the base model"


def test_older_runs_have_nothing_to_compare(exact):
    run = train(exact)
    for stage in run.stages:
        (stage.path / AS_TRAINED).unlink()
    assert evaluate.evaluate(run) == 2
    assert not any("from_training" in read_json(stage.eval_file("trace_fomc")) for stage in run.stages)


def test_an_engine_that_computes_another_model_than_the_trained_one_is_refused(exact, monkeypatch):
    run = train(exact)
    stage = run.stages[1]
    with monkeypatch.context() as broken:
        broken.setattr(hf.SwapHF, "load", lambda *args: None)  # the base model stays
        with pytest.raises(EngineError, match=r"1_trace_fomc: the engine does not compute the model that training"):
            evaluate.evaluate(run)
    assert not stage.eval_file("trace_fomc").exists()
    rows = read_jsonl(stage.path / AS_TRAINED)
    for row in rows:  # the answers alone differ: a mean over all tokens would hide it
        answer = row["parts"]["answer"]
        answer["nats"] -= 0.2 * (answer["stop"] - answer["start"])
    write_jsonl(stage.path / AS_TRAINED, rows)
    with pytest.raises(EngineError, match=r"differ by 0\.20 nats per token"):
        evaluate.evaluate(run)


def test_rows_beyond_the_context_of_the_engine_and_methods_with_their_own_checkpoints_are_left_out(exact):
    run = train(exact)
    rows = read_jsonl(run.stages[1].path / AS_TRAINED)
    long = {"ids": [5] * 2000, "parts": {"answer": {"start": 1, "stop": 2000, "nats": 0.0}}}
    odd = [{"ids": [5], "parts": {"answer": {"start": n, "stop": n, "nats": 0.0}}} for n in (0, 1, 9)]
    write_jsonl(run.stages[1].path / AS_TRAINED, [long, *odd, *rows])
    evaluate.evaluate(run)
    write_jsonl(run.stages[1].path / AS_TRAINED, [long])
    run.stages[1].eval_file("trace_fomc").unlink()
    evaluate.evaluate(run)
    assert "from_training" not in read_json(run.stages[1].eval_file("trace_fomc"))
    merged = train({**exact, "output_dir": f"{run.path}-merged"}, *method("merge"))
    assert not (merged.stages[1].path / AS_TRAINED).exists(), "what is saved is not the model in memory"
    evaluate.evaluate(merged)


def test_what_a_given_up_run_measured_is_not_compared_with_another_one(exact):
    class Stops(CLTrainer):
        def begin_stage(self):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(exact, Stops)
    run = train({**exact, "lora_r": 8}, *method("inclora"))  # in the same folder, in which nothing is trained
    assert not (run.stages[0].path / AS_TRAINED).exists() and (run.stages[1].path / AS_TRAINED).exists()
