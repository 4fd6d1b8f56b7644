"""`trace-bench merge`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from trace_bench.cli import show
from trace_bench.cli.options import positive
from trace_bench.run import RunError

#: The methods, and which of them take which options; `engine.averaging` has the maths, and imports torch.
METHODS = ("average", "wise", "magmax", "ties", "dare")
_TAKEN_BY = {"alpha": ("wise", "magmax", "ties", "dare"), "density": ("ties", "dare"), "seed": ("dare",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.description = (
        "Merges checkpoints (LoRA adapters of one base, or full models) into one. `trace-bench evaluate --checkpoint`\n"
        "evaluates it. The file merged_from.json in its folder lists its sources."
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT", help="folders of adapters, or of full models")
    add(
        "--method",
        required=True,
        choices=METHODS,
        help="average: the mean; wise: between two checkpoints, or the base and one (WiSE-FT); magmax: the largest "
        "task vector of each weight; ties, dare: task vectors trimmed, or dropped at random, by PEFT",
    )
    add("--output", required=True, metavar="DIR", help="a new folder")
    add("--model", help="the base model; full models need it, except with average, or wise of two checkpoints")
    add(
        "--alpha",
        type=float,
        help="wise: the share of the last checkpoint (0.5); other methods: the factor on the merged task vector "
        "(magmax 0.5, ties and dare 1)",
    )
    add("--density", type=float, help="the share of each task vector's entries that ties (0.2) or dare (0.1) keeps")
    add("--rank", type=positive, help="the largest rank of a merged adapter (default: the sum of the ranks)")
    add("--seed", type=int, help="the random seed of dare (0)")


def run(args: argparse.Namespace) -> None:
    """Writes the merged checkpoint, or refuses."""
    for name, methods in _TAKEN_BY.items():
        if getattr(args, name) is not None and args.method not in methods:
            raise RunError(f"--{name} is for {', '.join(methods)}; {args.method} does not use it. Leave it out.")
    most = 1 if args.method == "wise" else math.inf
    if args.alpha is not None and not (0 <= args.alpha <= most and args.alpha < math.inf):
        raise RunError(f"--alpha {args.alpha} is not allowed: use a number from 0{' to 1' if most == 1 else ' up'}.")
    if args.density is not None and not 0 < args.density <= 1:
        raise RunError(f"--density {args.density} is not allowed: use a number above 0 and of at most 1.")
    from trace_bench.engine.averaging import Merge
    from trace_bench.engine.combining import combine

    how = Merge(args.method, args.alpha, args.density, args.seed or 0)
    checkpoints, output = [Path(path).expanduser() for path in args.checkpoints], Path(args.output).expanduser()
    record = combine(checkpoints, output, how, model=args.model, rank=args.rank)
    said = f"{output}: {args.method} of {len(checkpoints)} {record['kind']}{'s' * (len(checkpoints) > 1)}"
    if "rank" in record:
        said += f", rank {record['rank']}"
    if record.get("lost"):
        said += f", which loses {record['lost']:.1%} of the squared norm (a higher --rank keeps more)"
    show(said)
