r"""One checkpoint made of several: means, and merges of task vectors. All sums are in float32.

With \theta_i the checkpoints, \theta_0 their base and \tau_i = \theta_i - \theta_0, a weight becomes

- average: the mean of the \theta_i;
- wise: (1 - \alpha) \theta_1 + \alpha \theta_2, or of \theta_0 and \theta_1 (WiSE-FT, arXiv 2109.01903);
- magmax: \theta_0 + \alpha \tau, \tau the \tau_i of the largest absolute value, weight by weight (arXiv 2407.06322);
- ties: \theta_0 + \alpha \tau, \tau by PEFT's `ties`: the `density` largest entries of each \tau_i, then at each weight
  the mean of those that have the sign of their sum (arXiv 2306.01708). PEFT trims each tensor, the paper the model;
- dare: \theta_0 + \alpha \tau, \tau the mean of the \tau_i of which `density` is left at random and scaled up to the
  same expectation, by PEFT's `dare_linear` (arXiv 2311.03099).

**LoRA.** The weights of an adapter are W_0 + s B A, so s B A is what is merged; its base is 0. The mean of A and B by
themselves would be another model: between (A, B) and (A + dA, B + dB) it lacks \alpha (1 - \alpha) dB dA, and between
adapters with different beginnings it means nothing. A sum of products is again one adapter, all A and B side by side:
average and wise are exact at the sum of the ranks. What magmax, ties and dare make has full rank, and a smaller rank
may be wanted of any merge. Then the best approximation of that rank is kept (by singular values), as the `svd` kinds of
PEFT's `add_weighted_adapter` do, and the share of the squared norm that it lacks is returned as "lost".
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trace_bench.engine import models
from trace_bench.engine.architecture import weight_files
from trace_bench.run import RunError
from trace_tasks.data.files import digest, fingerprint

#: Methods of task vectors: full models need their base for them.
OF_VECTORS = ("magmax", "ties", "dare")
#: Where no alpha is given. wise and magmax: the papers', MagMax's also in its code; ties and dare: the plain vector.
ALPHA = {"wise": 0.5, "magmax": 0.5, "ties": 1.0, "dare": 1.0}
#: Where no density is given: the top 20 % of TIES, and DARE's drop rate of 0.9.
DENSITY = {"ties": 0.2, "dare": 0.1}
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Merge:
    """How checkpoints are merged.

    Attributes:
        method: One of `cli.merge.METHODS`.
        alpha: See above; None = ALPHA.
        density: Of ties and dare, the share of entries that is left; None = DENSITY.
        seed: Of dare, which draws by the name of each tensor.
    """

    method: str
    alpha: float | None = None
    density: float | None = None
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """The parameters that the method uses, with defaults filled in."""
        used = {
            "alpha": ALPHA.get(self.method) if self.alpha is None else self.alpha,
            "density": DENSITY.get(self.method) if self.density is None else self.density,
            "seed": self.seed if self.method == "dare" else None,
        }
        return {"method": self.method, **{key: value for key, value in used.items() if value is not None}}

    def weights(self, many: int) -> list[Fraction] | None:
        """The weight of each of `many` checkpoints; None if the method is not a mean."""
        if self.method == "average":
            return [Fraction(1, many)] * many
        if self.method != "wise":
            return None
        alpha = Fraction(self.settings()["alpha"])
        return [1 - alpha, alpha][-many:]  # of one checkpoint the rest is the base

    def of_vectors(self, base: torch.Tensor, tensors: Sequence[torch.Tensor], name: str) -> torch.Tensor:
        """magmax, ties or dare of one weight, from tensors of one type."""
        alpha = self.settings()["alpha"]
        if self.method == "magmax":
            chosen = tensors[0]
            for tensor in tensors[1:]:  # if equal, the later one wins, as in the published code
                chosen = torch.where((tensor - base).abs() >= (chosen - base).abs(), tensor, chosen)
            return between(base, chosen, alpha)
        from peft.utils.merge_utils import dare_linear, ties

        vectors, density = [tensor - base for tensor in tensors], self.settings()["density"]
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # PEFT's warning that a density of 1 prunes nothing
            torch.manual_seed(int(digest([self.seed, name]), 16) % 2**63)
            if self.method == "ties":
                return base + alpha * ties(vectors, torch.ones(len(vectors)), density)
            return base + alpha * dare_linear(vectors, torch.full((len(vectors),), 1 / len(vectors)), density)


def between(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - alpha) a + alpha b: exactly a or b if alpha is 0 or 1, and exactly a where a = b."""
    return torch.lerp(a, b, alpha) if alpha <= 1 else a + alpha * (b - a)


