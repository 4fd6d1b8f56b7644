r"""InfLoRA: each task's adapter reads only input directions that earlier tasks did not use.

Liang and Li 2024 (arXiv 2404.00228): the adapters of earlier tasks are frozen and stay active. Before task t, with H_t
the inputs of a layer on the task's rows and M_t an orthonormal basis of the inputs to be left alone, the rows of A_t
become the first r left singular vectors of (I - M_t^T M_t) H_t, times 1/sqrt(3), which is the norm that PEFT's random
rows have. A_t is then frozen, and B_t is trained from zero: what the new adapter adds is zero on all inputs within M_t.
(The paper calls the factors B_t and A_t.) If fewer than r directions are left, the other rows of A_t are zero.

After the task, the inputs of the trained model on its rows extend M: by as few of their principal directions outside M
as bring the share of ||H_t||^2 within M to \epsilon_t = \epsilon + (1 - \epsilon)(t - 1)/T. \epsilon is 0.98 in the
official code for ImageNet-R, 0.95 for CIFAR-100 and DomainNet; r is 10, and 30 for DomainNet.

Differences from the official code: it takes the share of the squares of the covariance's eigenvalues, which are fourth
powers of H's singular values and need fewer directions, where the paper takes that of ||H_t||^2. It takes the rows of
A_t from (I - M_t^T M_t) H_t H_t^T, projected on one side alone, which from the second task on has somewhat other
directions. Its DualGPM keeps M or its complement, whichever is smaller; here it is always M, which is the same space.
It is for the k and v of a vision transformer; here it is for all layers that `lora_target_modules` names.

State: M of each layer, up to (in features)^2 in float32. The two passes over a task's rows keep a matrix of this size
for each adapted layer on the device: 4.3 GB for q and v of a 7B model. It needs LoRA on linear layers.

    python -m trainers.inflora --config trainers/configs/quickstart.yaml --output_dir runs/inflora
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trace_bench.run import Stage
from trainers.base import CLConfig, choose_rows, main, of_tokens, option
from trainers.inclora import NEW, IncLoRATrainer, adapted

#: Of a sum in float32: a smaller share of the inputs' energy is no direction but rounding.
_ROUNDING = 1e-6


@dataclass
class InfLoRAConfig(CLConfig):
    """As CLConfig, and how much of the earlier inputs is left alone."""

    inflora_threshold: float = option(
        0.95, "Share of the first task's inputs (squared) that later adapters keep; grows to 1.", least=0, most=1
    )
    inflora_rows: int | None = option(
        None, "Number of training rows whose inputs are read before and after a task; default: all.", least=1
    )


class InfLoRATrainer(IncLoRATrainer):
    """A stage whose A is made of the new task's inputs outside of the earlier ones, and frozen."""

    config: InfLoRAConfig

    def stage_model(self, stage: Stage) -> Any:
        """The adapters of the stage before, and a new one whose B alone is trained."""
        model = super().stage_model(stage)
        for layer in adapted(model).values():
            layer.lora_A[NEW].weight.requires_grad_(False)
        return model

    def begin_stage(self) -> None:
        """Makes the new A of the new task's inputs."""
        self.memory = self.load_state()
        for name, energy in self.energies().items():
            _, directions = outside(energy, self.known(name, energy))
            a = torch.zeros_like(self.layers[name].lora_A[NEW].weight)
            found = directions[: len(a)]
            a[: len(found)] = found / 3**0.5
            self.kept[name] = a
        self.set_a()

    def resume(self) -> str | None:
        """The A of the checkpoint within the stage: another device may turn the sign of a direction."""
        folder = super().resume()
        self.set_a()
        return folder

    def set_a(self) -> None:
        """Puts A into the adapter."""
        for name, a in self.kept.items():
            self.layers[name].lora_A[NEW].weight.data.copy_(a)

    def end_stage(self) -> None:
        """Adds the task's inputs to the memory."""
        stages = len(self.config.stages)
        least = self.config.inflora_threshold
        share = least + (1 - least) * (self.stage.index - 1) / stages
        for name, energy in self.energies().items():
            known = self.known(name, energy)
            self.memory[name] = torch.cat([known, principal(energy, known, share)])
        self.save_state(self.memory)

    @property
    def layers(self) -> dict[str, Any]:
        """The layers with an adapter, by name."""
        return adapted(self.accelerator.unwrap_model(self.model))

    def known(self, name: str, energy: torch.Tensor) -> torch.Tensor:
        """The memory of a layer, an orthonormal basis of shape (directions, in features); at first empty."""
        return self.memory.get(name, energy[:0])

    @torch.no_grad()
    def energies(self) -> dict[str, torch.Tensor]:
        """H H^T of the task's inputs of each layer, (in features, in features): summed over all tokens."""
        assert self.stage.task is not None
        rows = self.task_dataset(self.stage.task)
        if self.config.inflora_rows is not None:
            rows = choose_rows(rows, self.config.inflora_rows, "random", self.config.seed)
        self.model.eval()  # without dropout
        device = self.accelerator.device
        sums = {name: torch.zeros(2 * (layer.in_features,), device=device) for name, layer in self.layers.items()}

        def see(layer: Any, args: Any, *, name: str, real: torch.Tensor) -> None:
            x = of_tokens(args[0], real).float()
            # Autocast would round the products.
            with torch.autocast(device.type, enabled=False):
                sums[name] += x.T @ x

        for batch in self.batches(self.own_share(rows)):
            real = batch["attention_mask"].bool()
            with ExitStack() as hooks, self.accelerator.autocast():  # HF wraps the model only for the training
                for name, layer in self.layers.items():
                    hooks.enter_context(layer.register_forward_pre_hook(partial(see, name=name, real=real)))
                self.answer_logits(self.model, batch)
        return self.accelerator.reduce(sums, "sum") if self.accelerator.num_processes > 1 else sums

    def record(self) -> dict[str, Any]:
        """The share of all input directions that the memory has, of the layer with the smallest and the largest."""
        shares = sorted(len(known) / known.shape[1] for known in self.memory.values())
        return {"memory_share": [round(share, 4) for share in (shares[0], shares[-1])]}


def outside(energy: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The principal directions of inputs outside of a memory, as rows, and the energy along each, the largest first.

    They are found within a basis of the complement: an eigenvector of the projected matrix with the eigenvalue 0 could
    lie in the memory.
    """
    rest = torch.linalg.qr(known.T, mode="complete")[0][:, len(known) :]
    values, vectors = torch.linalg.eigh(rest.T @ energy @ rest)
    directions = (rest @ vectors).T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return values.flip(0).clamp(min=0), directions * largest.sign()  # of the two signs always the same


def principal(energy: torch.Tensor, known: torch.Tensor, share: float) -> torch.Tensor:
    """As few directions outside of a memory as bring the share of the inputs' energy within it to `share`."""
    values, directions = outside(energy, known)
    left = values.flip(0).cumsum(0).flip(0)  # without the first n directions
    return directions[: int((left > (1 - share + _ROUNDING) * energy.trace()).sum())]


if __name__ == "__main__":
    main(InfLoRATrainer, InfLoRAConfig)
