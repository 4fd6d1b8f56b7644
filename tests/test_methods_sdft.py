"""On-policy self-distillation: on its own answers a model learns the outputs that it has when it sees gold answers."""

from contextlib import nullcontext

import pytest
import torch
from conftest import train
from method_runs import EXACT, as_method, made, method, same, same_step, small
from transformers import AutoModelForCausalLM
from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

from trace_bench.run import read_json
from trace_tasks.tokens import Chat
from trainers.base import divergences, sampled
from trainers.base.sampling import Drawn
from trainers.sdft import SHOWN, TEMPLATE

CHANGES = {**EXACT, "train_rows": 8, "max_prompt_length": 64, "max_answer_length": 24, "sdft_tokens": 6}
#: Options for a single stage, without weights of an earlier stage, which could differ by rounding.
ONE_STEP = {**CHANGES, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1}


# ---------------------------------------------------------------------------------------------------------- the samples


def test_sampling_follows_the_softmax():
    scores = torch.tensor([[2.0, 0.0, 1.0, -torch.inf]]).repeat(20_000, 1)
    draw = Drawn([torch.Generator().manual_seed(i) for i in range(len(scores))])
    share = torch.bincount(draw(None, scores).argmax(dim=1), minlength=4) / len(scores)
    torch.testing.assert_close(share, scores[0].softmax(-1), atol=0.015, rtol=0)


def test_a_sample_depends_only_on_its_seed_and_the_weights(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["full model"], dtype=torch.float32)
    prompts, seeds, ends = [[5, 9], [7] * 30, [11, 4, 8]], [3, 4, 5], frozenset({2, 40, 41})

    def draw(prompts, seeds):
        return sampled(model, prompts, seeds, 12, ends, nullcontext())

    together = draw(prompts, seeds)
    assert [draw([p], [s])[0] for p, s in zip(prompts, seeds, strict=True)] == together
    assert all(a != b for a, b in zip(together, draw(prompts, [6, 7, 8]), strict=True))
    others = [[p[0] + 1, *p[1:]] for p in prompts]
    assert all(a != b for a, b in zip(together, draw(others, seeds), strict=True)), "all of a prompt is read"
    for answer in together:
        assert len(answer) == 12 or answer[-1] in ends
        assert not ends & set(answer[:-1])
    # Sampling ignores the model's own settings, and does not change them or the model's mode.
    own = model.generation_config
    own.repetition_penalty, own.temperature, own.do_sample = 5.0, 0.1, True
    model.train()
    state = torch.get_rng_state()
    assert draw(prompts, seeds) == together
    assert model.training and model.generation_config is own and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("chat", [False, True])
def test_the_teacher_of_sdft_sees_prompt_and_gold_answer_of_each_row(chat, options, monkeypatch):
    monkeypatch.setattr(Chat, "end", "<unk>")
    trainer, config = method("sdft")
    seen = []

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            assert (self.tokenizer.unk_token_id in self.ends) == chat, "a student's turn ends as the template ends it"
            for row in self.train_dataset.to_list() if self.stage.index == 2 else ():
                prompt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
                gold = [label for label in row["labels"] if label != -100]
                seen.append([self.tokenizer.decode(ids) for ids in (prompt, gold[:-1], self.shown[row[SHOWN]])])

    changes = {**CHANGES, "max_prompt_length": 500, "max_answer_length": 300, "max_steps": 1, "replay_ratio": 0.5}
    train(small(options, "sdft", 2, **changes, chat_template=chat), as_method(Spy), config)
    assert len(seen) == 8 + 4
    head, tail = ("<s>user\n", "</s>\n<s>assistant\n") if chat else ("", "")
    for prompt, gold, shown in seen:
        assert prompt.startswith(head) and prompt.endswith(tail)
        question = prompt[len(head) : len(prompt) - len(tail)]
        assert shown == head + TEMPLATE.format(prompt=question, answer=gold) + tail


# ---------------------------------------------------------------------------------------------------------- the teacher


