"""EWC: its penalty, and the Fisher information against enumerated values."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import train
from datasets import Dataset
from method_runs import EXACT, as_method, method, small, unbuilt
from safetensors.torch import load_file


@pytest.mark.parametrize("online", [True, False])
def test_the_penalty_gradient_of_ewc_is_that_of_autograd_and_zero_at_the_anchor(options, online):
    """Both variants keep two tensors per parameter. Offline these are the sums over the anchors of all tasks."""
    trainer, config = method("ewc")
    fishers, anchors, errors = [], [], []

    class Spy(trainer):
        def fisher(self):
            fishers.append(super().fisher())
            anchors.append({n: p.detach().clone() for n, p in self.trained().items()})
            return fishers[-1]

        def adjust_gradients(self, model):
            before = {n: p.grad.clone() for n, p in self.trained().items()}
            super().adjust_gradients(model)
            if self.stage.index == 2 and not errors:
                for n, p in self.trained().items():
                    # The first step of stage 2 is at the anchor, the end of stage 1.
                    torch.testing.assert_close(p.grad, before[n], rtol=0, atol=1e-5 * float(before[n].abs().max()))
                    moved = (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_()
                    penalty = self.config.ewc_lambda / 2 * (fishers[0][n] * (moved - p.detach()) ** 2).sum()
                    (wanted,) = torch.autograd.grad(penalty, moved)
                    errors.append((self.penalty_gradient(n, moved) - wanted).abs().max() / wanted.abs().max())

    changes = {**EXACT, "ewc_online": online, "ewc_gamma": 0.5, "ewc_lambda": 1.0}
    run = train(small(options, "ewc", **changes), as_method(Spy), config)
    assert errors and max(errors) < 1e-3 and all(f.min() >= 0 and f.max() > 0 for f in fishers[0].values())
    state = load_file(run.stages[2].method_state / "state.safetensors")
    assert len(state) == 2 * len(fishers[0])
    for name in fishers[0]:
        (a, b), (x, y) = (f[name] for f in fishers), (c[name] for c in anchors)
        P, Q = (0.5 * a + b, (0.5 * a + b) * y) if online else (a + b, a * x + b * y)
        torch.testing.assert_close(state[f"P/{name}"], P)
        torch.testing.assert_close(state[f"Q/{name}"], Q)


@pytest.mark.parametrize(
    ("weights", "change"),
    [
        pytest.param("rows", {}, id="adapters, rows together"),
        pytest.param("tokens", {}, id="adapters, rows together, weighed by tokens"),
        pytest.param("rows", {"gradient_checkpointing": True}, id="row by row, since there is no room"),
        pytest.param("tokens", {"use_peft": False}, id="all parameters, row by row"),
        pytest.param("rows", {"lora_modules_to_save": ["lm_head"]}, id="a head, which sees answers alone"),
    ],
)
def test_the_fisher_information_is_the_squared_gradient_of_the_task_s_rows(options, change, weights):
    trainer, config = method("ewc")
    pairs = []

    class Spy(trainer):
        def fisher(self):
            result = super().fisher()
            rows = self.task_dataset(self.stage.task)
            by_hand = {n: torch.zeros_like(p) for n, p in self.trained().items()}
            for batch in self.batches(rows, 1):
                self.model.zero_grad()
                self.model(**batch).loss.backward()  # transformers' own loss, of one row
                length = int((batch["labels"] != -100).sum())
                items = sum(x != -100 for r in rows["labels"] for x in r) if weights == "tokens" else len(rows) * length
                for n, p in self.trained().items():
                    by_hand[n] += (length * p.grad) ** 2 / items
            self.model.zero_grad()
            pairs.extend((result[n], by_hand[n]) for n in result)
            return result

    # Rows of different lengths in one batch, the last batch not full.
    rows = {"loss_weights": weights, "tasks": ["trace_py150"], "train_rows": 10}
    train(small(options, "ewc", **EXACT, **rows, **change), Spy, config)
    assert pairs
    for result, by_hand in pairs:
        torch.testing.assert_close(result, by_hand, rtol=1e-3, atol=1e-9)


class Known(torch.nn.Module):
    """A language model of six words. Only a hidden layer is trained. The next word depends only on the last one."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden = torch.nn.Embedding(6, 5), torch.nn.Linear(5, 5, bias=False)
        self.head = torch.nn.Linear(5, 6, bias=False)
        self.words.requires_grad_(False)
        self.head.weight.requires_grad_(False)
        self.head.weight *= 4  # far from uniform

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=self.head(torch.tanh(self.hidden(self.words(input_ids)))))

    def fisher_after(self) -> torch.Tensor:
        """The true Fisher information of the next word after each word: the mean over all six, by their probability."""
        found = []
        for word in range(6):
            logp = self(torch.tensor([[word]])).logits[0, 0].log_softmax(-1)
            parts = [torch.autograd.grad(x, self.hidden.weight, retain_graph=True)[0] for x in logp]
            found.append(sum(x.exp().detach() * part**2 for x, part in zip(logp, parts, strict=True)))
        return torch.stack(found)


