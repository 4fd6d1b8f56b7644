r"""HFT (half fine-tuning): each stage trains a random half of the matrices, and freezes the others.

Hui et al. 2024 (arXiv 2404.18466), the selection "by category", which the paper finds best on TRACE: in each block two
of the four matrices of the attention are frozen; of the three of the feed-forward network two in a random half of the
blocks and one in the other half; and half of the norms. The embeddings, the head and the last norm are trained. Each
stage draws another half, from the seed and its number: all processes draw the same.

The categories are taken from descriptions of the paper (github.com/gucci-j/ssu and a reader's notes), not from the
paper or its code.

The rule here is the same for every architecture: the matrices of one module of a block (self_attn, mlp, one expert) are
a category, and so are the norms and other vectors of the block. A bias goes with its matrix. Of an odd category the
larger part is frozen in half of the blocks. Where a model joins matrices (GPT-2's c_attn, the experts of a layer) they
count as one, so that the frozen share of the parameters can differ from a half: train.json has it.

LoRA is refused: the paper has HFT in its place, as a way to train the model's own matrices.

    python -m trainers.hft --config trainers/configs/quickstart.yaml --use_peft false --learning_rate 1e-5 \
        --output_dir runs/hft
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from trace_bench.run import Stage
from trainers.base import CLConfig, CLTrainer, ConfigError, count, decoder_blocks, main, shape

#: The category of norms and other vectors.
_VECTORS = "vectors"


class HFTTrainer(CLTrainer):
    """A stage that trains half of the matrices, and freezes the others."""

    @classmethod
    def prepare(cls, config: CLConfig, model_args: Any) -> dict[str, Any]:
        """Refuses LoRA."""
        if model_args.use_peft:
            raise ConfigError(
                "use_peft=true: HFT trains half of the model's own matrices instead of LoRA. Set use_peft=false."
            )
        return {}

    def stage_model(self, stage: Stage) -> Any:
        """The model of the stage before, half of it no longer trainable."""
        model = super().stage_model(stage)
        blocks = decoder_blocks(model)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + stage.index)
        for parameter in frozen_half(blocks, generator):
            parameter.requires_grad_(False)
        parameters = list(blocks.parameters())
        self.frozen_share = count(p for p in parameters if not p.requires_grad) / count(parameters)
        return model

    def record(self) -> dict[str, Any]:
        """The share of the blocks' parameters that was frozen."""
        return {"frozen_share": self.frozen_share}


def categories(block: torch.nn.Module) -> dict[str, list[list[torch.nn.Parameter]]]:
    """The matrices of a block by their module, and its vectors: each with its bias."""
    units: dict[str, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in block.named_parameters():
        units[name.removesuffix(".bias").removesuffix(".weight")].append(parameter)
    found: dict[str, list[list[torch.nn.Parameter]]] = defaultdict(list)
    for name, parameters in units.items():
        matrix = any(len(shape(p)) > 1 for p in parameters)
        found[name.rpartition(".")[0] if matrix else _VECTORS].append(parameters)
    return found


def frozen_half(blocks: torch.nn.ModuleList, generator: torch.Generator) -> list[torch.nn.Parameter]:
    """Draws half of each category of each block; of an odd one the larger part in half of the blocks."""

    def draw(items: list[Any], count: int) -> list[Any]:
        return [items[i] for i in torch.randperm(len(items), generator=generator)[:count].tolist()]

    parts = [categories(block) for block in blocks]
    frozen: list[torch.nn.Parameter] = []
    for name in sorted({name for part in parts for name in part}):
        units = [part[name] for part in parts if name in part]
        odd = [i for i, unit in enumerate(units) if len(unit) % 2]
        larger = draw(odd, len(odd) // 2)
        for i, unit in enumerate(units):
            for parameters in draw(unit, len(unit) // 2 + (i in larger)):
                frozen += parameters
    return frozen


if __name__ == "__main__":
    main(HFTTrainer, CLConfig)
