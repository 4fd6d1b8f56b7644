r"""O-LoRA: each task learns its own adapter, in a subspace orthogonal to those of the earlier ones.

Wang et al. 2023 (arXiv 2310.14152): the adapters of earlier tasks are frozen and stay active; the new one is trained
with \lambda_1 \sum_{k<t} \sum_{ij} |(A_k A_t^T)_{ij}| added to the loss, \lambda_1 = 0.5: the form and the weight of
the method's published code and of the official TRACE code (the paper's formula has squares, not absolute values).

The checkpoint is one ordinary LoRA adapter: the A and B of all tasks side by side, so its rank grows by lora_r with
each stage and its product is the sum of the tasks' adapters. The next stage finds the A_k there.

    python -m trainers.olora --config trainers/configs/quickstart.yaml --output_dir runs/olora
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers import set_seed

from trace_bench.run import Stage
from trace_tasks.data.files import fresh_dir
from trainers.base import CLConfig, CLTrainer, ConfigError, main, option, save_tensors, sort_names

#: PEFT's name for the adapter that is trained, and ours for the frozen one of all earlier tasks.
NEW, PAST = "default", "past"


@dataclass
class OLoRAConfig(CLConfig):
    """As CLConfig, and the strength of the orthogonality."""

    olora_lambda: float = option(0.5, "Weight of the orthogonality loss.", least=0)


class OLoRATrainer(CLTrainer):
    """A stage with an adapter of its own beside the frozen one of all earlier stages."""

    config: OLoRAConfig

    @classmethod
    def prepare(cls, config: OLoRAConfig, model_args: Any) -> dict[str, Any]:
        """Refuses what is not plain LoRA."""
        if not model_args.use_peft:
            raise ConfigError("use_peft=false: O-LoRA trains LoRA adapters; set use_peft=true.")
        for name in ("use_dora", "lora_modules_to_save"):
            if getattr(model_args, name):
                raise ConfigError(f"{name}={getattr(model_args, name)}: adapters of this kind cannot be added up.")
        return {}

    def stage_model(self, stage: Stage) -> Any:
        """The base model with the frozen adapter of the stage before and a new one."""
        # With the same random numbers at every stage each adapter would begin in the subspace of the first one.
        set_seed(self.config.seed + stage.index - 1)
        model = self.trainable_model(None)
        if self.previous.checkpoint is not None:
            model.load_adapter(str(self.previous.checkpoint), adapter_name=PAST)
            model.base_model.set_adapter([NEW, PAST])
            for name, parameter in model.named_parameters():
                if f".{PAST}." in name:
                    parameter.requires_grad_(False)
        return model

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.nn.Parameter]]:
        """The A of all earlier tasks and the new one, shapes (rank, in features), by the name of the latter."""
        parameters = dict(self.model.named_parameters())
        return {
            name: (parameters[name.replace(f".{NEW}.", f".{PAST}.")], parameter)
            for name, parameter in parameters.items()
            if f"lora_A.{NEW}." in name and name.replace(f".{NEW}.", f".{PAST}.") in parameters
        }

    def orthogonality_loss(self) -> float:
        """The sum of the absolute products of new and earlier rows of A: 0 where the subspaces are orthogonal."""
        return sum(float((past @ new.detach().T).abs().sum()) for past, new in self.pairs().values())

    def adjust_gradients(self, model: Any) -> None:
        """Adds the gradient of the orthogonality loss."""
        for past, new in self.pairs().values():
            if new.grad is not None:
                # d/dA_t of sum |A_k A_t^T|
                new.grad.add_((past @ new.detach().T).sign().T @ past, alpha=self.config.olora_lambda)

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
            tasks = 1 + model.peft_config[PAST].r // config.r
            config.r *= tasks
            config.lora_alpha *= tasks**0.5 if config.use_rslora else tasks
        config.inference_mode = True
        config.lora_dropout = 0.0  # of the next stage's frozen part; the new one has the run's own
        if self.is_world_process_zero():
            with fresh_dir(target) as folder:
                save_tensors(tensors, folder / "adapter_model.safetensors")
                config.save_pretrained(str(folder))
                sort_names(folder, config)
        return target

    def record(self) -> dict[str, Any]:
        """The orthogonality loss at the end of the stage."""
        return {"orthogonality_loss": self.orthogonality_loss()}


if __name__ == "__main__":
    main(OLoRATrainer, OLoRAConfig)
