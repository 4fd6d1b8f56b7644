"""Methods that mask units or entries in each step: mofo, migu."""

import pytest
import torch
from accelerate import Accelerator
from conftest import train
from method_runs import EXACT, LINEAR, as_method, method, small, unbuilt, weights
from test_methods_freeze import empty
from transformers.pytorch_utils import Conv1D

from trace_bench.run import read_json
from trainers import migu, mofo

# --------------------------------------------------------------------------------------------------------------- mofo


def test_the_mask_of_mofo_has_the_largest_entries_of_a_tensor():
    values = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    assert mofo.largest(values, 0.5).tolist() == [[False, True], [True, False]]
    assert mofo.largest(values, 0.1).sum() == 1 and mofo.largest(values, 1.0).all()
    assert mofo.largest(torch.tensor([2.0, 2.0, 1.0]), 0.34).tolist() == [True, True, False], "equals move together"
    assert mofo.largest(torch.tensor([0.0, 3.0, 0.0, 0.0]), 0.5).sum() == 1, "no momentum, no move"
    assert mofo.largest(torch.zeros(3), 1.0).all(), "all is all"


@pytest.mark.parametrize("lora", [True, False])
def test_only_the_entries_with_the_largest_momentum_move(lora, options):
    trainer, config = method("mofo")
    seen = []

    class Spy(trainer):
        def after_step(self):
            before = {n: self.held[p] for n, p in self.trained().items() if p in self.held}
            vectors = {n: p.detach().clone() for n, p in self.trained().items() if n not in before}
            super().after_step()
            for n, p in self.trained().items():
                if n in before:
                    momentum = self.optimizer.state[p]["exp_avg"].abs().flatten()
                    count = max(1, int(0.1 * len(momentum)))
                    still = (p.detach() == before[n]).flatten()
                    least = momentum.sort(descending=True).values[count - 1]
                    assert still[momentum < least].all(), n
                    assert not still[(momentum >= least) & (momentum > 0)].any(), n
                    seen.append(count / len(momentum))
                else:
                    assert torch.equal(p.detach(), vectors[n])

    changes = {**EXACT, "use_peft": lora, "mofo_fraction": 0.1, "learning_rate": 1e-2, "max_steps": 3}
    run = train(small(options, "mofo", 2, **changes), as_method(Spy), config)
    assert seen
    record = read_json(run.stages[2].train_file)
    assert 0.09 < record["moved_share"] < (0.2 if lora else 0.11)


# --------------------------------------------------------------------------------------------------------------- migu


@pytest.mark.parametrize("lora", [True, False])
def test_the_least_active_units_of_a_batch_have_no_gradient_and_do_not_move(lora, options):
    """The reference is the outputs of single rows, without padding. The step has two unequal batches."""
    trainer, config = method("migu")
    checked = []

    class Spy(trainer):
        def adjust_gradients(self, model):
            before = {n: p.grad.clone() for n, p in self.trained().items()}
            super().adjust_gradients(model)
            if self.stage.index == 1:
                assert all(torch.equal(before[n], p.grad) for n, p in self.trained().items())
                return
            outputs = {}
            names = {f"{n}.weight" for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
            hooks = []
            for name, module in self.model.named_modules():
                own = not lora or "lora_A.default" in name
                weight = f"{name}.weight" if own else f"{name}.lora_B.default.weight"
                if weight in before and (not own or weight in names):
                    hook = lambda m, a, out, w=weight: outputs.setdefault(w, []).append(out[0].abs().sum(0))  # noqa: E731
                    hooks.append(module.register_forward_hook(hook))
            held = dict(self.driven)
            with torch.no_grad():
                for row in self.batches(self.train_dataset, 1):
                    self.real = row["attention_mask"].bool()
                    self.model(input_ids=row["input_ids"])
            self.driven = held
            for hook in hooks:
                hook.remove()
            for name, p in self.trained().items():
                if ".layers." not in name or name not in outputs:
                    assert torch.equal(p.grad, before[name]), name
                    continue
                driven = sum(outputs[name])
                rest = driven < driven.quantile(0.7)
                assert not p.grad[rest].any() and torch.equal(p.grad[~rest], before[name][~rest])
                checked.append((name, rest))

    changes = {**EXACT, "use_peft": lora, "train_rows": 8, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "lora_target_modules": LINEAR}
    run = train(small(options, "migu", 2, **changes), as_method(Spy), config)
    assert len(checked) == 14 * (1 + lora)
    before, after = weights(run, 1), weights(run, 2)
    for name, rest in checked:
        name = name.replace(".default", "")
        assert torch.equal(before[name][rest], after[name][rest])
        assert not torch.equal(before[name], after[name])
    assert read_json(run.stages[2].train_file)["masked_units"] == pytest.approx(0.7, abs=0.06)
    assert read_json(run.stages[1].train_file)["masked_units"] == 0


def test_migu_masks_the_last_dimension_in_gpt2():
    """Its weights have the inputs first. Biases are masked together with them."""
    layers = migu.trained_layers(empty("gpt2"))
    assert len(layers) == 8 and all(len(parameters) == 2 for parameters in layers.values())
    migu_trainer = unbuilt("migu", migu_quantile=0.5)
    layer = Conv1D(4, 3)
    migu_trainer.layers, migu_trainer.real = {layer: [layer.weight, layer.bias]}, torch.ones(1, 2, dtype=torch.bool)
    migu_trainer.accelerator, migu_trainer.driven = Accelerator(cpu=True), {}
    migu_trainer._see(layer, None, torch.tensor([[[1.0, -9.0, 2.0, 3.0], [1.0, 0.0, -2.0, 3.0]]]))
    layer.weight.grad, layer.bias.grad = torch.ones(3, 4), torch.ones(4)
    migu_trainer.adjust_gradients(None)
    assert layer.bias.grad.tolist() == [0.0, 1.0, 0.0, 1.0] and layer.weight.grad.tolist() == [[0.0, 1.0, 0.0, 1.0]] * 3


@pytest.mark.parametrize("flat", [False, True], ids=["batches", "flattened"])
def test_padding_does_not_count_in_layers_with_any_shape_of_tokens(flat):
    """OPT and mixtures of experts flatten a batch before some layers, and an expert gets only some of the tokens."""
    layer, one = torch.nn.Linear(2, 2), unbuilt("migu")
    one.real, one.driven = torch.tensor([[True, True, False], [True, False, False]]), {}
    output = torch.tensor([[[1.0, 2], [3, -4], [50, 60]], [[5, 6], [70, 80], [90, 100]]])
    one._see(layer, None, output.flatten(0, 1) if flat else output)
    assert one.driven[layer].tolist() == [9.0, 12.0]
    one._see(layer, None, torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    assert one.driven[layer].tolist() == [11.0, 14.0]
