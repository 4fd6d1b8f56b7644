"""LFPT5: one soft prompt for all tasks, and pseudo rows of earlier tasks, which the model writes itself."""

import logging

import pytest
import torch
from conftest import interrupted, train
from method_runs import EXACT, as_method, method, same, same_step, small, weights
from safetensors.torch import load_file

from trace_bench.engine.swap import Answer
from trace_bench.run import read_json
from trainers.base import divergences
from trainers.lfpt5 import PSEUDO, WRITTEN, as_row

CHANGES = {**EXACT, "train_rows": 8, "max_prompt_length": 60, "max_answer_length": 24, "prompt_tokens": 4}
CHANGES |= {"replay_ratio": 0.5}
#: The texts that the model is made to write when it is asked for four rows of the first task. Two are usable.
SAID = ["Is it so?__ans__B", "no row", "Is it so?__ans__B", "Who says that rates will rise?__ans__A"]


def saying(trainer: type, seen: list | None = None) -> type:
    """The same method with a model that writes these rows."""

    class Saying(trainer):
        def answers(self, name, by, prompts, **how):
            if seen is not None:
                seen.append((by.index, prompts, how))
            return {task: [[Answer(text) for text in SAID]] for task in prompts}

    return as_method(Saying)


def lively(checkpoints) -> dict:
    return {"model_name_or_path": str(checkpoints["full model"]), "learning_rate": 0.5, "optim": "sgd"}


@pytest.mark.parametrize(
    ("text", "finished", "row"),
    [
        ("What is 1 + 1?\n__ans__ 2", True, ("What is 1 + 1?\n", " 2")),
        ("What is 1 + 1?\n__ans__ 2", False, None),
        ("What is 1 + 1?", True, None),
        ("a__ans__b__ans__c", True, None),
        ("__ans__ 2", True, None),
        ("What?__ans__ \n", True, None),
        ("", False, None),
    ],
)
def test_only_well_formed_texts_are_pseudo_rows(text, finished, row):
    assert as_row(Answer(text, finished)) == row


# ------------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("chat", [False, True])
def test_a_stage_trains_rows_pseudo_rows_and_texts_to_write(chat, options):
    rows, texts, asked = {}, {}, []
    trainer, config = method("lfpt5")

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            rows[self.stage.index] = self.train_dataset.to_list()
            texts[self.stage.index] = [self.tokenizer.decode(row["input_ids"]) for row in self.written_rows]
            self.decode = self.tokenizer.decode
            decoded[self.stage.index] = [self.decode(row["input_ids"]) for row in rows[self.stage.index]]

    decoded: dict[int, list[str]] = {}
    changes = {**CHANGES, "max_prompt_length": 400, "max_steps": 1, "chat_template": chat}
    run = train(small(options, "lfpt5", 2, **changes), saying(as_method(Spy), seen=asked), config)
    head, tail = ("<s>user\n", "</s>\n<s>assistant\n") if chat else ("", "")
    assert [row[PSEUDO] for row in rows[2]] == [0] * 8 + [1] * 2
    assert [row[WRITTEN] for row in rows[2]] == list(range(10))
    assert decoded[2][8:] == [
        f"{head}{q}{tail}{a}</s>" for q, a in (SAID[0].split("__ans__"), SAID[3].split("__ans__"))
    ]
    for stage, task in ((1, "trace_fomc"), (2, "trace_numglue_ds")):
        for text, row in zip(texts[stage][:8], decoded[stage], strict=False):
            assert text.startswith(f"__{task}__") and text.count("__ans__") == 1
            prompt, answer = text.removeprefix(f"__{task}__").split("__ans__")
            assert row == head + prompt + tail + answer and answer.endswith("</s>")
    assert texts[2][8:] == [f"__trace_fomc__{SAID[i]}</s>" for i in (0, 3)]
    ((by, prompts, how),) = asked
    assert by == 1 and prompts == {"trace_fomc": ["__trace_fomc__"]}
    assert how["samples"] == {"trace_fomc": 4} and how["most"] == 400 + 24 and how["sampling"]["temperature"] == 0.7
    assert read_json(run.stages[2].train_file)["pseudo"] == {"trace_fomc": {"asked": 4, "kept": 2}}
    assert read_json(run.stages[2].train_file)["replayed"] == {"trace_fomc": 2}
    assert read_json(run.stages[1].train_file)["pseudo"] == {}


def test_a_long_prompt_is_written_as_it_is_trained(options):
    trainer, config = method("lfpt5")

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            for row, written in zip(self.train_dataset.to_list(), self.written_rows, strict=True):
                text = self.tokenizer.decode([i for i in written["labels"] if i != -100])
                assert row["labels"].count(-100) <= 20
                assert text == "__ans__".join(
                    self.tokenizer.decode(
                        [i for i, m in zip(row["input_ids"], row["labels"], strict=True) if (m == -100) == p]
                    )
                    for p in (True, False)
                )

    train(small(options, "lfpt5", 1, **{**CHANGES, "max_prompt_length": 20}), as_method(Spy), config)


