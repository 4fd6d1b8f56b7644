r"""MIGU: after the first task, gradients only of the output units that the batch drives most.

Du et al. 2024 (arXiv 2406.17245, github.com/wenyudu/MIGU): tasks drive different output units of a linear layer. In
each step from the second task on, the absolute outputs of a unit are summed over the tokens of the step. Units whose
sum is below the `migu_quantile` of their layer have no gradient: their rows of the weight and entries of the bias. 0.7,
that of the authors' scripts for all benchmarks, trains three units of ten. The paper divides the sums of a layer by
their own sum, which changes no comparison within the layer, and is left out here as in the authors' code.

Layers are the linear ones of the blocks. With LoRA the outputs of A are its own. Those of B are the outputs of the
whole layer, with the frozen weight in it, as the authors' code can have it: those of B alone are zero where an adapter
begins. The authors' code can also add up groups of units; here each one is by itself. Padding drives nothing here.
Fused experts are no linear layers, and are trained as a whole. Without LoRA the authors' code also masks the head. With
LoRA its scripts mask nothing: they pass another name of the method than the step asks for.

The gradient alone is masked, as in the paper: with Adam a unit still moves by its momentum, and by weight decay.

    python -m trainers.migu --config trainers/configs/quickstart.yaml --output_dir runs/migu
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from trainers.base import CLConfig, CLTrainer, ConfigError, adapted_parameters, decoder_blocks, main, of_tokens, option


@dataclass
class MIGUConfig(CLConfig):
    """As CLConfig, and how many units are trained."""

    migu_quantile: float = option(
        0.7, "Units whose output is below this quantile of the layer get no gradient; 0 = train all.", least=0, most=1
    )


class MIGUTrainer(CLTrainer):
    """A stage whose gradients are those of the units that the rows of a step drive most."""

    config: MIGUConfig
    counters = ("masked",)
    #: The share of the units that was masked in the last step.
    masked = 0.0

    @classmethod
    def prepare(cls, config: MIGUConfig, model_args: Any) -> dict[str, Any]:
        """Refuses DoRA, whose magnitudes are no outputs of a layer of their own."""
        if model_args.use_dora:
            raise ConfigError("use_dora=true: MIGU can mask only the outputs of LoRA's own layers. Leave it out.")
        return {}

    def begin_stage(self) -> None:
        """Watches the outputs of all layers that are trained, from the second stage on."""
        if odd := adapted_parameters(self.model):
            raise ConfigError(
                f"lora_target_modules: MIGU cannot see the outputs of {odd[0]}. Name linear layers, such as q_proj and "
                "v_proj."
            )
        self.layers = trained_layers(self.model) if self.stage.index > 1 else {}
        self.driven: dict[torch.nn.Module, torch.Tensor] = {}
        for layer in self.layers:
            layer.register_forward_hook(self._see)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As any, with the tokens of the batch at hand: padding drives nothing."""
        self.real = inputs["attention_mask"].bool()
        return super().training_step(model, inputs, num_items_in_batch)

    def _see(self, layer: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        """Adds up what the tokens of a batch drive each unit of a layer to."""
        size = of_tokens(output.detach(), self.real).abs().float()
        self.driven[layer] = size.sum(0) + self.driven.get(layer, 0.0)

    def adjust_gradients(self, model: Any) -> None:
        """Takes the gradients of the other units away."""
        units = masked = 0
        for layer, parameters in self.layers.items():
            dim = 1 if isinstance(layer, Conv1D) else 0  # whose weight has its inputs first
            unseen = parameters[0].new_zeros(parameters[0].shape[dim], dtype=torch.float32)
            driven = self.accelerator.reduce(self.driven.get(layer, unseen), "sum")
            rest = driven < driven.quantile(self.config.migu_quantile)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(rest if parameter.dim() == 1 or dim else rest[:, None], 0.0)
            units, masked = units + len(rest), masked + int(rest.sum())
        self.masked = masked / max(units, 1)
        self.driven = {}

    def record(self) -> dict[str, Any]:
        """The share of the units that had no gradient in the last step."""
        return {"masked_units": self.masked}


def trained_layers(model: Any) -> dict[torch.nn.Module, list[torch.nn.Parameter]]:
    """The layers of the blocks whose outputs count, with the trained parameters of these outputs, the weight first."""
    modules = list(decoder_blocks(model).modules())
    adapted = {m: [b.weight for b in m.lora_B.values()] for m in modules if isinstance(m, LoraLayer)}
    with_outputs_of_another = {b for m in adapted for b in m.lora_B.values()}
    plain: dict[Any, list[Any]] = {
        m: [p for p in (m.weight, m.bias) if p is not None and p.requires_grad]
        for m in modules
        if isinstance(m, torch.nn.Linear | Conv1D) and m not in with_outputs_of_another
    }
    return {layer: parameters for layer, parameters in (adapted | plain).items() if parameters}


if __name__ == "__main__":
    main(MIGUTrainer, MIGUConfig)
