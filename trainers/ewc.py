r"""Elastic weight consolidation: parameters that mattered to earlier tasks are held back.

Kirkpatrick et al. 2017 (arXiv 1612.00796): when training task t, the penalty
\lambda/2 \sum_{k<t} \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2 is added to the loss, with \theta^*_k the parameters
after task k and F_k the diagonal of the Fisher information there, of the task's loss alone, without the penalty.

F is in the units of the loss that is minimised: it is the curvature of that loss, and \lambda has one meaning whatever
the length of answers. With g the gradient of a row's log-likelihood (the sum over its n answer tokens), F is the mean
over rows of g^2 / n where rows weigh the same (`loss_weights`), and the sum over rows of g^2 divided by the number of
all answer tokens where tokens do. With \lambda = 1 the loss of each earlier task counts, to second order,
as much as the present one: the posterior of the paper for tasks of equal size. The default is the \lambda = 400
of the paper's Atari experiments.

`ewc_fisher` says whose labels g is of. "empirical": the data's, which vanishes where the loss does (arXiv 2502.11756).
"sampled": the model's own, one draw at each position behind the data's tokens; its mean over draws is the Fisher
information itself.

The penalty is on the parameters that are trained. With LoRA these are A and B, and it is not invariant to what leaves
the model B A as it is: for any invertible M, M A and B M^-1 are the same model with another penalty. It counts changes
of A and of B as if the other one stood still, and where one factor is small, as B is early on, the other looks free. A
penalty on B A would need the Fisher information of whole weights.

By default the online variant (Schwarz et al. 2018, arXiv 1805.06370): one anchor, the newest parameters,
and one running sum F = \gamma F + F_k. `ewc_online: false` keeps every task's own anchor. In both cases the gradient
of the penalty is \lambda (P \theta - Q) with two tensors per parameter, so the memory does not grow with the tasks.

Differences from the official TRACE code: it has \lambda = 400, too, but squares the gradients of mini-batches during
training, penalty included, and sums them over all epochs, divided by the batches of one. The gradient of a mean over a
batch is not a row's: the sum depends on the batch size.

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
    """As CLConfig, and the strength of the penalty."""

    ewc_lambda: float = option(400.0, "Weight of the penalty.", least=0)
    ewc_online: bool = option(True, "One anchor and a running Fisher, rather than one of each per task.")
    ewc_gamma: float = option(1.0, "How much of the running Fisher is kept at each stage (online).", least=0, most=1)
    ewc_rows: int = option(256, "Training rows for the Fisher information.", least=1)
    ewc_fisher: str = option(
        "empirical",
        "Labels of the Fisher information: the data's, or sampled from the model.",
        choices=["empirical", "sampled"],
    )


class EWCTrainer(CLTrainer):
    """A stage with the penalty of the earlier ones.

    State: "P/<name>" = the sum of the Fisher information, "Q/<name>" = the sum of Fisher information times anchor, in
    float32: twice the trained parameters, whatever the number of tasks.
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
        """The diagonal of the Fisher information at the present parameters, on rows of the stage's own task."""
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
        """Adds this task's Fisher information to the penalty of the stages to come."""
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
