"""Losses and gradients of a stage: of the training itself, and of other rows, as methods need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from trl import ModelConfig, SFTTrainer

from trainers.base.blocks import adapted_parameters
from trainers.base.config import CLConfig


class GradientTrainer(SFTTrainer):
    """TRL's trainer with a loss in which rows weigh the same, and gradients on any rows."""

    config: CLConfig
    model_args: ModelConfig
    model: Any
    #: Columns of the training set with a whole number for each row, which batches have, too; rows without one have -1.
    columns: ClassVar[tuple[str, ...]] = ()
    _signature_columns: Any

    def _set_signature_columns_if_needed(self) -> None:
        """HF's: the columns that it leaves to the collator."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.columns if name not in self._signature_columns]

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def model_with(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
        """The model with other values of the trained parameters, and without dropout; for passes without gradients."""
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

        The LM head is computed at answer positions only: over a vocabulary of 50,000 words it would take most of the
        time of a step when answers are short.
        """
        target = inputs["labels"][:, 1:]
        answer = target != -100

        def at_answers(head: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            # The state before a token predicts it. A soft prompt has states of its own in front.
            return (args[0][:, -answer.shape[1] - 1 : -1][answer],)

        # Rows are padded on the right, where a causal model never looks: without a mask the attention kernels leave
        # the future out instead of computing and masking it.
        kept = {k: v for k, v in inputs.items() if k not in ("labels", "attention_mask", *self.columns)}
        if self.aux_loss_enabled:  # which needs the mask to leave padding out
            kept |= {"attention_mask": inputs["attention_mask"], "output_router_logits": True}
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hook = head.register_forward_pre_hook(at_answers)
        try:
            output = model(**kept, use_cache=False)
        finally:
            hook.remove()
        #: What a mixture of experts adds to the loss of a batch, as TRL takes it.
        self.router_loss = self.router_aux_loss_coef * output.aux_loss if self.aux_loss_enabled else 0.0
        return output.logits.float(), target[answer]

    def weighted(self, losses: torch.Tensor, inputs: Any, weights: str | None = None) -> tuple[torch.Tensor, int]:
        """The weighted sum of a batch's losses, and its items: a sum over batches is divided by the items of all.

        Args:
            losses: Of each answer token, in the order of `answer_logits`.
            inputs: The batch, with labels.
            weights: "rows" (the rows' means are summed) or "tokens" (all losses are); None = the run's.
        """
        lengths = (inputs["labels"][:, 1:] != -100).sum(dim=1)
        if (weights or self.config.loss_weights) == "tokens":
            return losses.sum(), len(losses)
        return (losses / lengths.repeat_interleave(lengths)).sum(), int((lengths > 0).sum())

    def step_loss(self, losses: torch.Tensor, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """The loss of a micro-batch, of the losses of its answer tokens.

        It is divided by the items of the whole optimizer step: the gradient does not depend on how its rows are split.
        """
        total, items = self.weighted(losses, inputs)
        loss = total / (items if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes what was divided by all
        return loss

    def whole_loss(self, losses: torch.Tensor, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """`step_loss` with the router's of a mixture of experts, as it was in the last `answer_logits`.

        The tokens of the batch are counted as trained.
        """
        self.count_tokens(model, inputs)
        loss = self.step_loss(losses, inputs, num_items_in_batch)
        return loss + self.router_loss / self.current_gradient_accumulation_steps

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, its rows or tokens weighing the same; TRL's own by tokens on a GPU.

        Ours computes the LM head at answer positions only. So does TRL's fused head on GPUs, but not on CPUs.
        """
        rows = self.config.loss_weights == "rows"
        plain = self.config.loss_type == "nll" and not (self.label_smoother or self.aux_loss_enabled)
        if return_outputs or not (rows or (self.args.use_cpu and plain)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits, target = self.answer_logits(model, inputs)
        return self.whole_loss(cross_entropy(logits, target, reduction="none"), model, inputs, num_items_in_batch)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """HF's batches of an optimizer step, and what its loss is divided by: the answer tokens, or the rows."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.config.loss_weights == "rows" and samples:
            items = sum((batch["labels"][:, 1:] != -100).any(dim=1).sum() for batch in samples).to(device)  # type: ignore[union-attr]
            if self.args.average_tokens_across_devices:
                items = self.accelerator.gather(items).sum()
        return samples, items

    def count_tokens(self, model: Any, inputs: Any) -> None:
        """Adds a batch to the tokens that were trained, as TRL's own `compute_loss` does."""
        if model.training:
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())

    def batches(self, rows: Dataset, size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Rows as batches on the device, in order."""
        size = size or self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            yield {k: v.to(self.accelerator.device) for k, v in batch.items()}

    def own_share(self, rows: Dataset) -> Dataset:
        """The rows that this process works on when all processes share a computation."""
        return rows.select(range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))

    def loss_gradient(self, rows: Dataset, weights: str | None = None) -> dict[str, torch.Tensor]:
        """The gradient of the task loss on `rows`; the gradient that is being accumulated stays as it is.

        Each process computes its share of the rows, and all get the sum: it is faster, and the processes cannot drift
        apart by the rounding of kernels that sum in a different order each time.
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
        # A reduction copies the gradient, even of a single process.
        return self.accelerator.reduce(gradient, "sum") if self.accelerator.num_processes > 1 else gradient

    def row_gradients(
        self, rows: Dataset, value: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradient of each row's own sum over its answer tokens; the accumulated gradient stays as it is.

        Where linear layers alone are trained, such as LoRA's, one pass for the rows of a batch is enough: a row's
        gradient of a weight is the product of the layer's inputs and of the gradients of its outputs, both at the row's
        positions. Otherwise each row takes a pass.

        Args:
            rows: What this process works on; nothing is exchanged.
            value: (logits, targets, length of the token's answer) of answer tokens -> what is summed over them.

        Yields:
            A parameter's name and its gradients for the rows of a batch, the shortest rows first: (rows, *parameter).
        """
        parameters = self.trained()
        modules = dict(self.model.named_modules())
        layers = {name: modules[name.removesuffix(".weight")] for name in parameters if name.endswith(".weight")}
        # A head sees answer positions alone, MoE layers call no module of the adapter. Gradient checkpointing is off
        # here, as in all evaluation, so that there may be no room for more than a row.
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
        """Collects the inputs and outputs of layers, by name, at each of their calls."""
        seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

        def see(layer: Any, args: Any, output: torch.Tensor, *, name: str) -> None:
            seen.setdefault(name, []).append((args[0], output))

        hooks = [layer.register_forward_hook(partial(see, name=name)) for name, layer in layers.items()]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _see_rows(self, layers: dict[str, Any], row: Dataset) -> bool:
        """Whether layers are called once at most, with the positions of a batch by row: some see them in one list."""
        (batch,) = self.batches(row)
        with self._seeing(layers) as seen, self.compute_loss_context_manager():
            self.answer_logits(self.model, batch)
        return all(len(calls) == 1 and calls[0][1].dim() == 3 for calls in seen.values())


def of_tokens(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """What a layer sees or says at the tokens of a batch, without padding: (tokens, features).

    Args:
        states: By row and position, or all in one list, as some layers have them; or of some tokens, as experts do.
        real: Which positions of the rows are tokens.
    """
    states = states.flatten(0, -2)
    return states[real.flatten().to(states.device)] if len(states) == real.numel() else states


def divergences(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) of each position, from logits of shape (tokens, vocabulary)."""
    model, reference = log_softmax(logits, dim=-1), log_softmax(reference, dim=-1)
    return kl_div(model, reference, reduction="none", log_target=True).sum(dim=-1)


def with_columns(
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]], columns: tuple[str, ...], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    """A batch with `GradientTrainer.columns`, which TRL's collator leaves out."""
    return {**collate(examples), **{c: torch.tensor([example.get(c, -1) for example in examples]) for c in columns}}
