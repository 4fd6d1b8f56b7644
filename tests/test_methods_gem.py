"""Methods that project gradients: gem, agem, ogd."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import train
from method_runs import EXACT, as_method, method, probe, same, small, unbuilt
from safetensors.torch import load_file

from trace_bench.run import read_json
from trainers.base import ConfigError


def gem_step(name: str, gradients: list[torch.Tensor], step: torch.Tensor, **changes) -> torch.Tensor:
    """The gradient that a method makes from a step's gradient and the gradients on the memories."""
    instance = unbuilt(name, **changes)
    parameter = torch.nn.Parameter(torch.zeros_like(step))
    parameter.grad = step.clone()
    instance.trained = lambda: {"w": parameter}
    instance.memory = {f"task {i}": [i] for i in range(len(gradients))}
    instance.drawn, instance.drawn_evenly = instance.memory.get, lambda: range(len(gradients))
    instance.loss_gradient = lambda rows, weights=None: {"w": torch.stack([gradients[i] for i in rows]).mean(0)}
    instance.adjust_gradients(None)
    return parameter.grad


@pytest.mark.parametrize("seed", range(20))
def test_the_projection_of_gem_is_that_of_a_qp_solver(seed):
    from scipy.optimize import minimize

    torch.manual_seed(seed)
    memory = list(torch.randn(1 + seed % 4, 12))
    if seed % 5 == 0:
        memory.append(memory[0].clone())  # two tasks with one gradient: the dual has no unique solution
    step = torch.randn(12)
    step *= 10.0 ** -(seed % 7)  # gradients of language models are small
    memory = [m * 10.0 ** -(seed % 7) for m in memory]
    x = gem_step("gem", memory, step, gem_margin=0.0)
    scale = float(step.norm())
    M = torch.stack(memory).double().numpy() / scale
    g = step.double().numpy() / scale
    if (M @ g >= 0).all():
        assert torch.equal(x, step), "a gradient that does not conflict is left alone"
        return
    # The primal problem of the paper (equation 8): the nearest vector with no negative product.
    wanted = minimize(
        lambda z: ((z - g) ** 2).sum() / 2,
        g,
        jac=lambda z: z - g,
        constraints={"type": "ineq", "fun": lambda z: M @ z, "jac": lambda z: M},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    np.testing.assert_allclose(x.double().numpy() / scale, wanted.x, atol=2e-4)
    assert (M @ (x.double().numpy() / scale) > -1e-5).all()


def test_the_margin_of_gem_is_the_least_weight():
    from trainers.gem import solve_dual

    rng = np.random.default_rng(0)
    for _ in range(20):
        M, g = rng.normal(size=(3, 10)), rng.normal(size=10)
        P, c = M @ M.T, M @ g
        v = solve_dual(P, c, 0.5)
        assert (v >= 0.5).all()
        # Optimal: the slope is zero where v is free and not negative where it is at its bound.
        slope = P @ v + c
        assert (slope > -1e-8).all() and np.abs(slope[v > 0.5 + 1e-9]).max(initial=0) < 1e-8


@pytest.mark.parametrize("seed", range(10))
def test_agem_removes_only_the_conflicting_part_of_a_gradient(seed):
    torch.manual_seed(seed)
    memory, step = torch.randn(2, 8), torch.randn(8)
    mean = memory.mean(0)
    for g in (step, -step):
        x = gem_step("agem", list(memory), g)
        if g @ mean >= 0:
            assert torch.equal(x, g)
        else:
            assert abs(x @ mean) < 1e-5
            torch.testing.assert_close(x - g, -(g @ mean) / (mean @ mean) * mean)


def test_the_memory_gradient_is_the_loss_gradient_of_remembered_rows(options):
    def look(trainer, adjust):
        rows = trainer.drawn(next(iter(trainer.memory)))
        kept = {n: p.grad.clone() for n, p in trainer.trained().items()}
        found = trainer.loss_gradient(rows)
        assert same(kept, {n: p.grad for n, p in trainer.trained().items()}), "the step's own gradient is left alone"
        trainer.model.zero_grad()
        (batch,) = trainer.batches(rows, len(rows))
        trainer.model(**batch).loss.backward()
        for n, p in trainer.trained().items():
            torch.testing.assert_close(found[n], p.grad, rtol=1e-3, atol=1e-7)
            p.grad = kept[n]
        modes = []
        with trainer.model.register_forward_pre_hook(lambda model, *_: modes.append(model.training)):
            adjust(trainer.model)
        assert modes and all(modes), "with dropout, as the step's own"
        after = sum(float((found[n] * p.grad).sum()) for n, p in trainer.trained().items())
        assert after > -1e-4 * sum(float((g**2).sum()) for g in found.values()), "no step against the memory"
        return [trainer.tokenizer.decode(r["input_ids"]) for r in rows]

    texts = probe(options, "gem", 2, look, **EXACT, memory_rows=8)
    assert len(texts) == 8 and all("Stance:" in t for t in texts), "rows of the first task"


def test_the_memory_gradient_of_agem_weighs_all_tasks_equally(options):
    """The tasks have answers of 2 and of 180 tokens. Weighed by tokens, the long ones would decide alone."""

    def look(trainer, adjust):
        texts = [(f"Write about {i}. ", f"{i} is the number that this is about. " * 10) for i in range(12)]
        trainer.memory["long"] = trainer.text_dataset(texts)
        adjust(trainer.model)
        drawn = trainer.drawn_evenly()
        lengths = [sum(x != -100 for x in labels) for labels in drawn["labels"]]
        tasks = [trainer.loss_gradient(drawn.select(rows), weights="rows") for rows in (range(6), range(6, 12))]
        trainer.config.memory_batch_size = 13
        odd = [sum(x != -100 for x in labels) for labels in trainer.drawn_evenly()["labels"]]
        assert sorted([odd.count(2), odd.count(180)]) == [6, 7], "one row more of either, and not one less"
        return trainer.against[0], tasks, lengths

    changes = {**EXACT, "max_answer_length": 180, "learning_rate": 1e-3, "memory_rows": 12, "memory_batch_size": 12}
    memory, (short, long), lengths = probe(options, "agem", 2, look, **changes)
    assert lengths == [2] * 6 + [180] * 6, "as many rows of each"
    for name, gradient in memory.items():
        torch.testing.assert_close(gradient, (short[name] + long[name]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_stages_that_do_not_reach_the_whole_memory_draw_different_rows_of_it(name, options):
    trainer, config = method(name)
    drawn: dict[str, list[tuple[int, list]]] = {}

    class Spy(trainer):
        def drawn(self, task, size=None):
            rows = super().drawn(task, size)
            drawn.setdefault(task, []).append(
                (self.stage.index, [self.memory[task]["input_ids"].index(r) for r in rows["input_ids"]])
            )
            return rows

    changes = {**EXACT, "memory_rows": 16, "memory_batch_size": 4, "max_steps": 2}
    train(small(options, name, 3, **changes), as_method(Spy), config)
    first, second = map(dict, drawn.values())
    assert sorted(first) == [2, 3] and sorted(second) == [3]
    assert len(first[2]) == 4 and not set(first[3]) <= set(first[2]), "not those of the same step of the stage before"
    assert first[3] != second[3], "nor those of the other task"


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_the_step_of_the_optimizer_is_projected_too_if_the_option_is_set(name, options):
    from trainers.memory import dot

    trainer, config = method(name)
    free, bound, conflicts = [], [], []

    class Spy(trainer):
        def project(self, descent):
            start = {n: p.detach() + descent[n] for n, p in self.trained().items()}
            allowed = super().project(descent)
            for step, worst in ((descent, free), (allowed, bound)):
                worst.append(min(float(dot(m, step) / (dot(m, m) * dot(step, step)).sqrt()) for m in self.against))
            self.wanted = {n: start[n] - allowed[n] for n in start}
            return allowed

        def training_step(self, *args, **kwargs):
            self.reached()
            return super().training_step(*args, **kwargs)

        def end_stage(self):
            self.reached()
            conflicts.append(self.record()["projected_optimizer_steps"])

        def reached(self):
            for n, wanted in getattr(self, "wanted", {}).items():
                torch.testing.assert_close(self.trained()[n].detach(), wanted, rtol=0, atol=1e-6)

    changes = {**EXACT, "memory_rows": 8, "max_steps": 5, "learning_rate": 3e-2, "project_step": True}
    run = train(small(options, name, 3, **changes), as_method(Spy), config)
    assert len(free) == 10, "every step from the second task on"
    assert min(free) < -0.01, "Adam goes against the memory, after a gradient that does not"
    assert min(bound) > -1e-3 and sum(conflicts) == sum(f < 0 for f in free)
    assert max(b for f, b in zip(free, bound, strict=True) if f < 0) < 1e-3, "the nearest one, without a margin"
    assert read_json(run.stages[3].train_file)["projected_optimizer_steps"] == conflicts[2]


# --------------------------------------------------------------------------------------------------------------- OGD


@pytest.mark.parametrize(
    ("optimizer", "size", "lora"), [("sgd", 200, True), ("adamw_torch", 200, True), ("sgd", 3, False)]
)
def test_every_step_of_ogd_is_orthogonal_to_the_gradients_of_the_answers_logits(options, optimizer, size, lora):
    trainer, config = method("ogd")
    products, sizes = [], {}

    class Spy(trainer):
        def train(self, **kwargs):
            before = {n: p.detach().clone() for n, p in self.trained().items()}
            result = super().train(**kwargs)
            sizes[self.stage.index] = len(next(iter(self.basis.values()))) if self.basis else 0
            if self.basis:
                step = {n: (p.detach() - before[n]).double() for n, p in self.trained().items()}
                along = sum(self.basis[n].flatten(1).double() @ step[n].flatten() for n in step)
                products.append(float(along.abs().max()) / sum(float((s**2).sum()) for s in step.values()) ** 0.5)
                basis = sum(b.flatten(1).double() @ b.flatten(1).double().T for b in self.basis.values())
                torch.testing.assert_close(basis, torch.eye(len(basis), dtype=torch.float64), atol=1e-4, rtol=0)
            return result

        def end_stage(self):
            super().end_stage()
            state = load_file(self.stage.method_state / "state.safetensors")
            (batch,) = self.batches(self.train_dataset.select([0]))
            answer = batch["labels"][0, 1:] != -100
            logits, target = self.model(**batch).logits[0, :-1][answer], batch["labels"][0, 1:][answer]
            output = logits.gather(1, target[:, None]).mean()
            gradients = torch.autograd.grad(output, list(self.trained().values()))
            parts = {name: g.double() for name, g in zip(self.trained(), gradients, strict=True)}
            inside = sum(state[n].flatten(1).double() @ part.flatten() for n, part in parts.items())
            whole = float(sum(part.square().sum() for part in parts.values()))
            # If all directions are kept, the gradient of a remembered row lies in their span.
            assert size == 3 or float(inside.square().sum()) == pytest.approx(whole, rel=1e-3)

    kept = min(size, 4)
    changes = {**EXACT, "optim": optimizer, "learning_rate": 1e-2, "ogd_size": size, "train_rows": 4}
    run = train(small(options, "ogd", 3, use_peft=lora, **changes), as_method(Spy), config)
    assert sizes == {1: 0, 2: kept, 3: 2 * kept}, "the bound is of each task, and four rows have four gradients"
    assert max(products) < 1e-4
    record = read_json(run.stages[3].train_file)
    assert record["directions"] == 2 * kept
    assert record["directions_bytes"] == 2 * kept * 4 * record["trainable_parameters"]


def test_ogd_refuses_a_size_that_does_not_fit_into_memory(options, monkeypatch, tmp_path):
    trainer, config = method("ogd")
    options = {**options, "max_steps": 1}
    # The size that the message names does fit.
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(ConfigError, match=r"ogd_rows=200 needs .* GiB are free") as refused:
        train(options, trainer, config)
    fits = int(re.search(r"--ogd_size (\d+) --ogd_rows \1\.", str(refused.value))[1])
    assert 0 < fits < 64
    assert train({**options, "ogd_size": fits, "ogd_rows": fits}, trainer, config).stages[2].is_trained
    with pytest.raises(ConfigError, match="GiB are free"):
        train({**options, "output_dir": f"{tmp_path}/b", "ogd_size": fits + 1, "ogd_rows": fits + 1}, trainer, config)
