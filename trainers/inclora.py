r"""IncLoRA: each task learns a new adapter on top of the frozen ones of all earlier tasks, and nothing holds it back.

A baseline of Wang et al. 2023 (arXiv 2310.14152), whose method is `olora`: it is O-LoRA with \lambda_1 = 0. At task
t a weight is W + s \sum_{k<t} B_k A_k + s B_t A_t, s = lora_alpha / lora_r, and only A_t and B_t are trained. There is
nothing to set.

The checkpoint is one ordinary LoRA adapter: the A and B of all tasks side by side, so its rank grows by lora_r with
each stage and its product is the sum of the tasks' adapters. The next stage finds them there.

`olora`, `nlora`, `milora` and `inflora` are made of this file. It needs LoRA on linear layers,
not on embeddings or experts.

    python -m trainers.inclora --config trainers/configs/quickstart.yaml --output_dir runs/inclora
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from transformers import set_seed

from trace_bench.run import Stage
from trace_tasks.data.files import fresh_dir
from trainers.base import CLConfig, CLTrainer, ConfigError, main, refuse_shards, save_tensors, sort_names

#: PEFT's name for the adapter that is trained, and ours for the frozen one of all earlier tasks.
NEW, PAST = "default", "past"


class IncLoRATrainer(CLTrainer):
    """A stage with a new adapter in addition to the frozen adapter of all earlier stages."""

    saves_same_model = True

    @classmethod
    def prepare(cls, config: Any, model_args: Any) -> dict[str, Any]:
        """Refuses what is not plain LoRA, and shards."""
        if not model_args.use_peft:
            raise ConfigError("use_peft=false: this method trains LoRA adapters. Set use_peft=true.")
        for name in ("use_dora", "lora_modules_to_save", "lora_target_parameters"):
            if getattr(model_args, name):
                raise ConfigError(
                    f"{name}={getattr(model_args, name)}: adapters of this kind cannot be added. Leave it out."
                )
        refuse_shards(
            config, "this method concatenates whole adapters", "with gradient_checkpointing if memory is short"
        )
        return {}

    def stage_model(self, stage: Stage) -> Any:
        """The base model with the frozen adapter of the stage before and a new one."""
        # With the same random numbers at every stage each adapter would begin in the subspace of the first one.
        set_seed(self.config.seed + stage.index - 1)
        return self.with_new_adapter(self.previous.checkpoint)

    def with_new_adapter(self, checkpoint: Path | None) -> Any:
        """The base model with a new adapter, on top of the frozen one of a checkpoint (None = alone)."""
        model = self.trainable_model(None)
        adapted(model)
        if checkpoint is not None:
            model.load_adapter(str(checkpoint), adapter_name=PAST)
            train_new_alone(model)
        return model

    def save_checkpoint(self) -> Path:
        """Saves the earlier adapters and the new one as one, side by side."""
        target = self.stage.path / "adapter"
        model = self.model
        tensors = get_peft_model_state_dict(model, adapter_name=NEW)
        config = copy.copy(model.peft_config[NEW])
        if PAST in model.peft_config:
            past = get_peft_model_state_dict(model, adapter_name=PAST)
            tensors = {
                name: torch.cat([past[name], new], dim=0 if "lora_A" in name else 1) for name, new in tensors.items()
            }
            # The factor on the product, alpha / r (or alpha / sqrt(r)), stays what it was.
            times = (model.peft_config[PAST].r + config.r) / config.r
            alpha = config.lora_alpha * (times**0.5 if config.use_rslora else times)
            config.r += model.peft_config[PAST].r
            config.lora_alpha = round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
        config.inference_mode = True
        config.lora_dropout = 0.0  # of the next stage's frozen part; the new one has the run's own
        if self.is_world_process_zero():
            with fresh_dir(target) as folder:
                save_tensors(tensors, folder / "adapter_model.safetensors")
                config.save_pretrained(str(folder))
                sort_names(folder, config)
        return target


def adapted(model: Any) -> dict[str, Any]:
    """The layers with an adapter, by name.

    Raises:
        ConfigError: for layers in which A and B of several adapters cannot be put side by side.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if others := sorted(name for name, layer in layers.items() if not isinstance(layer, Linear)):
        raise ConfigError(
            f"lora_target_modules: {others[0]} is not a linear layer, but this method works only on linear layers. "
            "Name linear layers, such as q_proj and v_proj."
        )
    return layers


def train_new_alone(model: Any) -> None:
    """Switches both adapters on, the earlier one frozen."""
    model.base_model.set_adapter([NEW, PAST])
    for name, parameter in model.named_parameters():
        if f".{PAST}." in name:
            parameter.requires_grad_(False)


if __name__ == "__main__":
    main(IncLoRATrainer, CLConfig)
