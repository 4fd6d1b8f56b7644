r"""SEEKR: `der`, and the attention heads that matter are held to how they attended right after the row's own task.

He et al. 2024 (arXiv 2411.06171, equation 13): the loss of `der`, and on replayed rows w times KL(A_old || A) of the
attention weights: the mean over the row's queries and a layer's selected heads, and then over the layers that have any.
At the end of a task a head's importance grows by its task sensitivity (the mean square of dLoss/dA, divided by the sum
over the layer's heads) times its forgettability (the mean square of what the stage changed A by), on the rows that are
kept. Of the `seekr_layers` layers with the largest sums the `seekr_heads` heads of the largest importance are taken.
The heads of a task's rows do not change later. The squares, the means and the defaults (24 layers, 128 heads, 100
queries, w = 1e3 with 1 % of the rows) are those of the published code, whose script keeps all queries; with 10 % the
paper has w = 1e2. A model with fewer layers or heads has all of its own.

State: that of `der`, and for each row (heads x queries x length) numbers of 2 bytes. That is much: 26 MB for a row of
1,000 tokens with the defaults, in the state of each later stage again.

Differences: those of `der`. Queries are drawn once from the whole row, never one twice. Forgettability is of all
queries. `seekr_weight: 0` is `der` with the same rows.

It needs `attn_implementation: eager`, since the other kernels do not return the weights, and a model whose layers all
have attention with the same number of heads. At the end of a stage it loads the model of the stage before.

    python -m trainers.seekr --config trainers/configs/quickstart.yaml --output_dir runs/seekr
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from trainers.base import ConfigError, causal_config, main, option, refuse_reentrant
from trainers.der import KEPT, DERConfig, DERTrainer


@dataclass
class SEEKRConfig(DERConfig):
    """As DERConfig, and the distillation of attention."""

    replay_ratio: float = option(0.01, "Share of each earlier task's rows to replay.", above=0, most=1)
    seekr_weight: float = option(1e3, "Weight of the distillation of attention.", least=0)
    seekr_layers: int = option(24, "Number of layers whose heads are distilled.", least=1)
    seekr_heads: int = option(128, "Number of distilled heads, over all these layers.", least=1)
    seekr_queries: int = option(100, "Number of positions of a row whose attention is kept.", least=1)


class SEEKRTrainer(DERTrainer):
    """A stage with the model's former outputs and attention on rows of earlier tasks."""

    config: SEEKRConfig
    on_cpu = ("attention",)

    @classmethod
    def prepare(cls, config: Any, model_args: Any) -> dict[str, Any]:
        """Refuses kernels that do not return the attention weights, and what they would be no measure with."""
        refuse_reentrant(config, "attention weights then have no gradient")
        model = causal_config(str(model_args.model_name_or_path), model_args, config.trust_remote_code)
        for name in ("attention_dropout", "attn_pdrop"):
            if getattr(model, name, 0.0):
                raise ConfigError(
                    f"{name}={getattr(model, name)} in the config.json of {model_args.model_name_or_path}: most "
                    f"changes of the attention would come from dropout. Use a copy of the model with {name} 0.0."
                )
        if model_args.attn_implementation != "eager":
            raise ConfigError(
                f"attn_implementation={model_args.attn_implementation}: seekr needs attention weights, and only eager "
                "returns them. Use attn_implementation: eager."
            )
        return super().prepare(config, model_args)

    def begin_stage(self) -> None:
        """Loads what is kept of earlier rows, and looks whether the model shows its attention at all."""
        super().begin_stage()
        rows: Any = self.train_dataset
        (batch,) = self.batches(rows.select([0]))
        self.model.eval()  # dropout would draw random numbers, and the stage be another than that of `der`
        with torch.no_grad():
            shapes = {weights.shape[:2] for weights in self.attention(self.model, batch)[0]}
        if len(shapes) != 1:
            raise ConfigError(
                "seekr needs a model with the same number of attention heads in each layer. Use der instead."
            )
        if self.said:
            _, queries, lengths = self.said["of_row"].long().cpu().T
            weights = self.said["heads"].shape[1] * queries * lengths
            #: Where the queries and the attention weights of each kept row end.
            self.parts = [queries.cumsum(0).tolist(), weights.cumsum(0).tolist()]

    @contextmanager
    def reading(self, model: Any) -> Iterator[list[tuple[torch.Tensor, ...]]]:
        """Collects the attention weights of each layer, (rows, heads, queries, keys), from a model's forward passes."""
        found: list[tuple[torch.Tensor, ...]] = []
        # Of the decoder: behind the whole model's forward, mixed precision has replaced them by copies.
        decoder = self.accelerator.unwrap_model(model).get_decoder()
        with decoder.register_forward_hook(
            lambda module, args, output: found.append(getattr(output, "attentions", None) or ())
        ):
            yield found

    def attention(self, model: Any, batch: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The attention weights of each layer for a batch, and the mean loss of its answer tokens."""
        batch = {name: value for name, value in batch.items() if name != KEPT} | {"output_attentions": True}
        with self.reading(model) as found, self.accelerator.autocast():
            logits, target = self.answer_logits(model, batch)
        return found[0], cross_entropy(logits, target)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """That of `der`, where the attention is read if the batch has replayed rows."""
        if not self.said or not (inputs[KEPT] >= 0).any():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.reading(model) as found:
            self.found = found
            inputs = {**inputs, "output_attentions": True}
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self.found = []  # the graph alone holds them until the backward pass
            return loss

    def distillation(self, logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """With that of the attention, the same for each answer token of a row."""
        rows = [(i, row) for i, row in enumerate(kept.tolist()) if row >= 0]
        of_rows = torch.stack([self.attention_divergence([a[i] for a in self.found[0]], row) for i, row in rows])
        lengths = self.said["lengths"][[row for _, row in rows]]
        return super().distillation(logits, kept) + self.config.seekr_weight * of_rows.repeat_interleave(lengths)

    def attention_divergence(self, weights: list[torch.Tensor], row: int) -> torch.Tensor:
        """KL(A_old || A) of a kept row, of the mean selected layer.

        Args:
            weights: The row's in each layer, (heads, queries, keys).
            row: Which kept row it is.
        """
        (q0, q1), (a0, a1) = ((ends[row - 1] if row else 0, ends[row]) for ends in self.parts)
        task, _, length = self.said["of_row"][row].tolist()
        heads, queries = self.said["heads"][task].long(), self.said["queries"][q0:q1].long()
        old = self.said["attention"][a0:a1].to(queries.device).float().view(len(heads), len(queries), length)
        old = old / old.sum(dim=-1, keepdim=True)  # in half precision the sum is not quite 1
        new = torch.stack([weights[layer][head, queries, :length] for layer, head in heads.tolist()]).float()
        # 0 log 0 is 0: a query does not see the keys after it.
        of_heads = (torch.xlogy(old, old) - old * new.clamp_min(1e-8).log()).sum(dim=-1).mean(dim=-1)
        layers = heads[:, 0].unique(return_inverse=True)[1]
        share = 1 / torch.bincount(layers)[layers].float()  # the mean over a layer's heads, then over the layers
        return (of_heads * share).sum() / share.sum()

    def said_of(self, rows: Dataset) -> dict[str, torch.Tensor]:
        """Selects the heads of the stage's own task, and adds how they attend to its rows."""
        said, c = super().said_of(rows), self.config
        importance = self.importance(rows)
        total = importance + (self.said["importance"].sum(dim=0).cpu() if self.said else 0)
        layers = total.sum(dim=1).topk(min(c.seekr_layers, len(total))).indices.sort().values
        best = total[layers].flatten().topk(min(c.seekr_heads, total[layers].numel())).indices.sort().values
        heads = torch.stack([layers[best // total.shape[1]], best % total.shape[1]], dim=1)
        random = torch.Generator().manual_seed(c.seed * 1_000_003 + self.stage.index)
        queries, attention, of_row = [], [], []
        for batch in self.batches(rows, 1):
            length = int(batch["attention_mask"].sum())
            queries.append(torch.randperm(length, generator=random)[: c.seekr_queries].sort().values)
            with torch.no_grad():
                weights = self.attention(self.model, batch)[0]
            for layer, head in heads.tolist():
                attention.append(weights[layer][0, head].cpu()[queries[-1], :length].half().flatten())
            of_row.append([self.stage.index - 1, len(queries[-1]), length])
        return said | {
            "importance": importance[None],
            "heads": heads[None].int(),
            "queries": torch.cat(queries).int(),
            "attention": torch.cat(attention),
            "of_row": torch.tensor(of_row, dtype=torch.int32),
        }

    def importance(self, rows: Dataset) -> torch.Tensor:
        """The task sensitivity of each head times its forgettability, (layers, heads)."""
        before = self.frozen_model(self.previous.checkpoint)
        # Adapters may be behind the attention of the first layer, which then has no gradient.
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output if output.requires_grad else output.requires_grad_()
        )
        sensitivity = change = torch.zeros((), device=self.accelerator.device)
        for batch in self.batches(rows, 1):
            weights, loss = self.attention(self.model, batch)
            with torch.no_grad():
                old, _ = self.attention(before, batch)
            gradients = torch.autograd.grad(loss, weights)
            sensitivity = sensitivity + torch.stack([g.float().square().mean(dim=(0, 2, 3)) for g in gradients])
            differences = [a.detach().float() - b.float() for a, b in zip(weights, old, strict=True)]
            change = change + torch.stack([d.square().mean(dim=(0, 2, 3)) for d in differences]) / len(rows)
        hook.remove()
        return (sensitivity / sensitivity.sum(dim=1, keepdim=True).clamp_min(1e-30) * change).cpu()

    def record(self) -> dict[str, Any]:
        """As `der`, and the heads that were selected at the end of the stage, as [layer, head]."""
        return super().record() | {"heads": self.said["heads"][-1].tolist()}


if __name__ == "__main__":
    main(SEEKRTrainer, SEEKRConfig)
