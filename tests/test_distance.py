"""Distance from the base model: the measure, the probabilities of engines, the files and their order, the report."""

import math
import re
import shutil

import numpy as np
import pytest
from forks import forked
from made_runs import EIGHT, make_rich_run

from trace_bench import engine, evaluate, report
from trace_bench.cli import main
from trace_bench.engine.swap import Forced
from trace_bench.evaluate import distance
from trace_bench.measures.distance import forward_kl, rank_correlation
from trace_bench.records import NEUTRAL, distance_answers, distance_file
from trace_bench.report.distance import points
from trace_bench.run import Run, RunError, read_json, read_jsonl
from trace_bench.status import status
from trace_tasks.data.files import write_json, write_jsonl


def test_the_divergence_equals_values_worked_by_hand_and_is_a_lower_bound():
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    whole, unseen = forward_kl(p, q)
    assert whole == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2)) and unseen == pytest.approx(0)
    # Only the first token is kept: the other two count as one with .5 and .75.
    bound, unseen = forward_kl(p[:1], q[:1])
    assert bound == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) and unseen == 0.5
    assert bound < whole
    assert forward_kl(p, q)[0] != pytest.approx(forward_kl(np.log([0.5, 0.1, 0.4]), np.log([0.2, 0.7, 0.1]))[0])


def test_the_bound_lacks_the_unseen_mass_times_the_divergence_within_it():
    rng = np.random.default_rng(0)
    p, q = (np.log(rng.dirichlet(np.full(200, 0.3), size=7)) for _ in range(2))
    top = np.argsort(-p, axis=1)
    p, q = (np.take_along_axis(x, top, axis=1) for x in (p, q))
    bound, unseen = forward_kl(p[:, :20], q[:, :20])
    within = [x[:, 20:] - np.log(np.exp(x[:, 20:]).sum(axis=1, keepdims=True)) for x in (p, q)]
    exact, nothing = forward_kl(p, q)
    assert np.allclose(exact, bound + unseen * forward_kl(*within)[0]) and np.allclose(nothing, 0)
    assert (bound < exact).all() and (unseen > 0.01).all()


def test_the_rank_correlation_equals_values_worked_by_hand():
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 50]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert rank_correlation([1, 2, 2, 3], [3, 2, 2, 1]) == -1
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([], [])) and math.isnan(rank_correlation([1], [2]))


# ---------------------------------------------------------------------------------------------------------- the engine


