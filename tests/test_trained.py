"""The engine has to give rows the log-likelihoods that they had at the end of the training, or have in transformers."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import train
from forks import forked
from method_runs import method
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trace_bench import evaluate
from trace_bench.engine import EngineError, hf
from trace_bench.evaluate import external_run, reading, reference
from trace_bench.evaluate.cells import check_engine
from trace_bench.evaluate.plan import make_plan
from trace_bench.run import AS_TRAINED, Run, Stage, read_json, read_jsonl
from trace_bench.tasks import load_tasks
from trace_tasks.data.files import write_json, write_jsonl
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


def test_an_engine_that_gives_no_numbers_for_answers_is_refused(exact):
    run = train(exact)
    stage, rows = run.stages[1], read_jsonl(run.stages[1].path / AS_TRAINED)

    class Engine:
        max_length = 1024

        def likelihoods_of(self, examples):
            given = [(row["parts"][name]["nats"], name) for row in rows for name in row["parts"]]
            return [math.nan if name == "answer" else nats for nats, name in given]

    with pytest.raises(EngineError, match="by nan nats per token"):
        check_engine(stage, Engine(), make_plan(run, [stage]))


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
    with pytest.raises(EngineError, match=r"trainer by 0\.2 nats per token"):
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


# ------------------------------------------------------------------------------------------ checkpoints from elsewhere


@pytest.fixture
def external(checkpoints, tiny_model, tmp_path, monkeypatch) -> Run:
    """Two adapters with the same configuration and a full model, evaluated by vLLM in float32."""
    monkeypatch.setenv("TRACE_DATA", "demo")
    shutil.copytree(checkpoints["adapter"], tmp_path / "another")
    given = {"one": checkpoints["adapter"], "two": tmp_path / "another", "full": checkpoints["full model"]}
    settings = {"backend": "vllm", "test_rows": 2, "max_prompt_length": 64, "max_new_tokens": 4}
    return external_run(
        tmp_path / "external",
        {name: str(folder) for name, folder in given.items()},
        model=str(tiny_model),
        tasks=["trace_fomc", "trace_numglue_ds"],
        settings={**settings, "engine_args": {"dtype": "float32"}},
    )


def here(words: list[str]) -> int:
    """Reads in this process, which saves a second one its imports."""
    reading.read(Path(words[-1]))
    return 0


def measured(run: Run, context: int | None = None, **asked) -> dict[str, int]:
    """Has transformers read prompts. Returns the stages that are measured, and how many lines each has."""
    plan = make_plan(run, run.stages, **asked)
    reference.measure(plan, load_tasks(run.tasks), context)
    return {stage.name: len(rows) for stage in run.stages if (rows := reference.read(stage, plan))}


def lines(stage: Stage) -> list[dict]:
    return read_jsonl(stage.path / reference.BY_TRANSFORMERS)


@pytest.mark.slow
def test_transformers_reads_prompts_with_the_base_and_one_checkpoint_of_each_configuration(
    external, tiny_model, capsys
):
    assert measured(external) == {"0_base": 8, "1_one": 8, "3_full": 8}
    assert "transformers reads 8 prompts with 0_base, 1_one, 3_full" in capsys.readouterr().out
    base, one, _, full = external.stages
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), one.checkpoint)
    models = {base: plain, one: adapted.eval(), full: AutoModelForCausalLM.from_pretrained(full.checkpoint)}
    for stage, model in models.items():
        for row in lines(stage):
            (start, stop), ids = (row["parts"]["before"][name] for name in ("start", "stop")), torch.tensor(row["ids"])
            assert stop == len(ids) <= 64 and start == max(stop - 32, 1)
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            assert row["parts"]["before"]["nats"] == pytest.approx(logprobs[start - 1 :].sum().item(), rel=1e-4)


def test_adapters_that_are_stacked_are_compared_as_well(external, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "run_child", here)
    adapters = {name: str(external.stages[1].checkpoint) for name in ("one", "two", "three")}
    model, settings = external.manifest["model"]["path"], external.manifest["config"]
    chain = external_run(tmp_path / "chain", adapters, model=model, tasks=external.tasks, settings=settings, chain=True)
    assert measured(chain) == {"0_base": 8, "1_one": 8, "2_two": 8}
    one, two = (lines(stage)[0]["parts"]["before"]["nats"] for stage in chain.stages[1:3])
    assert abs(one - two) > 0.1


def test_only_weights_that_are_new_are_read_again(external, monkeypatch):
    monkeypatch.setattr(reference, "run_child", here)
    measured(external)
    monkeypatch.setattr(reference, "run_child", lambda *args: pytest.fail("nothing is new"))
    measured(external)
    for kind in ("one", "two"):  # files of other weights
        shutil.copy(external.stages[3].checkpoint / "model.safetensors", external.stages[1].checkpoint / f"{kind}.json")
    monkeypatch.setattr(reference, "run_child", here)
    assert measured(external).keys() == {"0_base", "1_one", "3_full"}


def test_numbers_of_another_dtype_are_not_compared(external, monkeypatch):
    """After an evaluation in bfloat16, whose cells were deleted, one in float32 would be refused for its rounding."""
    monkeypatch.setattr(reference, "run_child", here)
    bf16 = {"dtype": "bfloat16"}
    measured(external, engine_args=bf16)
    exact = make_plan(external, external.stages)
    assert not any(reference.read(stage, exact) for stage in external.stages)
    assert measured(external) == {"0_base": 8, "1_one": 8, "3_full": 8}


def test_numbers_of_another_base_model_are_not_compared(external, checkpoints, monkeypatch):
    """As after an engine was refused, and the same folder gets another model."""
    monkeypatch.setattr(reference, "run_child", here)
    measured(external)
    asked = {"tasks": external.tasks, "settings": external.manifest["config"]}
    other = external_run(
        external.path, {"one": str(checkpoints["full model"])}, model=str(checkpoints["full model"]), **asked
    )
    plan = make_plan(other, other.stages)
    assert [reference.read(stage, plan) for stage in other.stages] == [[], []]


def test_prompts_beyond_the_context_are_cut_to_be_compared(external, tiny_model, monkeypatch):
    """Otherwise the engine could not read them, and nothing would be compared."""
    monkeypatch.setattr(reference, "run_child", here)
    write_json(
        external.path / "manifest.json",
        {**external.manifest, "config": {**external.manifest["config"], "max_prompt_length": None}},
    )
    measured(Run.open(external.path), context=48)
    assert max(len(row["ids"]) for row in lines(external.stages[0])) == 48


def test_a_model_that_transformers_cannot_load_here_is_evaluated_with_a_warning(external, monkeypatch, caplog):
    monkeypatch.setattr(hf.SwapHF, "load", lambda self, *args: 1 / 0)
    monkeypatch.setattr(reference, "run_child", here)
    assert measured(external) == {"0_base": 8}
    assert "for 1_one, 3_full, which failed: division by zero" in caplog.text
    monkeypatch.setattr(reference, "run_child", lambda *args: -9)
    assert measured(external) == {"0_base": 8}
    assert "which failed: its process ended with exit code -9" in caplog.text


def evaluated_by_vllm(path: Path) -> list[float | None]:
    """The differences that the cells of a run have on record."""
    reference.run_child, run = here, Run.open(path)
    evaluate.evaluate(run, likelihood=False)
    return [read_json(s.eval_file(task)).get("from_transformers") for s in run.stages for task in run.tasks]


@pytest.mark.slow
def test_vllm_is_compared_with_transformers(external):
    apart = forked(evaluated_by_vllm, external.path)
    assert apart[4:6] == [None, None], "its configuration is that of the adapter before"
    assert all(difference < 1e-4 for difference in apart[:4] + apart[6:])


def test_rounding_to_bf16_explains_more_and_transformers_is_not_compared_with_itself(external, monkeypatch):
    monkeypatch.setattr(reference, "run_child", here)
    base = external.stages[0]

    class Engine:
        max_length = 1024

        def likelihoods_of(self, examples):
            parts = [row["parts"]["before"] for row in lines(base)][: len(examples)]
            return [part["nats"] + 0.05 * (part["stop"] - part["start"]) for part in parts]

    def found(**asked):
        measured(external, **asked)
        return check_engine(base, Engine(), make_plan(external, [base], **asked))

    assert found(engine_args={"dtype": "bfloat16"}) == {"from_transformers": pytest.approx(0.05)}
    assert found(backend="hf") == {}
    with pytest.raises(EngineError, match=r"vLLM does not compute .* differ by 0\.05 .* most 0\.01\. Use"):
        found()
