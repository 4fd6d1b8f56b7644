"""The `--help` of a method, from the source alone: importing a method takes seconds (TRL, torch).

All options, those of HF and TRL too, are listed by `--help_all`, from the configs themselves.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base" / "config.py"
#: Of the options that HF's and TRL's configs have those that most runs set.
USUAL = {
    "config": "A YAML file of these options, or a name. Options on the command line override it.",
    "like": "A run to copy settings from, if this method has them. Options after it override them.",
    "output_dir": "The run directory. Run the same command again to continue.",
    "model_name_or_path": "The base model: a hub id, a local folder, or SmolLM2-135M-Instruct.",
    "model_revision": "Branch, tag or commit of a model on the hub.",
    "use_peft": "Train a LoRA adapter, not all parameters.",
    "lora_r": "Rank of the adapter.",
    "lora_alpha": "Scale of the adapter: its product is multiplied by lora_alpha / lora_r.",
    "lora_target_modules": "The layers that get an adapter.",
    "learning_rate": "Learning rate of every stage.",
    "num_train_epochs": "Epochs of every stage, unless epochs sets them for each task.",
    "per_device_train_batch_size": "Rows of a batch, on each process.",
    "gradient_accumulation_steps": "Batches of an optimizer step.",
    "bf16": "Compute in bfloat16; default: true, except on CPUs and GPUs that are slow with it.",
    "gradient_checkpointing": "Compute activations twice, to save memory.",
    "save_steps": "Steps between two checkpoints, with save_strategy steps.",
    "seed": "Seed of all random numbers.",
}


def own_options(file: Path, name: str | None = None) -> Iterator[tuple[Path, str, str]]:
    """What the config of a method (the class `name`, or the one in its call of `main`) adds to TRL's.

    Yields:
        The file, the setting, and its help; those of the method's own file come first.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if name is None:
        calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "main")
        name = next((ast.unparse(call.args[1]) for call in calls if len(call.args) > 1), "")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            folder, _, module = (node.module or "").rpartition(".")
            if folder == "trainers":
                yield from own_options(BASE if module == "base" else FOLDER / f"{module}.py", name)
        elif isinstance(node, ast.ClassDef) and node.name == name:
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and line.value and "ClassVar" not in ast.unparse(line.annotation):
                    yield file, ast.unparse(line.target), _describe(line.value)
            for base in node.bases:
                yield from own_options(file, ast.unparse(base))


def _describe(value: ast.expr) -> str:
    """The help of a setting, from what a dataclass has behind the equals sign: `option`, `field` or a plain default."""
    given: dict[str | None, ast.expr] = {"default": value}
    if isinstance(value, ast.Call):
        given = {**dict(zip(("default", "help"), value.args, strict=False)), **{k.arg: k.value for k in value.keywords}}
    metadata = given.get("metadata")
    if isinstance(metadata, ast.Dict):
        given |= {ast.literal_eval(k): v for k, v in zip(metadata.keys, metadata.values, strict=True) if k}
    parts = [ast.literal_eval(given["help"])] if "help" in given else []
    if isinstance(given.get("choices"), ast.List):
        parts.append(f"({', '.join(ast.literal_eval(given['choices']))})")
    default = ast.unparse(given["default"]) if "default" in given else "None"
    if default not in ("None", "[]"):
        parts.append("[" + default.strip("'[]").replace("', '", " ") + "]")
    return " ".join(parts)


def show(file: Path, program: str) -> bool:
    """Prints what a method does, and its options; False if there is no such file, or its texts are computed.

    Args:
        file: The file of the method.
        program: How it is started.
    """
    try:
        options = list(own_options(file)) if file.is_file() else []
    except (ValueError, SyntaxError):  # a text that is computed
        options = []
    if not options:
        return False
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s --config FILE.yaml [--OPTION VALUE ...]",
        description=ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))),
        epilog="For all options of TRL's SFTConfig and ModelConfig: --help_all",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        add_help=False,
    )
    groups: dict[Path, argparse._ArgumentGroup] = {}
    seen: set[str] = set()
    for source, name, text in options:
        if source not in groups:
            groups[source] = parser.add_argument_group("every run" if source == BASE else source.stem)
        if name not in seen:  # a method's own default stands before the one that it inherits
            groups[source].add_argument(f"--{name}", metavar="", help=text.replace("%", "%%"))
            seen.add(name)
    usual = parser.add_argument_group("the usual options of HF and TRL")
    for name, text in USUAL.items():
        if name not in seen:
            usual.add_argument(f"--{name}", metavar="", help=text)
    parser.print_help()
    return True
