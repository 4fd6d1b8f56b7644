"""Freeze: after the first task the embeddings and the lowest blocks do not move.

Zheng et al. 2025, "Spurious Forgetting in Continual Learning of Language Models" (arXiv 2501.13453): what looks like
forgetting is often a lost alignment to the task, which the first steps of a new task undo in the lowest layers. These
layers are frozen from the second task on; the first one trains all of them.

`freeze_layers` = 3: the authors' configs for TRACE (TRACE_task8/Freeze-3layers-task1.yaml, after the first task;
Freeze.yaml has the same layers) name the embeddings with the lowest 1, 2, 3 or 6 blocks. `freeze_from: 1` freezes
them from the first stage on. What their code freezes is more: all blocks whose names contain these, and "layers.1" is
also in those of the blocks 10 to 19. Of 32 blocks that is 1, 12, 23 and 28. Here it is the lowest blocks alone.

Differences from the authors' code, which sets the learning rate of the frozen parameters to 0 and trains all others:
here they have no gradient at all, so that they take no part in clipping, nor memory for moments. Position embeddings
are frozen, too. Where the head is tied to the embeddings, it is frozen with them. With LoRA, of which the paper has no
case, the frozen parameters are those of the adapter in these blocks and in the embeddings.

    python -m trainers.freeze --config trainers/configs/quickstart.yaml --output_dir runs/freeze
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trace_bench.run import Stage
from trainers.base import (
    CLConfig,
    CLTrainer,
    ConfigError,
    causal_config,
    count,
    decoder_blocks,
    empty_adapted,
    main,
    option,
    text_model,
)


@dataclass
class FreezeConfig(CLConfig):
    """As CLConfig, and what is frozen."""

    freeze_layers: int = option(3, "Number of lowest blocks to freeze; 0 = only the embeddings.", least=0)
    freeze_from: int = option(2, "The first stage in which they are frozen.", least=1)


class FreezeTrainer(CLTrainer):
    """A stage in which the embeddings and the lowest blocks are frozen."""

    config: FreezeConfig

    @classmethod
    def prepare(cls, config: FreezeConfig, model_args: Any) -> dict[str, Any]:
        """Refuses to freeze all trained parameters."""
        model = causal_config(str(model_args.model_name_or_path), model_args, config.trust_remote_code)
        blocks = model.get_text_config(decoder=True).num_hidden_layers
        if config.freeze_layers >= blocks:
            raise ConfigError(
                f"freeze_layers={config.freeze_layers}, but the model has {blocks} blocks. Use at most {blocks - 1}, "
                "so that at least one block is trained."
            )
        if model_args.use_peft and config.freeze_from <= len(config.stages):
            adapted = empty_adapted(config, model_args)
            if adapted is not None:
                freeze(adapted, config.freeze_layers)
                if not any(parameter.requires_grad for parameter in adapted.parameters()):
                    raise ConfigError(
                        f"freeze_layers={config.freeze_layers}: the whole adapter is in these blocks or the "
                        f"embeddings, so stage {config.freeze_from} would train nothing. Freeze fewer blocks, or name "
                        "layers above them in lora_target_modules."
                    )
        return {}

    def stage_model(self, stage: Stage) -> Any:
        """The model of the stage before; from `freeze_from` on its lowest part is no longer trainable."""
        model = super().stage_model(stage)
        before = count(p for p in model.parameters() if p.requires_grad)
        if stage.index >= self.config.freeze_from:
            freeze(model, self.config.freeze_layers)
        self.frozen = before - count(p for p in model.parameters() if p.requires_grad)
        return model

    def record(self) -> dict[str, Any]:
        """How many parameters were frozen that would have been trained."""
        return {"frozen_parameters": self.frozen}


def freeze(model: Any, layers: int) -> None:
    """Freezes the embeddings and the lowest blocks of a model, or the adapter in them."""
    decoder, blocks = text_model(model), decoder_blocks(model)
    tables = [module for module in decoder.modules() if isinstance(module, torch.nn.Embedding)]
    for module in (decoder.get_input_embeddings(), *tables, *blocks[:layers]):
        module.requires_grad_(False)


if __name__ == "__main__":
    main(FreezeTrainer, FreezeConfig)