def known_fisher(rows: list[list[int]], model: Known, **changes) -> torch.Tensor:
    """The trainer's Fisher information for rows whose prompt is one word."""
    from accelerate import Accelerator
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    instance = unbuilt("ewc", per_device_train_batch_size=64, ewc_rows=10**6, **changes)
    instance.args = instance.config
    instance.config.gradient_checkpointing = instance.aux_loss_enabled = False
    instance.model, instance.accelerator, instance.stage = model, Accelerator(cpu=True), SimpleNamespace(task="known")
    instance.model_args = SimpleNamespace(lora_modules_to_save=None, lora_target_parameters=None)
    instance.compute_loss_context_manager = nullcontext
    instance.task_dataset = lambda _: Dataset.from_list([{"input_ids": r, "labels": [-100, *r[1:]]} for r in rows])
    instance.data_collator = DataCollatorForLanguageModeling(pad_token_id=0)
    return instance.fisher()["hidden.weight"]


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("weights", ["rows", "tokens"])
@pytest.mark.parametrize("lengths", [[2], [2, 20, 180]], ids=str)
def test_the_fisher_information_equals_the_enumerated_one_for_all_lengths_of_answers(lengths, weights, fisher):
    """On text of the model itself, both kinds must equal the true curvature of the loss, which is enumerated."""
    torch.manual_seed(0)
    model = Known()
    true = model.fisher_after()
    with torch.no_grad():
        follows = model(torch.arange(6)[None]).logits[0].softmax(-1)
    rows, wanted, tokens = [], [], 0
    for n in lengths:
        text = [torch.arange(800) % 6]
        for _ in range(n):
            text.append(torch.multinomial(follows[text[-1]], 1)[:, 0])
        rows += torch.stack(text, 1).tolist()
    for row in rows:
        positions = true[row[:-1]]
        tokens += len(positions)
        wanted.append(positions.sum(0) if weights == "tokens" else positions.mean(0))
    wanted = sum(wanted) / (tokens if weights == "tokens" else len(rows))
    found = known_fisher(rows, model, loss_weights=weights, ewc_fisher=fisher)
    assert float(found.sum() / wanted.sum()) == pytest.approx(1, abs=0.1)
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0)) > 0.98


def test_on_fitted_data_only_the_sampled_fisher_information_stays_large():
    """After the three words that the model is surest about, the labels of the data have nearly no gradient."""
    torch.manual_seed(0)
    model = Known()
    probability, following = model(torch.arange(6)[None]).logits[0].softmax(-1).max(-1)
    words = probability.argsort()[-3:].tolist()
    rows = 800 * [[word, int(following[word])] for word in words]
    empirical, sampled = (float(known_fisher(rows, model, ewc_fisher=k).sum()) for k in ("empirical", "sampled"))
    assert sampled == pytest.approx(float(model.fisher_after()[words].mean(0).sum()), rel=0.15)
    assert empirical < 0.4 * sampled
    one, same_seed, other = (known_fisher(rows[:30], model, ewc_fisher="sampled", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same_seed) and not torch.equal(one, other), "the run's seed decides what is drawn"