def mean(tensors: Sequence[torch.Tensor], weights: Sequence[Fraction]) -> torch.Tensor:
    """The weighted mean, computed so that the mean of equal tensors is exactly that tensor."""
    total, result = Fraction(0), tensors[0]
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            total += weight
            result = between(result, tensor, float(weight / total))
    return result


# ------------------------------------------------------------------------------------------------------------ adapters


def scaling(config: dict[str, Any]) -> float:
    """The factor on the product B A of an adapter."""
    rank: int = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def cut(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The best approximation of B A with a given rank, and the squared norms of the kept part and of B A.

    Returns:
        A with orthonormal rows, shape (rank, in features), and B, shape (out features, rank).
    """
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return *_padded(V[:rank] @ Qa.T, Qb @ (U * S)[:, :rank], rank), *_norms(S, rank)


def split(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """`cut` of a whole matrix."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    U, S, V = (part.cpu() for part in torch.linalg.svd(delta.to(device), full_matrices=False))
    return *_padded(V[:rank], (U * S)[:, :rank], rank), *_norms(S, rank)


def _norms(S: torch.Tensor, rank: int) -> tuple[float, float]:
    squares = S.double().square()
    return float(squares[:rank].sum()), float(squares.sum())


def _padded(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads a matrix with zeros up to the rank: small layers have a smaller one, but PEFT has one rank for all."""
    lack = rank - len(A)
    return torch.nn.functional.pad(A, (0, 0, 0, lack)), torch.nn.functional.pad(B, (0, lack))


def merge_adapters(folders: Sequence[Path], target: Path, how: Merge, rank: int | None = None) -> dict[str, Any]:
    """Merges LoRA adapters of one base into one adapter, in a folder that is there.

    Equal ones count as one of their common weight, and those of weight 0 not at all: where one is left as it was, its
    files are copied.

    Args:
        folders: What `combining.check` let pass. The last one that counts gives the config, and with it the scaling.
        target: The folder to write into.
        how: The method.
        rank: That of the result at most; None = the sum of the ranks of those that differ.

    Returns:
        The rank of the result, and the share of the squared norm that is lost by it.
    """
    weights = how.weights(len(folders))
    if weights is not None:
        counts: dict[str, tuple[Path, Fraction]] = {}
        for folder, weight in zip(folders, weights, strict=True):
            key = f"{fingerprint(folder / _WEIGHTS)} {scaling(models.adapter_config(folder))}"
            first, before = counts.get(key, (folder, Fraction(0)))
            counts[key] = first, before + weight
        counted = [entry for entry in counts.values() if entry[1]] or [next(iter(counts.values()))]
        folders, weights = [folder for folder, _ in counted], [weight for _, weight in counted]
    configs = [models.adapter_config(folder) for folder in folders]
    most = sum(config["r"] for config in configs)
    rank = most if rank is None else min(rank, most)
    if weights == [1] and rank == most:
        for name in ("adapter_config.json", _WEIGHTS):
            shutil.copyfile(folders[0] / name, target / name)
        return {"rank": rank, "lost": 0.0}
    files = [load_file(folder / _WEIGHTS) for folder in folders]
    scalings = [scaling(config) for config in configs]
    merged: dict[str, torch.Tensor] = {}
    kept = whole = 0.0
    for name in sorted(key for key in files[0] if ".lora_A." in key):
        partner = name.replace(".lora_A.", ".lora_B.")
        A, B = [file[name].float() for file in files], [file[partner].float() for file in files]
        if weights is None:
            products = [s * (b @ a) for s, a, b in zip(scalings, A, B, strict=True)]
            delta = how.of_vectors(torch.zeros_like(products[0]), products, name) / scalings[-1]
            merged[name], merged[partner], *norms = split(delta, rank)
        else:
            factors = [float(w) * s / scalings[-1] for w, s in zip(weights, scalings, strict=True)]
            all_A, all_B = torch.cat(A), torch.cat([f * b for f, b in zip(factors, B, strict=True)], dim=1)
            if rank == most:
                merged[name], merged[partner], norms = all_A, all_B, [0.0, 0.0]
            else:
                merged[name], merged[partner], *norms = cut(all_A, all_B, rank)
        kept, whole = kept + norms[0], whole + norms[1]
    save_file({key: tensor.contiguous() for key, tensor in merged.items()}, target / _WEIGHTS, {"format": "pt"})
    _write_config(configs[-1], rank, target)
    return {"rank": rank, "lost": max(0.0, 1 - kept / whole) if whole else 0.0}


def _write_config(config: dict[str, Any], rank: int, target: Path) -> None:
    """An adapter's config with another rank and the same scaling."""
    alpha = scaling(config) * (math.sqrt(rank) if config.get("use_rslora") else rank)
    if config["r"] != rank:
        config = {**config, "r": rank, "lora_alpha": round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha}
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- full models


class _Model:
    """The tensors of a full model, read one by one."""

    def __init__(self, folder: Path) -> None:
        self.open = {file.name: safe_open(file, framework="pt") for file in weight_files(folder)}
        self.place = {name: file for file in self.open for name in self.open[file].keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.open[self.place[name]].get_tensor(name)


def merge_models(folders: Sequence[Path], target: Path, how: Merge, base: Path | None = None) -> dict[str, Any]:
    """Merges full models into one, in a folder that is there: one file in memory at a time.

    What is narrower than float32 is rounded without a bias, as merged adapters are, since the nearest value would lose
    what is smaller than half a unit.

    Args:
        folders: What `combining.check` let pass. The last one also gives config, tokenizer and files.
        target: The folder to write into.
        how: The method.
        base: The base model, for OF_VECTORS, and for wise of one checkpoint.
    """
    weights = how.weights(len(folders))
    if weights is not None and base is not None:
        folders, weights = [base, *folders], [1 - sum(weights, Fraction(0)), *weights]
    sources = [_Model(folder) for folder in folders]
    origin = None if base is None else _Model(base)
    for file, tensors in sources[-1].open.items():
        merged = {}
        for name in sorted(tensors.keys()):
            merged[name] = _merged(name, [source[name] for source in sources], how, weights, origin)
        save_file(merged, target / file, {"format": "pt"})
    for path in folders[-1].iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model", ".py") and path.is_file():
            shutil.copyfile(path, target / path.name)
    return {}


def _merged(
    name: str, parts: list[torch.Tensor], how: Merge, weights: list[Fraction] | None, origin: _Model | None
) -> torch.Tensor:
    """One tensor of the merged model, in the dtype of the last checkpoint, whose config the merge gets."""
    if not parts[0].is_floating_point():
        if any(not torch.equal(part, parts[0]) for part in parts):
            raise RunError(f"{name} has integers that differ between the checkpoints, so they have no mean.")
        return parts[0]
    dtype, exact = parts[-1].dtype, torch.float32
    for part in parts:
        exact = torch.promote_types(exact, part.dtype)
    wide = [part.to(exact) for part in parts]
    if weights is not None:
        result = mean(wide, weights)
    else:
        assert origin is not None
        result = how.of_vectors(origin[name].to(exact), wide, name)
    if dtype not in (torch.bfloat16, torch.float16):
        return result.to(dtype).contiguous()
    return models.round_unbiased(result, dtype, torch.Generator().manual_seed(int(digest(name), 16) % 2**63))
