r"""MiLoRA: sequential training of an adapter that starts from the minor singular directions of each weight.

Wang et al. 2024 (arXiv 2406.09044): W = U S V^T, and of the r smallest singular values B_0 = U_r (S_r / s)^(1/2) and
A_0 = (S_r / s)^(1/2) V_r^T with s = lora_alpha / lora_r, so that s B_0 A_0 is the minor part W_m. The principal part
W - W_m is frozen; A and B are trained, and the model begins as it is. The paper has s = 1: `--lora_alpha` equal to
`--lora_r` (the official script; r is 32 and 64 there, dropout 0.05).

The method is for one task; here all tasks train the same A and B in turn, as `sequential` does.

No weight is changed: a frozen adapter of -s B_0 A_0 beside the trained one gives the same model, and W - W_m is never
rounded to the type of the weights. The outputs of both cancel at the start to the rounding of a sum (1e-6 of the
logits in float32). The checkpoint is an ordinary adapter for the base model itself, of rank 2 r: A_0 with -B_0, then A
with B. The next stage finds both there, so the SVD is done once. It costs two more products of rank r in each layer.

PEFT 0.21 has PiSSA (the principal directions) and MiCA (arXiv 2604.01694: B is the minor left directions and frozen),
but not MiLoRA. It needs LoRA on linear layers that have at least r singular values.

    python -m trainers.milora --config trainers/configs/quickstart.yaml --lora_r 32 --lora_alpha 32 \
        --output_dir runs/milora
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from trace_bench.engine import models
from trace_bench.run import Stage
from trainers.base import CLConfig, ConfigError, main
from trainers.inclora import NEW, PAST, IncLoRATrainer, adapted, train_new_alone


class MiLoRATrainer(IncLoRATrainer):
    """A stage that trains the minor part of each weight: a frozen adapter takes it away, a new one brings it back."""

    def stage_model(self, stage: Stage) -> Any:
        """The base model with both adapters: the trained one as the stage before left it."""
        model = self.trainable_model(None)
        layers = adapted(model)
        if self.previous.checkpoint is None:
            tensors = self.minor_parts(layers)
        else:
            models.refuse_pickle(self.previous.checkpoint)
            tensors = load_file(self.previous.checkpoint / "adapter_model.safetensors")
        config = copy.copy(model.peft_config[NEW])
        config.lora_dropout = 0.0  # the principal part sees whole inputs
        model.add_adapter(PAST, config)
        for adapter, half in ((PAST, 0), (NEW, 1)):
            own = {name: t.chunk(2, dim=0 if "lora_A" in name else 1)[half] for name, t in tensors.items()}
            set_peft_model_state_dict(model, own, adapter_name=adapter)
        train_new_alone(model)
        return model

    def minor_parts(self, layers: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A_0 twice and -B_0 and B_0 side by side, as a checkpoint has them."""
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            weight = layer.get_base_layer().weight.detach().to(self.config.device, torch.float32)
            u, s, v = torch.linalg.svd(weight.T if layer.fan_in_fan_out else weight, full_matrices=False)
            r = layer.r[NEW]
            if len(s) < r:
                raise ConfigError(
                    f"lora_r={r} is too large: {name} has {len(s)} singular directions. Use at most {len(s)}."
                )
            root = (s[-r:] / layer.scaling[NEW]).sqrt()
            a, b = root[:, None] * v[-r:], u[:, -r:] * root
            tensors |= {f"{name}.lora_A.weight": torch.cat([a, a]), f"{name}.lora_B.weight": torch.cat([-b, b], dim=1)}
        return tensors


if __name__ == "__main__":
    main(MiLoRATrainer, CLConfig)
