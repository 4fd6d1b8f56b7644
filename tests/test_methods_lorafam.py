"""The family of O-LoRA: `inclora`, on which the others build, `olora`, `nlora`, `milora` and `inflora`."""

from itertools import product

import pytest
import torch
from architectures import make_base
from conftest import interrupted, load_merged, train
from method_runs import EXACT, LINEAR, SIDE_BY_SIDE, as_method, method, probe, same, small, unbuilt, weights
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from trace_bench.run import read_json
from trainers import inclora, inflora
from trainers.base import ConfigError


def saved(run) -> list[bytes]:
    return [(stage.checkpoint / "adapter_model.safetensors").read_bytes() for stage in run.stages[1:]]


def logits(base, checkpoint, rows) -> torch.Tensor:
    """The logits of the model that the evaluation would load, on token ids of equal length."""
    model = load_merged(base, checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.as_tensor(rows)).logits


def test_olora_and_nlora_without_their_penalties_equal_inclora_to_the_byte(options, tmp_path):
    options |= {"lora_dropout": 0.1}
    plain = train(small(options, "inclora", 3), *method("inclora"))
    for name, strength in product(("olora", "nlora"), (0.0, 0.5)):
        changes = {f"{name}_lambda": strength, "output_dir": str(tmp_path / f"{name} {strength}")}
        run = train(small(options, name, 3, **changes), *method(name))
        assert (saved(run) == saved(plain)) == (strength == 0), name
    config = read_json(plain.stages[3].checkpoint / "adapter_config.json")
    assert config["r"] == 3 * 4 and config["lora_dropout"] == 0, "the next stage trains with all of it"
    for stage in (2, 3):
        old, new = weights(plain, stage - 1), weights(plain, stage)
        for key, tensor in new.items():
            earlier = tensor[:-4] if "lora_A" in key else tensor[:, :-4]
            assert torch.equal(earlier, old[key]) and tensor.shape != old[key].shape, "the earlier adapters are frozen"


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
@pytest.mark.parametrize("layers", [["q_proj", "embed_tokens"], "all-linear"], ids=["embeddings", "experts"])
def test_layers_whose_adapters_cannot_be_joined_are_refused(layers, name, options, tmp_path):
    """PEFT adapts experts as parameters, even under all-linear."""
    changes, words = {"lora_target_modules": layers}, "embed_tokens is not a linear layer"
    if layers == "all-linear":
        changes |= {**EXACT, "model_name_or_path": str(make_base("qwen3_moe", tmp_path / "base"))}
        words = "mlp.experts is not a linear layer"
    with pytest.raises(ConfigError, match=words):
        train(small(options, name, **changes), *method(name))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3_moe"])  # Conv1D, experts; others: test_architectures.py
@pytest.mark.parametrize("name", ["milora", "inflora"])
def test_the_saved_adapter_is_the_trained_one_in_other_architectures(name, architecture, options, tmp_path):
    trainer, config = method(name)
    base, ids = make_base(architecture, tmp_path / "base"), torch.arange(3, 60)[None]
    plain, pairs = logits(base, None, ids), []

    class Spy(trainer):
        def now(self):
            with torch.no_grad():
                return self.model.eval()(ids).logits

        def begin_stage(self):
            super().begin_stage()
            pairs.append((self.now(), self.previous.checkpoint))

        def end_stage(self):
            super().end_stage()
            pairs.append((self.now(), None))

        def save_checkpoint(self):
            pairs[-1] = pairs[-1][0], super().save_checkpoint()
            return pairs[-1][1]

    changes = {**EXACT, "model_name_or_path": str(base), "learning_rate": 1e-3}
    changes["lora_target_modules"] = ["q_proj", "k_proj"] if "moe" in architecture else "all-linear"
    train(small(options, name, **changes), as_method(Spy), config)
    assert len(pairs) == 4
    for found, checkpoint in pairs:
        torch.testing.assert_close(found, logits(base, checkpoint, ids), rtol=1e-3, atol=1e-3)
    assert (pairs[-1][0] - plain).abs().max() > 0.05


# ------------------------------------------------------------------------------------------------------------- N-LoRA