def test_the_engine_is_asked_for_whole_rows_and_a_model_without_any_is_warned_about(options, written_here, caplog):
    options = small(options, "lfpt5", 3, **CHANGES, max_new_tokens=3)
    with caplog.at_level(logging.WARNING, "trainers.lfpt5"):
        run = train(options, *method("lfpt5"))
    (job,), jobs = [order["jobs"] for order in written_here]  # one engine for each stage
    assert len(jobs) == 2
    assert (job["most"], job["stops"], job["samples"]) == (84, [], 4) and len(job["prompts"]) == 1
    kept = read_json(run.stages[2].train_file)["pseudo"]["trace_fomc"]["kept"]
    assert kept == 0 and "1_trace_fomc wrote no usable row of trace_fomc" in caplog.text


# ------------------------------------------------------------------------------------------------------------- the loss


def test_lfpt5_without_its_losses_has_the_first_stage_of_pp_to_the_byte(options, tmp_path):
    plain = train(
        small(options, "pp", 1, **{**CHANGES, "replay_ratio": None}, output_dir=str(tmp_path / "pp")), *method("pp")
    )
    run = train(small(options, "lfpt5", 1, **CHANGES, lfpt5_lm=0.0), *method("lfpt5"))
    assert same(weights(run, 1), weights(plain, 1))


def test_each_stage_continues_the_previous_prompt_and_moves_nothing_else(options, tiny_model):
    starts, base = {}, load_file(tiny_model / "model.safetensors")
    trainer, config = method("lfpt5")

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            (starts[self.stage.index],) = [p.clone() for p in self.old.values()]

        def end_stage(self):
            now = self.model.base_model.state_dict()
            assert all(torch.equal(now[name], base[name]) for name in base)

    run = train(small(options, "lfpt5", 3, **CHANGES), saying(as_method(Spy)), config)
    prompts = {stage: weights(run, stage)["prompt_embeddings"] for stage in (1, 2, 3)}
    assert [p.shape for p in prompts.values()] == [(4, 128)] * 3
    for stage in (2, 3):
        assert torch.equal(starts[stage], prompts[stage - 1]) and not torch.equal(prompts[stage], prompts[stage - 1])
    assert {t: p["kept"] for t, p in read_json(run.stages[3].train_file)["pseudo"].items()} == {
        "trace_fomc": 2,
        "trace_numglue_ds": 2,
    }


def test_the_divergence_of_lfpt5_is_zero_at_the_start_and_the_gradient_follows_the_formula(options, checkpoints):
    """The reference is from single rows with transformers' own loss. Then the old prompt is moved."""
    trainer, config = method("lfpt5")
    seen = []

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            if self.stage.index == 2:
                rows = self.train_dataset.select([8, 9])
                (batch,) = self.batches(rows, 2)
                with torch.no_grad(), self.model_with(self.old) as before:
                    told = self.answer_logits(before, batch)[0]
                self.model.eval()
                seen.append(divergences(self.answer_logits(self.model, batch)[0], told).abs().max().item())
                self.old = {
                    n: p + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
                    for n, p in self.old.items()
                }

        def adjust_gradients(self, model):
            if self.stage.index == 1:
                return
            (found,) = [p.grad.clone() for p in self.trained().values()]
            self.model.zero_grad()
            c, rows = self.config, self.train_dataset.to_list()
            for row in rows:
                ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
                written = {k: torch.tensor([v]) for k, v in self.written_rows[row[WRITTEN]].items()}
                loss = self.model(input_ids=ids, labels=labels).loss + c.lfpt5_lm * self.model(**written).loss
                (loss / len(rows)).backward()
                if row[PSEUDO]:
                    at = (
                        torch.tensor([i - 1 for i, label in enumerate(row["labels"]) if label != -100])
                        + c.prompt_tokens
                    )
                    with torch.no_grad(), self.model_with(self.old) as before:
                        p = before(input_ids=ids).logits[0, at].double().softmax(-1)
                    logits = self.model(input_ids=ids).logits[0, at]
                    gradient = (logits.detach().double().softmax(-1) - p).float()
                    ((gradient * logits).sum() * c.lfpt5_kl / len(at) / len(rows)).backward()
            (wanted,) = [p.grad for p in self.trained().values()]
            torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-5)
            seen.append(wanted.abs().max().item())

    changes = {**CHANGES, **lively(checkpoints), "per_device_train_batch_size": 10, "lfpt5_kl": 2.0, "max_steps": 1}
    train(small(options, "lfpt5", 2, **changes), saying(as_method(Spy)), config)
    assert seen[0] < 1e-6 and seen[1] > 1e-2


def test_accumulation_takes_the_same_step(options, checkpoints, tmp_path):
    """There are 10 rows, 2 of them pseudo rows, and the prompt differs from the old one."""

    class Spy(method("lfpt5")[0]):
        def begin_stage(self):
            super().begin_stage()
            self.old = {n: -p for n, p in self.old.items()}

    changes = {**CHANGES, **lively(checkpoints), "lfpt5_kl": 2.0}
    same_step("lfpt5", options, tmp_path, ((10, 1), (2, 5)), saying(as_method(Spy)), atol=2e-5, **changes)


def test_a_killed_stage_resumes_with_the_same_rows_and_the_same_old_prompt(options, tmp_path):
    trainer, config = method("lfpt5")
    changes = {**CHANGES, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "lfpt5_kl": 5.0}
    options = small(options, "lfpt5", 2, **changes)
    whole = train({**options, "output_dir": str(tmp_path / "whole")}, saying(trainer), config)
    with pytest.raises(KeyboardInterrupt):
        train(options, saying(interrupted(trainer, 2)), config)
    run = train(options, saying(trainer), config)
    assert same(weights(run, 2), weights(whole, 2))
