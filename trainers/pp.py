r"""Progressive Prompts: the model is frozen, and each task learns a soft prompt in front of those of the earlier tasks.

Razdaibiedina et al. 2023 (arXiv 2301.12314): stage t trains n new vectors P_t; the input of the model is
[P_t, P_{t-1}, ..., P_1, x], the earlier prompts frozen (the order of the authors' and of the official TRACE code). P_t
starts from the embeddings of random tokens. n = 20 as in the official TRACE code (the authors' script: 10).

The checkpoint is an ordinary PEFT prompt-tuning adapter with all prompts so far. Its evaluation needs no task id, as
for every method here: all prompts are used for every task. (The paper knows the task of a test example and takes
P_k, ..., P_1 for task k, by which nothing can be forgotten. `cells: own` measures that: stage k on task k.)

`prompt_mlp` trains P_t = Q + MLP(Q), the residual reparametrisation of the paper with the MLP of the official TRACE
code (three layers, bottleneck twice the model's width there), which is gone from the checkpoint. Off by default, as in
the authors' script. In the official TRACE code Q begins with random tokens' embeddings divided by 100, and each task
goes on with that of the task before.

Of the options for adapters only `use_peft: true` is used, none of LoRA's. The paper's learning rate, 0.3, belongs to
T5, whose embeddings are far larger than those of today's decoders: take one for the embeddings of the model at hand.

vLLM serves such checkpoints with its engine argument enable_prompt_embeds, which the configuration sets.

    python -m trainers.pp --config trainers/configs/quickstart.yaml --output_dir runs/pp
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model

from trace_bench.engine import models
from trace_bench.run import Stage
from trainers.base import CLConfig, CLTrainer, ConfigError, main, option, refuse_shards


@dataclass
class PPConfig(CLConfig):
    """As CLConfig, and the size of the prompts."""

    prompt_tokens: int = option(20, "Number of virtual tokens of each task's prompt.", least=1)
    prompt_mlp: int = option(0, "Width of the residual MLP on a prompt in training; 0 = no MLP.", least=0)

    def __post_init__(self) -> None:
        """Prepares vLLM for soft prompts."""
        super().__post_init__()
        if self.prompt_mlp == 1:
            raise ConfigError(f"prompt_mlp={self.prompt_mlp} is not allowed: use 0 (none), or 2 or more.")
        if self.backend == "vllm":
            assert not isinstance(self.engine_args, str)  # HF has read it
            self.engine_args = {**(self.engine_args or {}), "enable_prompt_embeds": True}

    @property
    def virtual_tokens(self) -> int:
        """The prompts of all stages are in front of the last one's inputs."""
        return self.prompt_tokens * len(self.stages)


class Prompts(torch.nn.Module):
    """In the place of PEFT's table of virtual tokens: rows that are trained, in front of rows that are not.

    Args:
        new: What the new prompt starts from, of shape (tokens, width).
        earlier: The prompts of all earlier tasks, of shape (tokens, width).
        bottleneck: That of the MLP, or 0.
    """

    earlier: torch.Tensor

    def __init__(self, new: torch.Tensor, earlier: torch.Tensor, bottleneck: int) -> None:
        super().__init__()
        width = new.shape[1]
        self.embedding = torch.nn.Embedding.from_pretrained(new, freeze=False)  # the name that PEFT looks for
        self.register_buffer("earlier", earlier)
        self.mlp = bottleneck and torch.nn.Sequential(
            torch.nn.Linear(width, bottleneck),
            torch.nn.ReLU(),
            torch.nn.Linear(bottleneck, bottleneck // 2),
            torch.nn.Tanh(),
            torch.nn.Linear(bottleneck // 2, width),
        )

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The vectors of virtual tokens."""
        new = self.embedding.weight
        if self.mlp:
            new = new + self.mlp(new)
        return torch.cat([new, self.earlier])[indices]


class PPTrainer(CLTrainer):
    """A stage with a new prompt in front of the frozen ones of the stages before."""

    config: PPConfig

    @classmethod
    def prepare(cls, config: PPConfig, model_args: Any) -> dict[str, Any]:
        """Refuses what has no meaning for prompts, and shards, from which they would not be put together."""
        if not model_args.use_peft:
            raise ConfigError("use_peft=false: this method trains prompts, not the model. Set use_peft=true.")
        if config.padding_free:
            raise ConfigError(
                "padding_free=true joins rows, but each row needs the prompt in front of it. Leave it out."
            )
        refuse_shards(config, "soft prompts are saved as a whole", "since prompts are small")
        return {"trains": "prompts"}

    def stage_model(self, stage: Stage) -> Any:
        """The base model with the prompts of the stage before and a new one in front."""
        n = self.config.prompt_tokens
        model = self.with_prompt(n * stage.index)
        encoders: Any = model.prompt_encoder
        # Every stage draws from the same seed: of t times n random tokens the last n are new ones.
        new = encoders["default"].embedding.weight.detach()[-n:].clone()
        earlier = models.soft_prompt(self.previous.checkpoint)
        encoders["default"] = Prompts(new, new[:0] if earlier is None else earlier, self.config.prompt_mlp)
        return model

    def with_prompt(self, tokens: int) -> Any:
        """The base model with a soft prompt of random tokens' embeddings."""
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, prompt_tuning_init="SAMPLE_VOCAB")
        return get_peft_model(self.load_model(None), prompt)


if __name__ == "__main__":
    main(PPTrainer, PPConfig)