def nlora_gradients(a: torch.Tensor, b: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients that the method adds to two factors."""
    instance = unbuilt("nlora", nlora_lambda=strength)
    pair = torch.nn.Parameter(a), torch.nn.Parameter(b)
    for p in pair:
        p.grad = torch.zeros_like(p)
    instance.factors = lambda: [pair]
    instance.adjust_gradients(None)
    return pair[0].grad, pair[1].grad


def test_the_gradient_of_the_l1_norm_equals_that_by_hand():
    # B A = [[2, -3, 0], [-4, 6, 0]]: with S = [[1, -1, 0], [-1, 1, 0]], B^T S = [[3, -3, 0]] and S A^T = [[5], [-5]].
    a, b = torch.tensor([[2.0, -3.0, 0.0]]), torch.tensor([[1.0], [-2.0]])
    of_a, of_b = nlora_gradients(a, b, 0.5)
    assert of_a.tolist() == [[1.5, -1.5, 0.0]] and of_b.tolist() == [[2.5], [-2.5]]
    assert not any(g.any() for g in nlora_gradients(a, torch.zeros(2, 1), 0.5)), "none where B A is zero"
    torch.manual_seed(0)
    a, b = torch.randn(4, 16), torch.randn(24, 4)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    wanted = torch.autograd.grad((leaves[1] @ leaves[0]).abs().sum(), leaves)
    for found, gradient in zip(nlora_gradients(a, b, 1.0), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def test_the_default_weight_of_nlora_matches_the_official_norm_at_its_model():
    d, r = 1024, 8
    torch.manual_seed(0)
    a, b = (torch.rand(r, d) * 2 - 1) / d**0.5, torch.randn(d, r)
    official = (a @ b).sign()  # r x r
    found = nlora_gradients(a, b, method("nlora")[1](output_dir="x").nlora_lambda)
    for ours, theirs in zip(found, (official @ b.T, a.T @ official), strict=True):
        assert float(ours.norm()) == pytest.approx(0.4 * float(theirs.norm()), rel=0.1)


def test_nlora_makes_the_new_adapter_sparse_at_every_task(options, tmp_path):
    norms = []
    for strength in (0.0, 0.004, 0.4):
        changes = {**EXACT, "nlora_lambda": strength, "output_dir": str(tmp_path / str(strength)), "max_steps": 6}
        run = train(small(options, "nlora", **changes, learning_rate=1e-3), *method("nlora"))
        norms.append([read_json(stage.train_file)["l1_norm"] for stage in run.stages[1:]])
    for task in range(2):
        plain, default, strong = (norm[task] for norm in norms)
        assert default < 0.7 * plain and strong < 0.1 * plain


# ------------------------------------------------------------------------------------------------------------- MiLoRA


@pytest.mark.parametrize("rslora", [False, True])
def test_milora_starts_in_minor_directions_as_the_base_model_and_saves_an_adapter_of_it(options, rslora):
    trainer, config = method("milora")
    base, ids = options["model_name_or_path"], torch.arange(3, 90)[None]
    plain = logits(base, None, ids)
    states, ends = [], []

    class Spy(trainer):
        def look(self):
            return {n: p.detach().clone() for n, p in self.model.named_parameters()}

        def begin_stage(self):
            states.append(self.look())
            if self.stage.index > 1:
                return
            with torch.no_grad():
                start = self.model.eval()(ids).logits
            error = float((start - plain).abs().max() / plain.abs().max())
            assert error < 3e-6, f"the model of step 0 is the base model, to rounding: {error:.1e}"
            for layer in (m for m in self.model.modules() if isinstance(m, LoraLayer)):
                w = layer.get_base_layer().weight.detach()
                u, s, v = torch.linalg.svd(w, full_matrices=False)
                part = layer.get_delta_weight("default").detach()
                torch.testing.assert_close(part, u[:, -4:] @ s[-4:].diag() @ v[-4:], rtol=1e-3, atol=1e-6)
                a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
                torch.testing.assert_close(a @ a.T, b.T @ b, atol=1e-6, rtol=1e-3)  # as much of S in each
                assert (v[:-4] @ a.T).abs().max() < 1e-5 and (u[:, :-4].T @ b).abs().max() < 1e-5
                torch.testing.assert_close(layer.get_delta_weight("past"), -part)

        def end_stage(self):
            states.append(self.look())
            with torch.no_grad():
                ends.append(self.model.eval()(ids).logits)

    changes = {**EXACT, "use_rslora": rslora, "lora_target_modules": LINEAR}
    run = train(small(options, "milora", **changes), as_method(Spy), config)
    for (before, after), frozen in ((states[:2], True), (states[2:], True), (states[1:3], False)):
        for name, tensor in before.items():
            trained = ".default." in name
            assert torch.equal(tensor, after[name]) == (not trained or not frozen), name
    for stage, end in zip(run.stages[1:], ends, strict=True):
        record = read_json(stage.checkpoint / "adapter_config.json")
        assert record["r"] == 8, "the rank does not grow"
        assert record["lora_alpha"] / (record["r"] ** 0.5 if rslora else record["r"]) == 32 / (2 if rslora else 4)
        torch.testing.assert_close(logits(base, stage.checkpoint, ids), end, rtol=1e-4, atol=1e-5)
        assert (end - plain).abs().max() > 0.01, "and it was trained"


def test_milora_refuses_a_rank_above_that_of_a_weight(options):
    with pytest.raises(ConfigError, match=r"lora_r=129 .*q_proj has 128 singular directions. Use at most"):
        train(small(options, "milora", lora_r=129), *method("milora"))


# ------------------------------------------------------------------------------------------------------------ InfLoRA


def test_the_directions_of_inputs_equal_those_by_hand():
    energy = torch.diag(torch.tensor([1.0, 8.0, 0.0, 1.0]))
    none, known = energy[:0], torch.eye(4)[1:2]
    values, directions = inflora.outside(energy, none)
    assert values.tolist() == [8, 1, 1, 0] and directions[0].tolist() == [0, 1, 0, 0]
    for share, many in ((0.0, 0), (0.7, 1), (0.8, 1), (0.85, 2), (0.9, 2), (0.95, 3), (1.0, 3)):
        assert len(inflora.principal(energy, none, share)) == many
        assert len(inflora.principal(energy, known, share)) == max(0, many - 1), "what is known counts"
    _, directions = inflora.outside(energy, known)
    assert directions.shape == (3, 4) and not (directions @ known.T).any()
    _, directions = inflora.outside(torch.zeros(4, 4), known)
    assert not (directions @ known.T).any(), "also where no input has energy"
    assert inflora.outside(energy, torch.eye(4))[1].shape == (0, 4)


def test_the_energy_of_inputs_counts_all_tokens_and_no_padding(options):
    trainer, config = method("inflora")
    seen = []

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            found = {n: e for n, e in self.energies().items() if "layers.0.self_attn" in n}
            model, total, texts = self.model.get_base_model().model, 0, self.task_dataset(self.stage.task)
            assert len({len(ids) for ids in texts["input_ids"]}) > 1
            with torch.no_grad():
                for ids in texts["input_ids"]:
                    x = model.layers[0].input_layernorm(model.embed_tokens(torch.tensor(ids)))
                    total = total + x.T @ x
            for energy in found.values():
                torch.testing.assert_close(energy, total, rtol=1e-4, atol=1e-3)
            seen.append(len(found))

    train(small(options, "inflora", 1, **EXACT, max_prompt_length=512), as_method(Spy), config)
    assert seen == [2], "q and v"


@pytest.mark.parametrize("threshold", [0.0, 0.95])
def test_the_a_of_inflora_is_orthogonal_to_earlier_inputs_and_does_not_move(threshold, options):
    trainer, config = method("inflora")
    begun = {}

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            begun[self.stage.index] = {n: layer.lora_A["default"].weight.clone() for n, layer in self.layers.items()}
            assert all("lora_B.default" in n for n in self.trained())
            for name, a in begun[self.stage.index].items():
                torch.testing.assert_close(a @ a.T, torch.eye(4) / 3, atol=1e-5, rtol=0)
                if self.memory:
                    assert float((self.memory[name] @ a.T).abs().sum()) < 1e-4
                else:
                    assert self.stage.index == 1

    changes = {**EXACT, "inflora_threshold": threshold, "lora_target_modules": LINEAR, "weight_decay": 0.1}
    run = train(small(options, "inflora", 3, **changes), as_method(Spy), config)
    for stage in (1, 2, 3):
        state = load_file(run.stages[stage].method_state / "state.safetensors")
        lengths = {len(m) for m in state.values()}
        if threshold == 0 and stage == 1:
            assert lengths == {0}, "the share of the first task"
        elif stage > 1:
            assert min(lengths) > 0
        for m in state.values():
            torch.testing.assert_close(m @ m.T, torch.eye(len(m)), atol=1e-5, rtol=0)
        tensors = weights(run, stage)
        for name, a in begun[stage].items():
            assert torch.equal(tensors[f"{name}.lora_A.weight"][-4:], a), "not by a bit"
            assert tensors[f"{name}.lora_B.weight"][:, -4:].any()
    shares = [read_json(run.stages[i].train_file)["memory_share"] for i in (1, 2, 3)]
    assert shares == sorted(shares) and shares[-1][1] <= 1


def test_the_inputs_that_inflora_remembers_do_not_depend_on_the_batch(options, tmp_path):
    """OPT's feed-forward layers get the positions of a batch as one list, with padding."""
    sums = []

    class Spy(inflora.InfLoRATrainer):
        def end_stage(self):
            super().end_stage()
            sums.append(self.energies())

    base = make_base("opt", tmp_path / "opt")
    changes = {**EXACT, "model_name_or_path": str(base), "lora_target_modules": ["q_proj", "fc1"]}
    for rows in (8, 1):
        changes |= {
            "per_device_train_batch_size": rows,
            "max_prompt_length": 400,
            "output_dir": str(tmp_path / str(rows)),
        }
        train(small(options, "inflora", 1, **changes, learning_rate=0.0), as_method(Spy), method("inflora")[1])
    for name, energy in sums[0].items():
        torch.testing.assert_close(energy, sums[1][name], rtol=1e-3, atol=1e-2 * float(energy.abs().mean()))


def test_inflora_changes_nothing_on_fully_remembered_rows(options, tmp_path):
    """The threshold is 1, and the inputs do not fill the space. So each layer is unchanged, and so is the model."""
    changes = {**EXACT, "train_rows": 3, "max_prompt_length": 6, "max_steps": 10, "lora_target_modules": LINEAR}
    base, moved = options["model_name_or_path"], {}
    for name, own in (("inflora", {"inflora_threshold": 1.0}), ("inclora", {})):
        trainer, config = method(name)
        rows = {}

        class Spy(trainer):
            def begin_stage(self, rows=rows):
                super().begin_stage()
                rows[self.stage.index] = [ids[:8] for ids in self.train_dataset["input_ids"]]

        run = train(small(options, name, **changes, **own, output_dir=str(tmp_path / name)), as_method(Spy), config)
        for task in (1, 2):
            first, second = (logits(base, run.stages[stage].checkpoint, rows[task]) for stage in (1, 2))
            moved[name, task] = float((first - second).abs().max())
    assert moved["inclora", 1] > 0.1 and moved["inclora", 2] > 0.1
    assert moved["inflora", 2] > 0.1, "the new task is learned"
    assert moved["inflora", 1] < 1e-2 * moved["inflora", 2], moved


def test_inflora_resumes_a_stage_with_its_initial_a(options, tmp_path, monkeypatch):
    """This also holds if the eigenvectors have a different sign, as on a different device."""
    trainer, config = method("inflora")
    options = small(options, "inflora", 1, save_strategy="steps", save_steps=1, max_steps=4)
    whole = train({**options, "output_dir": str(tmp_path / "whole")}, trainer, config)
    with pytest.raises(KeyboardInterrupt):
        train(options, interrupted(trainer, 2, stage=1), config)
    real = inflora.outside
    monkeypatch.setattr(inflora, "outside", lambda *args: (real(*args)[0], -real(*args)[1]))
    run = train(options, trainer, config)
    assert same(weights(run, 1), weights(whole, 1))


def test_missing_free_directions_of_inflora_are_rows_of_zeros(options):
    """Two of four directions are left: the other half of the adapter is zero and learns nothing."""
    trainer, config = method("inflora")

    class Spy(trainer):
        def end_stage(self):
            super().end_stage()
            if self.stage.index == 1:
                self.save_state({name: torch.eye(128)[:126] for name in self.layers})

    run = train(small(options, "inflora", **EXACT), as_method(Spy), config)
    tensors = weights(run, 2)
    assert tensors
    for name, tensor in tensors.items():
        own = tensor[4:] if "lora_A" in name else tensor[:, 4:].T
        assert own[:2].any() and not own[2:].any()
        if "lora_A" in name:
            assert not own[:, :126].any()
    assert inclora.PAST not in "".join(tensors), "PEFT's own names alone"


# ------------------------------------------------------------------------------------------------------------ O-LoRA


@pytest.mark.parametrize("rslora", [False, True])
def test_olora_adds_an_adapter_in_its_own_subspace_to_frozen_adapters(options, rslora):
    trainer, config = method("olora")
    begins, logits = {}, []

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            begins[self.stage.index] = {n: p.detach().clone() for n, p in self.trained().items() if "lora_A" in n}

        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.stage.index == 3 and not logits:
                checkpoint = self.run.stages[2].checkpoint
                before = load_merged(options["model_name_or_path"], checkpoint, dtype=torch.float32)
                with torch.no_grad():
                    logits.extend(self.answer_logits(m, inputs)[0] for m in (model, before))
            return super().training_step(model, inputs, num_items_in_batch)

    changes = {**EXACT, "use_rslora": rslora, "lora_target_modules": LINEAR}
    run = train(small(options, "olora", 3, **changes), as_method(Spy), config)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)  # a stage begins as the merged model before
    for name, a in begins[1].items():
        # Random subspaces of this size share no direction.
        assert torch.linalg.matrix_rank(torch.cat([a, begins[2][name]])) == 2 * len(a)
    for stage in (2, 3):
        saved = read_json(run.stages[stage].checkpoint / "adapter_config.json")
        # PEFT keeps the names in a set, whose order differs between processes.
        assert saved["target_modules"] == sorted(LINEAR) and saved["r"] == 4 * stage
        # PEFT's factor on the product stays the same.
        assert saved["lora_alpha"] / (saved["r"] ** 0.5 if rslora else saved["r"]) == 32 / (2 if rslora else 4)
        assert read_json(run.stages[stage].train_file)["orthogonality_loss"] > 0
        old, new = weights(run, stage - 1), weights(run, stage)
        for name, tensor in new.items():
            before, own = (tensor[:-4], tensor[-4:]) if "lora_A" in name else (tensor[:, :-4], tensor[:, -4:])
            assert torch.equal(before, old[name]), "the earlier adapters are frozen"
            assert own.shape[0 if "lora_A" in name else 1] == 4


def test_the_orthogonality_loss_of_olora_is_that_of_the_paper(options):
    def look(trainer, adjust):
        loss = trainer.orthogonality_loss()
        before = {n: p.grad.clone() for n, p in trainer.trained().items()}
        adjust(trainer.model)
        added = {n: p.grad - before[n] for n, p in trainer.trained().items()}
        for name, (past, new) in trainer.pairs().items():
            leaf = new.detach().clone().requires_grad_()
            (wanted,) = torch.autograd.grad((past.detach() @ leaf.T).abs().sum(), leaf)
            torch.testing.assert_close(added.pop(name), wanted, rtol=1e-3, atol=1e-4)
        assert added and not any(g.any() for g in added.values()), "B is left alone"
        assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if ".past." in n)
        for past, new in trainer.pairs().values():  # rows of its own space: nothing overlaps
            new.data -= new.data @ torch.linalg.pinv(past.data) @ past.data
        return loss, trainer.orthogonality_loss()

    loss, orthogonal = probe(options, "olora", 2, look, **EXACT, olora_lambda=1.0)
    assert loss > 1 and orthogonal < 1e-3 * loss
