r"""Merging: the checkpoint of a stage is an average of the weights that it trained and of earlier ones.

With \theta_t the weights that stage t has trained and \theta_0 the base, the checkpoint of stage t is (`merge`)

- "wise": (1 - \alpha) \bar\theta_{t-1} + \alpha \theta_t, with the checkpoint of the stage before or with the base
  (`merge_with`). WiSE-FT, Wortsman et al. 2021 (arXiv 2109.01903), \alpha = 0.5 as it recommends; for language models
  LM-Cocktail (arXiv 2311.13534).
- "average": the mean of \theta_1 .. \theta_t.
- "slao": SLAO, Qiao and Mahdavi 2025 (arXiv 2512.23017), for LoRA: \bar A_t = A_t, the newest one, and
  \bar B_t = \bar B_{t-1} + (B_t - \bar B_{t-1}) / \sqrt t. The next stage begins with B_t and with Q^T in place of A_t,
  where A_t^T = Q R and the diagonal of R is positive.
- "magmax": \theta_0 + \alpha times the largest of the task vectors \theta_k - \theta_0, k <= t, weight by weight.
  MagMax, Marczak et al. 2024 (arXiv 2407.06322), \alpha = 0.5 as in its code.
- "ties", "dare": \theta_0 + \alpha times the task vectors merged by PEFT, of each the largest 20 % (Yadav et al. 2023,
  arXiv 2306.01708) or a random tenth (Yu et al. 2023, arXiv 2311.03099), \alpha = 1.

`merge_start` says where the next stage begins: "merged" (the checkpoint), "unmerged" (\theta_t, kept in method_state)
or "base". The default is that of the sources: merged for wise and average, unmerged for slao and magmax, base for ties
and dare. What is evaluated is the merged model in any case.

With LoRA the products B A are merged, not A and B separately (except by slao); trace_bench/engine/averaging.py says
why, and `trace-bench merge` does the same. The merged adapter has the sum of the ranks, so wise and average are exact.
If the next stage trains the merged adapter, it is cut to lora_r. If this stage began with one, too, the cut loses at
most \alpha (1 - \alpha) |dB dA|, of second order in the change of the stage. train.json has the rank and the loss.

Differences: TIES trims the whole model at once, PEFT each tensor. SLAO replaces A_t by Q^T and not B_t by B_t R^T, so
the next stage does not begin with what stage t has learned; that is how the paper has it.

    python -m trainers.merge --config trainers/configs/quickstart.yaml --output_dir runs/merge
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trace_bench.engine.averaging import ALPHA, DENSITY, OF_VECTORS, Merge, between, merge_adapters, merge_models
from trace_bench.run import RunError, Stage
from trace_tasks.data.files import fresh_dir, remove, temporary_dir
from trainers.base import (
    CLConfig,
    CLTrainer,
    ConfigError,
    adapted_parameters,
    main,
    option,
    refuse_shards,
    save_tensors,
)

#: Where the next stage begins, by default.
START = {
    "wise": "merged",
    "average": "merged",
    "slao": "unmerged",
    "magmax": "unmerged",
    "ties": "base",
    "dare": "base",
}


@dataclass
class MergeConfig(CLConfig):
    """As CLConfig, and how stages are merged."""

    merge: str = option(
        "wise", "How the stages are merged.", choices=["wise", "average", "slao", "magmax", "ties", "dare"]
    )
    merge_with: str | None = option(
        None, "wise: merge with the stage before (the default) or the base.", choices=["before", "base"]
    )
    merge_start: str | None = option(
        None,
        "Weights from which the next stage starts; default: as in the method's paper or code.",
        choices=["merged", "unmerged", "base"],
    )
    merge_alpha: float | None = option(
        None, "Share of the new stage (wise, 0.5), or factor on the task vector (magmax 0.5, ties and dare 1).", least=0
    )
    merge_density: float | None = option(
        None, "Share of each task vector to keep; default: ties 0.2, dare 0.1.", above=0, most=1
    )
    merge_rank: int | None = option(
        None,
        "Largest rank of a merged adapter; default: lora_r if it is trained further, else the sum of the ranks.",
        least=1,
    )

    def __post_init__(self) -> None:
        """Refuses options that the merge does not use, and checkpoints that it needs to be dropped."""
        super().__post_init__()
        for name, users in (("with", ["wise"]), ("alpha", ALPHA), ("density", DENSITY)):
            value = getattr(self, f"merge_{name}")
            if value is not None and self.merge not in users:
                raise ConfigError(
                    f"merge_{name}={value}: only {', '.join(users)} uses it, not merge={self.merge}. Leave it out."
                )
        if self.merge == "slao" and self.merge_rank is not None:
            raise ConfigError(
                f"merge_rank={self.merge_rank}: merge=slao does not use it: its adapters keep lora_r. Leave it out."
            )
        if self.merge == "wise" and (self.merge_alpha or 0) > 1:
            raise ConfigError(f"merge_alpha={self.merge_alpha} is not allowed: with wise use a share of at most 1.")
        if self.merge in OF_VECTORS and self.keep != "all":
            raise ConfigError(
                f"keep={self.keep} removes stages, but {self.merge} needs the task vectors of all stages. Use keep=all."
            )

    @property
    def start(self) -> str:
        """Where the next stage begins."""
        return self.merge_start or START[self.merge]


class MergeTrainer(CLTrainer):
    """A stage whose checkpoint is merged; what it trained is in method_state where a later stage needs it."""

    config: MergeConfig

    @classmethod
    def prepare(cls, config: MergeConfig, model_args: Any) -> dict[str, Any]:
        """Refuses adapters that are no sum of products, and shards of full models."""
        for name in ("use_dora", "lora_modules_to_save", "lora_target_parameters"):
            if model_args.use_peft and getattr(model_args, name):
                raise ConfigError(
                    f"{name}={getattr(model_args, name)}: adapters of this kind cannot be merged. Leave it out."
                )
        if not model_args.use_peft:
            if config.merge == "slao" or config.merge_rank is not None:
                what = "merge=slao" if config.merge == "slao" else f"merge_rank={config.merge_rank}"
                raise ConfigError(f"{what} works only on LoRA adapters. Set use_peft=true.")
            refuse_shards(config, "merge loads the base model a second time", "with LoRA if memory is short")
        return {}

    def stage_model(self, stage: Stage) -> Any:
        """The base model, or that of the stage before: its checkpoint, or what it had trained."""
        before, start = self.previous, self.config.start
        if not before.index or start == "base":
            model = self.trainable_model(None)
            names = [name for name, p in model.named_parameters() if p.requires_grad and self.model_args.use_peft]
            odd = [name for name in names if ".lora_A." not in name and ".lora_B." not in name]
            if odd := odd + adapted_parameters(model):
                raise ConfigError(f"lora_target_modules: {odd[0]} is not a linear layer, so its LoRA cannot be merged.")
            return model
        model = self.trainable_model(before.checkpoint if start == "merged" else self.unmerged(before))
        if self.config.merge == "slao":
            for name, parameter in model.named_parameters():
                if ".lora_A." in name:
                    parameter.data = orthonormal(parameter.data)
        return model

    def unmerged(self, stage: Stage) -> Path:
        """What a stage has trained: an adapter or a model."""
        if not stage.method_state.is_dir():
            raise RunError(
                f"{stage.method_state} is missing, and stage {self.stage.name} cannot be trained without it. Restore "
                f"the folder, or train {stage.name} again (delete its train.json)."
            )
        return stage.method_state

    def save_checkpoint(self) -> Path:
        """Saves what was trained, and merges it with what was before."""
        target = super().save_checkpoint()
        self.merged: dict[str, Any] = {}
        if self.is_world_process_zero():
            own = self.stage.method_state
            remove(own)
            target.rename(own)
            with fresh_dir(target) as folder:
                self.merged = self.merge(own, folder)
            if self.config.start != "unmerged" and self.config.merge not in OF_VECTORS:
                remove(own)
        return target

    def merge(self, own: Path, folder: Path) -> dict[str, Any]:
        """Writes the checkpoint of the stage, of what it trained (`own`) and what was before."""
        c, before, t = self.config, self.previous, self.stage.index
        if c.merge == "slao":
            return self.slao(own, folder)
        how = Merge(c.merge, c.merge_alpha, c.merge_density, c.seed)
        sources = [own]
        if c.merge in OF_VECTORS:
            sources = [*map(self.unmerged, self.run.stages[1:t]), own]
        elif before.checkpoint is not None and c.merge_with != "base":
            sources = [before.checkpoint, own]
        if c.merge == "average":  # the checkpoint before is the mean of the t - 1 stages before
            how = Merge("wise", 1 / t)
        with_base = c.merge in OF_VECTORS or (c.merge == "wise" and len(sources) == 1)
        if self.model_args.use_peft:
            rank = self.model_args.lora_r if c.start == "merged" and c.merge_rank is None else c.merge_rank
            return merge_adapters(sources, folder, how, rank)
        if not with_base:
            return merge_models(sources, folder, how)
        with temporary_dir(self.stage.path, ".base.") as place:
            self.load_model(None).save_pretrained(place / "base")  # with the names that checkpoints have
            return merge_models(sources, folder, how, place / "base")

    def slao(self, own: Path, folder: Path) -> dict[str, Any]:
        """SLAO's average of the B; the A are the newest."""
        file, before = "adapter_model.safetensors", self.previous.checkpoint
        tensors = load_file(own / file)
        if before is not None:
            for name, old in load_file(before / file).items():
                if ".lora_B." in name:
                    tensors[name] = between(old, tensors[name], self.stage.index**-0.5)
        save_tensors(tensors, folder / file)
        (folder / "adapter_config.json").write_bytes((own / "adapter_config.json").read_bytes())
        return {"rank": self.model_args.lora_r, "lost": 0.0}

    def record(self) -> dict[str, Any]:
        """The rank of the merged adapter, and the share of the squared norm that it lacks."""
        return {"merged": {"start_of_next": self.config.start, **self.merged}}


def orthonormal(A: torch.Tensor) -> torch.Tensor:
    """The orthonormal rows that span those of A, each on the side of its own: Q^T, where A^T = Q R with R_ii > 0."""
    Q, R = torch.linalg.qr(A.T.float())
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T.contiguous().to(A.dtype)


if __name__ == "__main__":
    main(MergeTrainer, MergeConfig)