def plain(folder, ids, prompt):
    """The log-probabilities of all tokens at each position after `prompt` tokens, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits, -1)[prompt - 1 : -1].numpy()


ANSWERS = [((5, 6, 7, 8), (40, 41, 42, 43, 44)), ((9, 10), (50, 51, 52)), ((11, 12, 13, 14, 15, 16, 17), (60,))]


def check_expected(lm, folder, tolerance):
    rng = np.random.default_rng(0)
    for k in (20, 4):  # more than a request of vLLM can give at once, and fewer
        asked = [tuple(tuple(map(int, rng.choice(250, k, replace=False))) for _ in answer) for _, answer in ANSWERS]
        forced = [Forced(*texts, tokens) for texts, tokens in zip(ANSWERS, asked, strict=True)]
        for (prompt, answer), tokens, told in zip(ANSWERS, asked, lm.token_logprobs(forced), strict=True):
            whole = plain(folder, [*prompt, *answer], len(prompt))
            for row, ids, here in zip(whole, tokens, told, strict=True):
                assert np.allclose([here[i] for i in ids], row[list(ids)], atol=tolerance)
    for (prompt, answer), told in zip(
        ANSWERS, lm.token_logprobs([Forced(*texts, 6) for texts in ANSWERS]), strict=True
    ):
        for row, here in zip(plain(folder, [*prompt, *answer], len(prompt)), told, strict=True):
            assert sorted(here.values())[-6:] == pytest.approx(sorted(row)[-6:], abs=tolerance)


def test_transformers_gives_the_probabilities_at_each_token_of_given_answers(tiny_model, checkpoints):
    lm = engine.open_engine("hf", str(tiny_model), engine_args={"dtype": "float32", "batch_size": 2})
    check_expected(lm, tiny_model, 1e-4)
    lm.load(checkpoints["full model"])
    check_expected(lm, checkpoints["full model"], 1e-4)
    # All tokens of the vocabulary give the divergence itself. Half of them give a lower bound.
    texts = ANSWERS[0]
    size = len(lm.tokenizer)
    base = plain(tiny_model, [*texts[0], *texts[1]], len(texts[0]))
    order = np.argsort(-base, axis=1)
    (told,) = lm.token_logprobs([Forced(*texts, tuple(map(tuple, order.tolist())))])
    stage = np.array([[here[i] for i in ids] for ids, here in zip(order.tolist(), told, strict=True)])
    base = np.take_along_axis(base, order, axis=1)
    exact, nothing = forward_kl(base, stage)
    bound, unseen = forward_kl(base[:, : size // 2], stage[:, : size // 2])
    assert np.allclose(nothing, 0, atol=1e-5) and (bound <= exact + 1e-9).all() and (bound > 0.3 * exact).all()
    assert (unseen > 0.1).all(), "so the bound was made of a part"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("forced", [True, False])
def test_vllm_gives_the_same_probabilities_with_one_request_per_answer_or_per_token(checkpoints, tiny_model, forced):
    forked(check_vllm, tiny_model, checkpoints["full model"], forced)


def check_vllm(base, model, forced):
    args = {"dtype": "float32", "max_model_len": 64}
    lm = engine.open_engine("vllm", str(base), engine_args=args, forced=forced)
    assert lm.forces is (forced or lm.model.llm_engine.vllm_config.use_v2_model_runner)
    asked, generate = [], lm._model_generate
    lm._model_generate = lambda prompts, **kwargs: asked.append(len(prompts)) or generate(prompts, **kwargs)
    lm.token_logprobs([Forced(*texts, 4) for texts in ANSWERS])
    assert asked == [len(ANSWERS) if lm.forces else sum(len(answer) for _, answer in ANSWERS)]
    check_expected(lm, base, 1e-3)
    lm.load(model)
    check_expected(lm, model, 1e-3)


# ------------------------------------------------------------------------------------------------------------ the run


def there(run: Run) -> list[str]:
    return sorted(str(p.relative_to(run.path / "stages")) for p in run.path.glob("stages/*/distance/*.json"))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(distance, "TOKENS", 3)
    monkeypatch.setattr(distance, "PROMPTS", 4)


FILES = [
    *("0_base/distance/neutral.json", "0_base/distance/trace_fomc.json", "0_base/distance/trace_numglue_ds.json"),
    *("1_trace_fomc/distance/neutral.json", "1_trace_fomc/distance/trace_fomc.json"),
    *("2_trace_numglue_ds/distance/neutral.json", "2_trace_numglue_ds/distance/trace_numglue_ds.json"),
]


def test_a_killed_and_resumed_measurement_equals_an_uninterrupted_one(run, quick, tmp_path, monkeypatch):
    other = Run.open(shutil.copytree(run.path, tmp_path / "other"))
    assert evaluate.evaluate(run) == 5 and there(run) == []
    # Asked for stage 2 alone the base model's answers come first; killed after those of stage 2's own task.
    measure, done = distance.measure, []

    def killed(plan, lm, stage, name, made):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(name)
        measure(plan, lm, stage, name, made)

    monkeypatch.setattr(distance, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, stages=[2], extra={"distance": True})
    assert there(run) == [*FILES[:3], FILES[6]]
    monkeypatch.setattr(distance, "measure", measure)
    kept = (run.path / "stages" / FILES[6]).stat().st_mtime_ns
    main(["evaluate", str(run.path), "--distance"])
    assert there(run) == FILES and (run.path / "stages" / FILES[6]).stat().st_mtime_ns == kept
    assert evaluate.evaluate(run, extra={"distance": True}) == 0

    assert evaluate.evaluate(other, extra={"distance": True}) == 12, "cells and distances of one command"
    for file in FILES:
        one, two = (read_json(r.path / "stages" / file) for r in (run, other))
        assert one["answers"] == two["answers"] and one["n"] == two["n"] == (24 if "neutral" in file else 4)
        assert np.allclose(one.get("kl", 0), two.get("kl", 0), atol=1e-5)
    kl = read_json(run.path / "stages" / FILES[4])["kl"]
    assert np.shape(kl) == (4, 3) and np.min(kl) > 0
    assert status(run).splitlines()[1].endswith(f"; {1 + len(run.tasks)} distances from the base model")
    base, lm = run.stages[0], engine.open_engine("hf", run.manifest["model"]["path"])
    for name in (NEUTRAL, run.tasks[0]):
        assert np.max(distance._against_base(base, lm, name)["kl"]) < 1e-4, "the base model has none from itself"
        rows = read_jsonl(distance_answers(base, name))
        assert all(len(r["answer"]) == len(r["tokens"]) == len(r["logprobs"]) for r in rows)
        assert all(ids[0] == token for r in rows for ids, token in zip(r["tokens"], r["answer"], strict=True)), "greedy"


def test_following_a_single_stage_measures_the_base_models_answers_first(run, quick):
    assert evaluate.follow(run.path, stages=[2], extra={"distance": True}) > 0
    assert there(run) == [*FILES[:3], *FILES[5:]]


def test_distances_of_different_weights_answers_or_settings_are_not_used(run, quick, monkeypatch):
    evaluate.evaluate(run, extra={"distance": True})
    stage, base = run.stages[1], run.stages[0]
    file = distance_file(stage, NEUTRAL)
    write_json(file, {**read_json(file), "checkpoint": "another"})
    assert [math.isnan(p.neutral.value) for p in points(report.Results(run))] == [True, False]
    assert evaluate.evaluate(run, extra={"distance": True}) == 1
    distance_file(base, NEUTRAL).unlink()
    assert evaluate.evaluate(run, extra={"distance": True}) == 3, "at all stages, since they hang on the answers"
    rows = read_jsonl(distance_answers(base, "trace_fomc"))
    write_jsonl(distance_answers(base, "trace_fomc"), rows[1:])
    distance_file(stage, "trace_fomc").unlink()
    with pytest.raises(RunError, match=r"trace_fomc\.jsonl has changed since it was written"):
        evaluate.evaluate(run, extra={"distance": True})
    monkeypatch.setattr(distance, "TOKENS", 2)
    with pytest.raises(RunError, match=r"tokens: 3 -> 2\n.*delete .*stages/\*/distance"):
        evaluate.evaluate(run, extra={"distance": True})


# --------------------------------------------------------------------------------------------------------- the report


def with_distances(run: Run, own) -> Run:
    """Writes distances into a run: the nats of each stage on its own task, and half of them on neutral questions."""
    for stage in run.stages:
        for name in distance.sets_of(run, stage):
            level = own[stage.index - 1] / (2 if name == NEUTRAL else 1)
            kl = {"kl": [[level - 0.1, level], [level + 0.1, level]]} if stage.index else {}
            checkpoint = read_json(stage.train_file)["checkpoint"] if stage.index else None
            write_json(
                distance_file(stage, name),
                {"stage": stage.name, "set": name, "answers": f"of {name}", "checkpoint": checkpoint, "n": 2, **kl}
                | {"unseen": [[0.1, 0.2], [0.1, 0.0]], "settings": {"tokens": 2, "likeliest": 20}, "seconds": 1.0},
            )
    return run


def test_the_report_has_distances_and_forgetting_in_one_table(make):
    run = with_distances(make_rich_run(make, tasks=EIGHT[:6], n=12), [1, 2, 3, 4, 5, 6])
    report.write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8").split("## Distance")[1].split("\n## ")[0]
    assert "first 2 tokens of the base model's own answers to 2 test prompts" in text
    (row,) = re.findall(r"\| 3_trace_meetingbank \| (.*) \|", text)
    own, neutral, *shares, bwt = row.split(" | ")
    assert own.startswith("3.00 [2.") and neutral.startswith("1.50 [0.") and shares == ["10.0", "10.0"]
    assert bwt == report.tables.percent_with_interval(report.Results(run).sequence["BWT"][2], sign=True)
    forgetting = [-e.value for e in report.Results(run).sequence["BWT"][1:]]
    rho = rank_correlation(range(5), forgetting)
    assert f"{rho:+.2f} on the own task's prompts (5 points)" in text
    assert (run.path / "figures" / "distance.svg").exists()
    assert 'id="distance"' in (run.path / "report.html").read_text(encoding="utf-8")
    lines = (run.path / "scores.csv").read_text().splitlines()
    assert any(line.startswith("3_trace_meetingbank,neutral,kl_from_base,1.5,,2,0,") for line in lines)


def test_a_comparison_has_the_distance_of_each_run(make, tmp_path):
    made = {"tasks": EIGHT[:2], "n": 12}
    runs = [with_distances(make_rich_run(make, name=f"r{k}", seed=k, **made), [k + 1.0] * 2) for k in range(2)]
    report.write_comparison(runs, tmp_path / "all.html")
    assert (tmp_path / "all-figures" / "distances.svg").exists()
    report.write_comparison([runs[0], *runs], tmp_path / "twice.html")
    assert (tmp_path / "twice-figures" / "distances.svg").exists()
    text = report.write_comparison(runs)
    table = text.split("Distance from the base model")[1]
    assert re.search(r"\| r0 \| 1\.00 \[.*\| 0\.500", table) and re.search(r"\| r1 \| 2\.00 \[.*\| 1\.00", table)
    assert "Distance" not in report.write_comparison([make_rich_run(make, name=f"plain{k}", **made) for k in range(2)])
