r"""OSF: full fine-tuning inside the singular subspace of each weight that earlier tasks depend on least.

Nayak et al. 2025, "Sculpting Subspaces" (arXiv 2504.07097), through PEFT's own OSF tuner. At the start of each stage
every linear weight is decomposed, W = U_high S_high V_high + U_low S_low V_low. The top k singular directions are kept
as they are; U_low, S_low and V_low are trained, their gradients projected: U_high^T dU_low = 0, dV_low V_high^T = 0. At
the end the parts are added up again: the checkpoint is an ordinary model, and the next stage decomposes it again.

k grows with the stages: stage t of T preserves (t - 1)/T of the directions, at least one (the budget of PEFT's
documentation of OSF, "Budget Allocation for Task Sequences": 0, 1/n, ..., (n - 1)/n).

What is promised: with plain SGD, U_high^T W and W V_high^T are after a stage what they were before it, to rounding.
Under Adam, which PEFT's documentation uses as well, the gradient is projected but the step is rescaled element by
element: on the tests' model a fifth of the change of a weight (by norm) touches the preserved half, against 0.7 of a
free change. Only U_high, S_high and V_high themselves never change.

Deviations: the paper gives each layer its own k by the similarity of its input and output; PEFT has one fraction for
all (so has the authors' code, of the longer side of each weight and set by hand). Embeddings, head and norms are not
trained, nor the experts of a mixture, which are no layers of their own. The decomposition takes float32, and the parts
memory: at the first stage those of a square weight are four times as large as it is (U_low, V_low and what they started
from), and half of them have gradients and moments. PEFT advises learning rates of 1e-5 to 1e-4.

    python -m trainers.osf --config trainers/configs/quickstart.yaml --use_peft false --learning_rate 1e-4 \
        --output_dir runs/osf
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import OSFConfig as Tuner
from peft import get_peft_model

from trace_bench.run import Stage
from trainers.base import CLConfig, CLTrainer, ConfigError, main, option, refuse_shards


@dataclass
class OSFConfig(CLConfig):
    """As CLConfig, and how much is preserved."""

    osf_preserved: float | None = option(
        None,
        "Fraction of each weight's singular directions that every stage preserves; default: (t-1)/T, which grows.",
        above=0,
        below=1,
    )


class OSFTrainer(CLTrainer):
    """A stage that trains the lower singular directions of the weights as the stage before left them."""

    config: OSFConfig
    saves_same_model = True

    @classmethod
    def prepare(cls, config: OSFConfig, model_args: Any) -> dict[str, Any]:
        """Refuses LoRA and shards."""
        if model_args.use_peft:
            raise ConfigError("use_peft=true: OSF trains the model's own weights. Set use_peft=false.")
        refuse_shards(
            config, "OSF decomposes whole weights and projects whole gradients", "with a model that fits each GPU"
        )
        if model_args.dtype != "float32":
            raise ConfigError(
                f"dtype={model_args.dtype}: PEFT would replace the parameters and lose the projection of their "
                "gradients. Use dtype=float32 with bf16=true (autocast)."
            )
        return {}

    def stage_model(self, stage: Stage) -> Any:
        """The model of the stage before, its linear layers decomposed."""
        # Where it is trained: a GPU takes minutes for the decompositions of a model of 7B parameters, a CPU hours.
        model = self.load_model(self.previous.checkpoint).to(self.config.device)
        self.preserved = self.config.osf_preserved or (stage.index - 1) / len(self.config.stages)
        linear = {name: min(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        model = get_peft_model(
            model,
            Tuner(
                task_type="CAUSAL_LM",
                target_modules="all-linear",  # without the head
                # PEFT takes a fraction or a number, and refuses 0: of a layer with a few outputs one direction is kept.
                effective_rank=self.preserved or 1,
                rank_pattern={
                    f"^{re.escape(name)}$": 1 for name, size in linear.items() if not int(size * (self.preserved or 1))
                },
            ),
        )
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(
                f"{type(model.get_base_model()).__name__} has no linear layers that PEFT's OSF can decompose (GPT-2 "
                "has none). Use a different method or model."
            )
        return model

    def save_checkpoint(self) -> Path:
        """Saves the parts added up, as an ordinary model."""
        self.model = self.model.merge_and_unload()
        return super().save_checkpoint()

    def record(self) -> dict[str, Any]:
        """The fraction of the directions that was preserved."""
        return {"preserved": self.preserved}


if __name__ == "__main__":
    main(OSFTrainer, OSFConfig)