def test_the_divergence_of_sdft_equals_trls():
    torch.manual_seed(0)
    logits, taught = torch.randn(2, 7, 40)
    wanted = compute_full_logit_self_distillation_loss(logits, taught, distillation_alpha=0.0)
    torch.testing.assert_close(divergences(logits, taught), wanted)
    assert divergences(logits, logits).abs().max() < 1e-6 < wanted.min()


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_teacher_of_sdft_is_a_moving_average_of_the_student(rate, options):
    trainer, config = method("sdft")
    ends = []

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            self.average = {n: p.detach().clone() for n, p in self.trained().items()}
            assert same(self.average, self.kept), "it begins as the stage before"

        def after_step(self):
            super().after_step()
            now = {n: p.detach() for n, p in self.trained().items()}
            self.average = {n: (1 - rate) * old + rate * now[n] for n, old in self.average.items()}
            with self.model_with(self.kept) as teacher:
                found = {n: p.detach().clone() for n, p in teacher.named_parameters() if p.requires_grad}
            for n in now:
                torch.testing.assert_close(found[n], self.average[n], rtol=0, atol=1e-7)
                assert self.trained()[n].data_ptr() == now[n].data_ptr(), "the student is back"
            ends.append((found, {n: p.clone() for n, p in now.items()}))

    train(small(options, "sdft", 1, **CHANGES, sdft_ema=rate), as_method(Spy), config)
    assert len(ends) == 2 and not same(ends[0][1], ends[1][1])
    if rate in (0, 1):
        assert same(ends[0][0], ends[1][0]) == (rate == 0) and same(*ends[1]) == (rate == 1), "to the bit"


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_teacher_that_sees_only_the_prompt_moves_no_weight(rate, options):
    trainer, config = method("sdft")

    class Blind(trainer):
        def begin_stage(self):
            super().begin_stage()
            rows = self.train_dataset
            self.shown = [
                ids[: labels.count(-100)] for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
            ]
            self.first = {n: p.detach().clone() for n, p in self.trained().items()}

        def after_step(self):
            super().after_step()
            for n, p in self.trained().items():
                torch.testing.assert_close(p.detach(), self.first[n], rtol=0, atol=1e-5)

    changes = {**ONE_STEP, "max_steps": 3, "sdft_ema": rate}
    run = train(small(options, "sdft", 1, **changes), as_method(Blind), config)
    assert abs(read_json(run.stages[1].train_file)["divergence"]) < 1e-6


def test_a_step_of_sdft_has_the_gradient_of_the_formula(options, checkpoints):
    """The reference is from single rows, with the softmax gradient q - p in float64 instead of autograd."""
    trainer, config = method("sdft")
    seen = []

    class Spy(trainer):
        def on_policy(self, batch):
            seen.append(super().on_policy(batch))
            return seen[-1]

        def adjust_gradients(self, model):
            found = {n: p.grad.clone() for n, p in self.trained().items()}
            self.model.zero_grad()
            rows = seen[0]["labels"].shape[0]
            for i in range(rows):
                logits = []
                for batch in (seen[0]["taught"], seen[0]):
                    answer = batch["labels"][i] != -100
                    ids = batch["input_ids"][i : i + 1, : int(answer.nonzero().max()) + 1]
                    logits.append(self.model(input_ids=ids).logits[0, :-1][answer[1 : ids.shape[1]]])
                p, q = (x.detach().double().softmax(-1) for x in logits)
                ((q - p).float() * logits[1]).sum().div(len(q) * rows).backward()
            for n, p in self.trained().items():
                torch.testing.assert_close(found[n], p.grad, rtol=2e-3, atol=1e-5)
                assert "lora_A" in n or p.grad.abs().max() > 1e-3

    lively = {"model_name_or_path": str(checkpoints["full model"])}
    run = train(small(options, "sdft", 1, **ONE_STEP, **lively), as_method(Spy), config)
    record = read_json(run.stages[1].train_file)
    lengths = (seen[0]["labels"] != -100).sum(dim=1)
    assert record["samples"]["rows"] == 8 and record["samples"]["mean_tokens"] == lengths.float().mean()
    assert 0 <= record["samples"]["finished"] <= 1 and record["divergence"] > 0


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize(("loss", "lora"), [("rows", True), ("tokens", False)])
def test_accumulation_takes_the_same_step(loss, lora, options, checkpoints, tmp_path):
    changes = {**CHANGES, "model_name_or_path": str(checkpoints["full model"]), "loss_weights": loss, "use_peft": lora}
    run, gradients = same_step("sdft", options, tmp_path, ((8, 1), (2, 4)), many=1, atol=2e-5, **changes)
    assert read_json(run.stages[1].train_file)["samples"]["rows"] == 8
    assert max(g.abs().max() for g in gradients.values()) > 1e-2


def test_a_sample_has_the_length_limit_of_answers_by_default():
    config = made(method("sdft")[1])
    assert config.sample_tokens == config.max_answer_length
    assert made(method("sdft")[1], sdft_tokens=7).sample_tokens == 7
