r"""Elastic weight consolidation: parameters that mattered to earlier tasks are held back.

Kirkpatrick et al. 2017 (arXiv 1612.00796): when training task t, the penalty
\lambda/2 \sum_{k<t} \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2 is added to the loss, with \theta^*_k the parameters
after task k and F_k the diagonal of the Fisher information of the task's loss (without the penalty) at \theta^*_k.

F is the curvature of the loss that is minimised, so \lambda means the same for answers of any length. Let g be the
gradient of a row's log-likelihood, the sum over its n answer tokens. With `loss_weights: rows` F is the mean over rows
of g^2 / n; with `tokens` it is the sum over rows of g^2, divided by the number of all answer tokens. With \lambda = 1
the loss of each earlier task counts, to second order, as much as the present one: the paper's posterior for tasks of
equal size. The default \lambda = 400 is that of the paper's Atari experiments.

`ewc_fisher` chooses the labels for g. "empirical" takes those of the data; F then vanishes where the loss does (arXiv
2502.11756). "sampled" draws one label from the model at each answer position; the mean over draws is the true Fisher
information.

The penalty is on the trained parameters. With LoRA these are A and B, although the model depends on B A only: for any
invertible M, the factors M A and B M^-1 give the same model but a different penalty. Changes of A are weighed as if B
were fixed, and vice versa. While B is small, early in training, A looks free to move. A penalty on B A would need the
Fisher information of whole weights.

The default is the online variant (Schwarz et al. 2018, arXiv 1805.06370): one anchor, the newest parameters, and one
running sum F = \gamma F + F_k. `ewc_online: false` keeps an anchor for every task. In both cases the gradient of the
penalty is \lambda (P \theta - Q) with two tensors per parameter, so the memory does not grow with the tasks.

Differences: the official TRACE code also has \lambda = 400, but it squares the gradients of mini-batches during
training, including the penalty's, and divides their sum over all epochs by the batches of one epoch. The gradient of a
batch's mean is not a row's gradient, so that sum depends on the batch size.

    python -m trainers.ewc --config trainers/configs/quickstart.yaml --output_dir runs/ewc
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from trainers.base import CLConfig, CLTrainer, choose_rows, main, option


@dataclass
class EWCConfig(CLConfig):
    """CLConfig with the strength of the penalty."""

    ewc_lambda: float = option(400.0, "Weight of the penalty.", least=0)
    ewc_online: bool = option(True, "Keep one anchor and one running Fisher, not one of each per task.")
    ewc_gamma: float = option(1.0, "Share of the running Fisher to keep at each stage (online).", least=0, most=1)
    ewc_rows: int = option(256, "Number of training rows for the Fisher information.", least=1)
    ewc_fisher: str = option(
        "empirical",
        "Labels of the Fisher information: the data's, or sampled from the model.",
        choices=["empirical", "sampled"],
    )


class EWCTrainer(CLTrainer):
    """A stage with the penalty of the earlier stages.

    State, in float32, for each trained parameter: "P/<name>" = the sum of the Fisher information, and "Q/<name>" = the
    sum of Fisher information times anchor.
    """

    config: EWCConfig

    def begin_stage(self) -> None:
        """Loads the penalty."""
        self.state_tensors = self.load_state()

    def penalty_gradient(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient of the penalty at a parameter; zero at the anchor."""
        precision, pull = self.state_tensors[f"P/{name}"], self.state_tensors[f"Q/{name}"]
        return self.config.ewc_lambda * (precision * parameter.detach().float() - pull)

    def adjust_gradients(self, model: Any) -> None:
        """Adds the gradient of the penalty."""
        for name, parameter in self.trained().items() if self.state_tensors else ():
            if parameter.grad is not None:
                parameter.grad.add_(self.penalty_gradient(name, parameter).to(parameter.grad.dtype))

    def fisher(self) -> dict[str, torch.Tensor]:
        """The diagonal of the Fisher information at the present parameters, from rows of the stage's task."""
        assert self.stage.task is not None
        rows = choose_rows(self.task_dataset(self.stage.task), self.config.ewc_rows, "random", self.config.seed)
        self.model.eval()  # without dropout
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.trained().items()}
        generator = torch.Generator(self.accelerator.device)
        generator.manual_seed(self.config.seed * 1_000_003 + self.accelerator.process_index)
        by_tokens = self.config.loss_weights == "tokens"
        items = sum(label != -100 for labels in rows["labels"] for label in labels) if by_tokens else len(rows)

        def loss(logits: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            if self.config.ewc_fisher == "sampled":
                target = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            losses = cross_entropy(logits, target, reduction="none")
            return losses if by_tokens else losses / lengths.sqrt()

        for name, gradients in self.row_gradients(self.own_share(rows), loss):
            total[name] += gradients.square().sum(0) / items
        return self.accelerator.reduce(total, "sum")

    def end_stage(self) -> None:
        """Adds this task's Fisher information to the penalty for later stages."""
        state: dict[str, torch.Tensor] = {}
        parameters = self.trained()
        for name, new in self.fisher().items():
            anchor = parameters[name].detach().float()
            P, Q = (self.state_tensors.get(f"{kind}/{name}", torch.zeros_like(new)) for kind in "PQ")
            P = self.config.ewc_gamma * P + new if self.config.ewc_online else P + new
            Q = P * anchor if self.config.ewc_online else Q + new * anchor
            state |= {f"P/{name}": P, f"Q/{name}": Q}
        self.save_state(state)


if __name__ == "__main__":
    main(EWCTrainer, EWCConfig)
