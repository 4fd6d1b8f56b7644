"""Losses and gradients of a stage: of the training itself, and of other rows, as methods need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from trl import ModelConfig, SFTTrainer

from trainers.base.blocks import adapted_parameters
from trainers.base.config import CLConfig, ConfigError


class GradientTrainer(SFTTrainer):
    """TRL's trainer with a loss in which rows weigh the same, and gradients on any rows."""

    config: CLConfig
    model_args: ModelConfig
    model: Any
    #: Extra columns of the training set that batches keep: one integer a row, -1 for rows without a value.
    columns: ClassVar[tuple[str, ...]] = ()
    _signature_columns: Any
    #: Whether a training step computes its loss, which has to be divided by the items of the step.
    _in_step = False

    def _set_signature_columns_if_needed(self) -> None:
        """HF's hook: the columns that reach the collator."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.columns if name not in self._signature_columns]

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def model_with(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
        """The model with other values of the trained parameters and without dropout, for passes without gradients."""
        trained, training = self.trained(), self.model.training
        own = {name: parameter.data for name, parameter in trained.items()}
        try:
            for name, parameter in trained.items():
                parameter.data = tensors[name].to(parameter.dtype)
            yield self.model.eval()
        finally:
            for name, parameter in trained.items():
                parameter.data = own[name]
            self.model.train(training)

    def answer_logits(self, model: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The float32 logits that predict a batch's answer tokens, shape (tokens, vocabulary), and these tokens.

        The LM head is computed at answer positions only. At all positions, with a vocabulary of 50,000 words, it would
        take most of the time of a step when answers are short.
        """
        target = inputs["labels"][:, 1:]
        answer = target != -100

        def at_answers(head: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            # The state before a token predicts it. The states of a soft prompt come first and are skipped.
            return (args[0][:, -answer.shape[1] - 1 : -1][answer],)

        # Rows are padded on the right, where a causal model never looks, so no mask is needed. Without a mask the
        # attention kernels skip future positions instead of computing and masking them.
        kept = {k: v for k, v in inputs.items() if k not in ("labels", "attention_mask", *self.columns)}
        if self.aux_loss_enabled:  # the router's loss needs the mask to leave padding out
            kept |= {"attention_mask": inputs["attention_mask"], "output_router_logits": True}
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with head.register_forward_pre_hook(at_answers):
            output = model(**kept, use_cache=False)
        #: The router's loss of a mixture of experts for this batch, weighted as in TRL.
        self.router_loss = self.router_aux_loss_coef * output.aux_loss if self.aux_loss_enabled else 0.0
        return output.logits.float(), target[answer]

    def weighted(self, losses: torch.Tensor, inputs: Any, weights: str | None = None) -> tuple[torch.Tensor, int]:
        """The weighted sum of a batch's token losses, and the number of items to divide by.

        To average over several batches, divide the sum of their sums by the sum of their items.

        Args:
            losses: The loss of each answer token, in the order of `answer_logits`.
            inputs: The batch, with labels.
            weights: "rows" (sum of the rows' mean losses; items = rows) or "tokens" (sum of all losses; items =
                tokens); None = the run's `loss_weights`.
        """
        lengths = (inputs["labels"][:, 1:] != -100).sum(dim=1)
        if (weights or self.config.loss_weights) == "tokens":
            return losses.sum(), len(losses)
        return (losses / lengths.repeat_interleave(lengths)).sum(), int((lengths > 0).sum())

    def step_loss(self, losses: torch.Tensor, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """The loss of a micro-batch from the losses of its answer tokens.

        It is divided by the items of the whole optimizer step, so the gradient does not depend on how the rows of the
        step are split.
        """
        self._check_items(num_items_in_batch)
        total, items = self.weighted(losses, inputs)
        loss = total / (items if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes; the items are those of all
        return loss

    def _check_items(self, items: Any) -> None:
        """Refuses a loss of a training step that is divided by the items of its micro-batch alone.

        Raises:
            ConfigError: since the gradient would grow with the number of micro-batches.
        """
        if items is None and self._in_step and self.current_gradient_accumulation_steps > 1:
            raise ConfigError(
                "The method's compute_loss does not hand on num_items_in_batch, so gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps} would multiply the gradient. Hand it on to "
                "super().compute_loss, whole_loss or step_loss."
            )

    def whole_loss(self, losses: torch.Tensor, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """`step_loss` plus the router's loss of the last `answer_logits`. Counts the batch's tokens as trained."""
        self.count_tokens(model, inputs)
        loss = self.step_loss(losses, inputs, num_items_in_batch)
        return loss + self.router_loss / self.current_gradient_accumulation_steps

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss by rows; by tokens it is TRL's own on a GPU, and ours on a CPU.

        Ours computes the LM head at answer positions only. TRL's fused head does so on GPUs, but not on CPUs.
        """
        rows = self.config.loss_weights == "rows"
        plain = self.config.loss_type == "nll" and not (self.label_smoother or self.aux_loss_enabled)
        if return_outputs or not (rows or (self.args.use_cpu and plain)):
            self._check_items(num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits, target = self.answer_logits(model, inputs)
        return self.whole_loss(cross_entropy(logits, target, reduction="none"), model, inputs, num_items_in_batch)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """HF's batches of an optimizer step, and the number that their loss is divided by: answer tokens or rows."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.config.loss_weights == "rows" and samples:
            items = sum((batch["labels"][:, 1:] != -100).any(dim=1).sum() for batch in samples).to(device)  # type: ignore[union-attr]
            if self.args.average_tokens_across_devices:
                items = self.accelerator.gather(items).sum()
        return samples, items

    def count_tokens(self, model: Any, inputs: Any) -> None:
        """Adds a batch's tokens to the count of trained tokens, as TRL's `compute_loss` does."""
        if model.training:
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())

    def batches(self, rows: Dataset, size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Rows as batches on the device, in order."""
        size = size or self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            yield {k: v.to(self.accelerator.device) for k, v in batch.items()}

    def own_share(self, rows: Dataset) -> Dataset:
        """The rows of this process when all processes share a computation."""
        return rows.select(range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))

    def loss_gradient(self, rows: Dataset, weights: str | None = None) -> dict[str, torch.Tensor]:
        """The gradient of the task loss on `rows`; `parameter.grad` is not changed.

        Each process computes its share of the rows, and all get the same sum. This is faster, and processes cannot
        drift apart by different rounding.
        """
        parameters = self.trained()
        tokens = (weights or self.config.loss_weights) == "tokens"
        items = sum(label != -100 for labels in rows["labels"] for label in labels) if tokens else len(rows)
        gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for batch in self.batches(self.own_share(rows)):
            with self.compute_loss_context_manager():
                logits, target = self.answer_logits(self.model, batch)
                loss = self.weighted(cross_entropy(logits, target, reduction="none"), batch, weights)[0] / items
                loss = loss + self.router_loss * len(batch["input_ids"]) / len(rows)
            parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, part in zip(parameters, parts, strict=True):
                if part is not None:
                    gradient[name] += part
        # `reduce` would copy the gradient of a single process, too.
        return self.accelerator.reduce(gradient, "sum") if self.accelerator.num_processes > 1 else gradient

    def row_gradients(
        self, rows: Dataset, value: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradient of `value`, summed over a row's answer tokens, for each row; `parameter.grad` is not changed.

        If only linear layers are trained, such as LoRA's, one pass serves all rows of a batch: a row's gradient of a
        weight is the product of the layer's inputs and the gradients of its outputs at the row's positions. Otherwise
        each row takes a pass.

        Args:
            rows: The rows of this process; nothing is exchanged.
            value: (logits, targets, answer lengths), each per answer token -> a value per answer token.

        Yields:
            A parameter's name and its gradients for the rows of a batch, shape (rows, *parameter); short rows first.
        """
        parameters = self.trained()
        modules = dict(self.model.named_modules())
        layers = {name: modules[name.removesuffix(".weight")] for name in parameters if name.endswith(".weight")}
        # A trained head sees answer positions only, MoE layers call no module of the adapter. Gradient checkpointing
        # has no effect in evaluation mode: a run that needs it may have no memory for more than one row.
        unusual = self.model_args.lora_modules_to_save or adapted_parameters(self.model)
        linear = all(isinstance(layer, torch.nn.Linear) for layer in layers.values())
        if len(layers) < len(parameters) or not linear or unusual or self.args.gradient_checkpointing:
            layers = {}
        lengths = [len(ids) for ids in rows["input_ids"]]
        rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
        if layers and len(rows) and not self._see_rows(layers, rows.select([0])):
            layers = {}
        for batch in self.batches(rows, None if layers else 1):
            with self._seeing(layers) as seen, self.compute_loss_context_manager():
                logits, target = self.answer_logits(self.model, batch)
            answers = (batch["labels"][:, 1:] != -100).sum(dim=1)
            total = value(logits, target, answers.repeat_interleave(answers)).sum()
            if layers:
                gradients = torch.autograd.grad(total, [output for [(_, output)] in seen.values()])
                for (name, [(inputs, _)]), gradient in zip(seen.items(), gradients, strict=True):
                    yield name, gradient.float().transpose(1, 2) @ inputs.detach().float()
            else:
                parts = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
                yield from zip(parameters, (part.float()[None] for part in parts), strict=True)

    @contextmanager
    def _seeing(self, layers: dict[str, Any]) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
        """Records the input and output of each call of some layers, by name."""
        seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

        def see(layer: Any, args: Any, output: torch.Tensor, *, name: str) -> None:
            seen.setdefault(name, []).append((args[0], output))

        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.enter_context(layer.register_forward_hook(partial(see, name=name)))
            yield seen

    @torch.no_grad()
    def _see_rows(self, layers: dict[str, Any], row: Dataset) -> bool:
        """Whether each layer is called once, with a batch of shape (rows, positions, features), and not flattened."""
        (batch,) = self.batches(row)
        with self._seeing(layers) as seen, self.compute_loss_context_manager():
            self.answer_logits(self.model, batch)
        return all(len(calls) == 1 and calls[0][1].dim() == 3 for calls in seen.values())


def of_tokens(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A layer's inputs or outputs at the tokens of a batch, without padding: (tokens, features).

    Args:
        states: Shape (rows, positions, features), or flattened to (positions, features); or only the states of some
            tokens, as experts have them, which are returned unchanged.
        real: True at the positions that are tokens, shape (rows, positions).
    """
    states = states.flatten(0, -2)
    return states[real.flatten().to(states.device)] if len(states) == real.numel() else states


def divergences(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) at each position, from logits of shape (tokens, vocabulary)."""
    model, reference = log_softmax(logits, dim=-1), log_softmax(reference, dim=-1)
    return kl_div(model, reference, reduction="none", log_target=True).sum(dim=-1)


def with_columns(
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]], columns: tuple[str, ...], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """A batch with `GradientTrainer.columns`, which TRL's collator leaves out."""
    return {**collate(examples), **{c: torch.tensor([example.get(c, -1) for example in examples]) for c in columns}}
