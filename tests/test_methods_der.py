"""Methods that hold on to earlier outputs: lwf (of the previous model), der (of each row's own stage)."""

from types import SimpleNamespace

import pytest
import torch
from conftest import train
from method_runs import EXACT, THREE, as_method, method, probe, same, same_step, small, unbuilt, weights
from safetensors.torch import load_file
from torch.nn.functional import kl_div

from trace_bench.run import read_json
from trainers.base import CLTrainer
from trainers.der import KEPT, class_logs
from trainers.replay import ReplayConfig, ReplayTrainer

CHANGES = {**EXACT, "replay_ratio": 0.5, "train_rows": 8, "max_prompt_length": 64}


def state(run, stage: int) -> dict[str, torch.Tensor]:
    return load_file(run.stages[stage].method_state / "state.safetensors")


def test_the_divergence_of_kept_classes_is_the_full_one_less_that_within_the_rest():
    torch.manual_seed(0)
    old, new = torch.randn(2, 5, 40, dtype=torch.float64) * 2
    ids = old.topk(8).indices
    of_old, of_new = class_logs(old, ids), class_logs(new, ids)
    for logits, logs in ((old, of_old), (new, of_new)):
        torch.testing.assert_close(logs.exp().sum(-1), torch.ones(5, dtype=torch.float64))
        torch.testing.assert_close(logs[:, :-1], logits.log_softmax(-1).gather(-1, ids))
    kept = kl_div(of_new, of_old, reduction="none", log_target=True).sum(-1)
    full = kl_div(new.log_softmax(-1), old.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    p, q = (x.scatter(-1, ids, -torch.inf).softmax(-1) for x in (old, new))
    within = torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0).sum(-1)
    torch.testing.assert_close(kept, full - of_old[:, -1].exp() * within)
    assert (kept > 0).all() and (kept < full).all()
    # If all tokens except one are kept, nothing is lost. Shifts among the other tokens are not seen.
    ids = old.topk(39).indices
    almost = kl_div(class_logs(new, ids), class_logs(old, ids), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(almost, full)
    ids = old.topk(8).indices
    turned = old.scatter(-1, old.topk(10).indices[:, 8:], old.gather(-1, old.topk(10).indices[:, 8:].flip(-1)))
    assert not torch.equal(turned, old)
    torch.testing.assert_close(class_logs(turned, ids), class_logs(old, ids))


def test_the_divergence_belongs_to_its_row_and_has_the_softmax_gradient():
    instance = unbuilt("der", der_top=3)
    torch.manual_seed(0)
    old = torch.randn(6, 9)  # rows of 2, 1 and 3 answer tokens
    ids = old.topk(3).indices
    instance.said, instance.ends = {"ids": ids.int(), "logs": class_logs(old, ids)}, [2, 3, 6]
    order = torch.tensor([3, 4, 5, 0, 1])
    assert instance.divergence(old[order], torch.tensor([2, 0])).abs().max() < 1e-6
    assert instance.divergence(old[:2], torch.tensor([0])).abs().max() == 0, "the old model itself"
    assert instance.divergence(old[[1, 0]], torch.tensor([0])).min() > 0.01, "another position's"
    logits = torch.randn(5, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(instance.divergence(logits, torch.tensor([2, 0])).sum(), logits)
    # The gradient of a kept token is q - p; that of the others is divided among them by the model's probabilities.
    q, ids = logits.detach().softmax(-1), ids[order]
    p = instance.said["logs"][order].exp()
    others = q.scatter(-1, ids, 0)
    wanted = q - (others / others.sum(-1, keepdim=True) * p[:, -1:]).scatter(-1, ids, p[:, :-1])
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_der_with_only_the_loss_is_mixed_replay(options, tmp_path):
    run = train(small(options, "der", 3, **CHANGES, der_lambda=1.0), *method("der"))
    mixed = {"replay": "mixed", "alignment_data": "none", "max_steps": 2, "output_dir": str(tmp_path / "mixed")}
    other = train({**small(options, "der", 3), **CHANGES, **mixed}, ReplayTrainer, ReplayConfig)
    for stage in (1, 2, 3):
        assert same(weights(run, stage), weights(other, stage)), "the same bytes"
    a, b = (read_json(r.stages[3].train_file) for r in (run, other))
    assert a["replayed"] == b["replayed"] == dict.fromkeys(THREE[:2], 4)
    plain = train(small(options, "der", 3, **CHANGES, output_dir=str(tmp_path / "half")), *method("der"))
    assert same(weights(run, 1), weights(plain, 1)) and not same(weights(run, 2), weights(plain, 2))


def test_the_divergence_of_der_is_zero_at_the_start_and_the_gradient_follows_the_formula(options):
    def look(trainer, adjust):
        trainer.model.eval()
        found = {n: p.grad.clone() for n, p in trainer.trained().items()}
        rows, c = trainer.train_dataset, trainer.config
        (batch,) = trainer.batches(rows, len(rows))
        kept = batch.pop(KEPT)
        assert kept.tolist() == [-1] * 8 + list(range(4))
        (replayed,) = trainer.batches(rows.select(range(8, 12)), 4)
        logits, _ = trainer.answer_logits(trainer.model, {k: v for k, v in replayed.items() if k != KEPT})
        divergence = trainer.divergence(logits, torch.arange(4))
        # The step's gradient at the start of the stage, from single rows with transformers' own loss.
        trainer.model.zero_grad()
        for i, row in enumerate(rows.to_list()):
            ids, labels = (torch.tensor([row[k]]) for k in ("input_ids", "labels"))
            (trainer.model(input_ids=ids, labels=labels).loss * (c.der_lambda if i >= 8 else 1) / 12).backward()
        for n, p in trainer.trained().items():
            torch.testing.assert_close(found[n], p.grad, rtol=1e-3, atol=1e-6)
        return divergence

    changes = {**CHANGES, "per_device_train_batch_size": 12, "der_lambda": 0.25, "max_steps": 1}
    divergence = probe(options, "der", 2, look, **changes)
    assert len(divergence) >= 8 and divergence.abs().max() < 1e-5


def test_kept_outputs_are_those_of_the_rows_own_stage_and_copied_unchanged(options):
    trainer, config = method("der")
    told = {}

    class Spy(trainer):
        def end_stage(self):
            super().end_stage()
            (batch,) = self.batches(self.remembered(self.stage.task), 4)
            logits = self.model(**{k: v for k, v in batch.items() if k != KEPT}).logits
            answer = batch["labels"][:, 1:] != -100
            told[self.stage.index] = logits[:, :-1][answer].detach().log_softmax(-1), answer.sum(1)

    run = train(small(options, "der", 3, **CHANGES, der_top=20), as_method(Spy), config)
    states = {stage: state(run, stage) for stage in (1, 2, 3)}
    for stage, now in states.items():
        full = torch.cat([told[k][0] for k in range(1, stage + 1)])
        assert torch.equal(now["lengths"], torch.cat([told[k][1] for k in range(1, stage + 1)]).int())
        assert int(now["lengths"].sum()) == len(full) == len(now["ids"]) == len(now["logs"])
        torch.testing.assert_close(now["logs"][:, :-1], full.topk(20).values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(now["logs"].exp().sum(-1), torch.ones(len(full)))
        # 8 K + 4 bytes for a token and 4 for a row.
        size = sum(tensor.nbytes for tensor in now.values())
        assert size == (8 * 20 + 4) * len(full) + 4 * 4 * stage
        record = read_json(run.stages[stage].train_file)
        assert record["kept_bytes"] == size
        own = told[stage][0].topk(20).values.exp().sum(-1).mean()
        assert record["kept_mass"] == pytest.approx(float(own), rel=1e-4)
        if stage > 1:
            before = states[stage - 1]
            assert all(torch.equal(now[name][: len(tensor)], tensor) for name, tensor in before.items())


def test_der_top_must_be_smaller_than_the_vocabulary(options):
    run = train(small(options, "der", 2, **CHANGES, der_top=10_000), *method("der"))
    ids, logs = (state(run, 2)[name] for name in ("ids", "logs"))
    assert ids.shape[1] == 258 and logs.shape[1] == 259 and logs.isfinite().all()


@pytest.mark.parametrize(("loss", "lora"), [("rows", True), ("tokens", False)])
def test_accumulation_takes_the_same_step(loss, lora, options, tmp_path):
    """There are 12 rows, 4 of them replayed, and the divergence is not zero."""
    divergences = []

    class Spy(method("der")[0]):
        def begin_stage(self):
            super().begin_stage()
            if self.said:
                self.said["logs"] = self.said["logs"].roll(1, 0)  # what was said of others

        def divergence(self, logits, rows):
            divergences.append(super().divergence(logits, rows))
            return divergences[-1]

    changes = {**CHANGES, "use_peft": lora, "loss_weights": loss, "max_answer_length": 30}
    same_step("der", options, tmp_path, ((12, 1), (3, 4)), Spy, **changes, tasks=["trace_py150", "trace_fomc"])
    assert torch.cat(divergences).max() > 1e-3


# --------------------------------------------------------------------------------------------------------------- LwF


def test_the_teacher_of_lwf_is_the_previous_stage(options):
    trainer, config = method("lwf")
    seen = []

    class Spy(trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if len(seen) < self.stage.index:
                plain = CLTrainer.compute_loss(self, model, inputs, False, num_items_in_batch)
                seen.append((loss.item(), plain.item()))
                if self.teacher is not None:
                    # At the first step the student is still the previous stage, so its logits equal the teacher's.
                    logits, taught = (self.answer_logits(m, inputs)[0].detach() for m in (self.model, self.teacher))
                    torch.testing.assert_close(logits, taught, rtol=1e-3, atol=1e-4)
                    assert not any(p.requires_grad for p in self.teacher.parameters())
            return loss

    train(small(options, "lwf", 3, **EXACT), as_method(Spy), config)
    assert len(seen) == 3 and seen[0][0] == seen[0][1], "no teacher at the first stage"
    assert all(loss == pytest.approx(plain, rel=1e-3) for loss, plain in seen)


def test_lwf_without_weight_loads_no_teacher():
    instance = unbuilt("lwf", lwf_lambda=0.0)
    instance.stage = SimpleNamespace(index=2)
    instance.begin_stage()
    assert instance.teacher is None, "so it is sequential training to the byte"


def test_the_distillation_loss_is_the_divergence_from_the_teacher():
    instance = unbuilt("lwf")
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11, requires_grad=True), torch.randn(5, 11)
    loss = instance.distillation(student, teacher)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert instance.distillation(teacher, teacher).abs().max() < 1e-5
    # The paper's loss is the cross entropy of both distributions at temperature T. Neither loss has a factor T^2.
    paper = -(p * q.log()).sum()
    gradients = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss.sum(), paper)]
    torch.testing.assert_close(gradients[0], ((q - p) / 2).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
