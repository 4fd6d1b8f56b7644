"""Makes models and rows on the spot: nothing is downloaded, and no 13 GB of weights are read from a disk."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

LENGTHS = Path(__file__).with_name("lengths.json")
#: The config that gives the large parts their LoRA, batch and lengths.
CONFIG = "llama2_7b_lora.yaml"
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
MEDIUM = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}


def device() -> str:
    """The device on which models are made: the GPU, or the CPU in a trial."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, like GPT-2's without merges. It adds no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def small_model(folder: Path, shape: dict[str, int] = SMALL) -> Path:
    """Writes, once, a model and its tokenizer. Its random weights are large enough for varied texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trace_tasks.data.files import fresh_dir

    if not folder.exists():
        tokenizer = byte_tokenizer()
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **shape, **ends))
        with fresh_dir(folder) as target:
            model.to(torch.bfloat16).save_pretrained(target)
            tokenizer.save_pretrained(target)
    return folder


def small_adapter(base: Path, folder: Path, seed: int) -> Path:
    """Writes, once, a LoRA adapter of random weights that changes the answers of the base model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trace_tasks.data.files import fresh_dir

    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(model, adapter)
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        with fresh_dir(folder) as target:
            adapted.save_pretrained(str(target))
    return folder


def prompts(count: int) -> list[list[int]]:
    """Token ids of the first prompts of the demo tasks, for the small model."""
    from trace_bench.tasks import load_tasks, training_rows

    tasks = load_tasks(["trace_fomc", "trace_numglue_ds", "trace_cstance", "trace_py150"])
    texts = [prompt for task in tasks.values() for prompt, _ in training_rows(task, count // len(tasks))]
    return [ids[-96:] for ids in byte_tokenizer()(texts).input_ids]


def marks(answers: list[list[int]]) -> list[str]:
    """A short text for each answer; equal tokens give equal texts."""
    return [hashlib.sha256(repr(ids).encode()).hexdigest()[:8] for ids in answers]


def equal_share(one: list[str], other: list[str]) -> float:
    """The share of answers with the same tokens."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def comparison(found: Any, goal: Any = None, met: bool | None = None) -> dict[str, Any]:
    """A number from several measurements, and whether it meets its goal (`met`; None without a goal)."""
    return {"goal": goal, "found": round(found, 7) if isinstance(found, float) else found, "met": met}


# ------------------------------------------------------------------------------------------------------ the large model


def large_config(tiny: bool) -> Any:
    """The configuration of LLaMA-2-7B; a tiny one in a trial."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=320, **SMALL) if tiny else LlamaConfig(max_position_embeddings=4096)


def large_folder(folder: Path, tiny: bool) -> Path:
    """A folder with the configuration and a tokenizer, but no weights: `large_model` makes them."""
    from trace_tasks.data.files import fresh_dir

    if not folder.exists():
        with fresh_dir(folder) as target:
            large_config(tiny).save_pretrained(target)
            byte_tokenizer().save_pretrained(target)
    return folder


def large_model(tiny: bool) -> Any:
    """The large model in bf16. Its random weights are made on the device, and are the same each time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(large_config(tiny), dtype=torch.bfloat16)


def examples(tiny: bool, seed: int = 0, each: int | None = None) -> list[dict[str, list[int]]]:
    """Rows of random tokens with the lengths of real rows of all eight tasks, cut as the config cuts them.

    Args:
        tiny: Whether to take a sixteenth of the lengths.
        seed: The seed of the tokens.
        each: Rows of each task; None = all rows of the table.
    """
    args = large_args()
    draw = random.Random(seed)
    vocabulary, part = large_config(tiny).vocab_size, 16 if tiny else 1
    rows = []
    for task, lengths in json.loads(LENGTHS.read_text()).items():
        for prompt, answer in [] if task == "about" else lengths[:: len(lengths) // each if each else 1]:
            prompt = max(1, min(prompt, args["max_prompt_length"]) // part)
            answer = max(1, min(answer, args["max_answer_length"]) // part)
            ids = [draw.randrange(3, vocabulary) for _ in range(prompt + answer)]
            rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def large_args() -> dict[str, Any]:
    """The settings of `CONFIG`."""
    import yaml

    from trace_bench.packaged import TRAINERS

    settings: dict[str, Any] = yaml.safe_load((TRAINERS / "configs" / CONFIG).read_text())
    return settings


class Sized:
    """Mixed into a method's trainer: it trains the large model on rows of real lengths and loads nothing."""

    tiny = False
    #: Rows of each of the eight tasks in a stage; None = all rows of the table.
    each: int | None = None

    def task_dataset(self, task: str, limit: int | None = None) -> Any:
        """The mix of all lengths, with different tokens for each task."""
        from datasets import Dataset

        return Dataset.from_list(examples(self.tiny, seed=sum(task.encode()), each=self.each))

    def load_model(self, checkpoint: Path | None) -> Any:
        """The large model, with the adapter of a checkpoint unmerged."""
        from peft import PeftModel

        model = large_model(self.tiny)
        return model if checkpoint is None else PeftModel.from_pretrained(model, checkpoint)


def train_large(trainer: Any, config: Any, folder: Path, tiny: bool, options: list[str], each: int | None) -> Any:
    """Trains a method on the large model as its command does, with `CONFIG` and further options. Returns the run."""
    from trainers.base import preflight, train
    from trainers.base.stages import method_name, parse

    preflight.check_base = lambda *args: None  # the folder has no weights to check: they are made on the card
    shutil.rmtree(folder, ignore_errors=True)
    base = large_folder(folder.parent / ("large-tiny" if tiny else "large"), tiny)
    argv = ["--config", CONFIG.removesuffix(".yaml"), "--model_name_or_path", str(base), "--output_dir", str(folder)]
    argv += ["--data", "demo", "--gradient_accumulation_steps", "1", "--disable_tqdm", "true", *options]
    attributes = {"__module__": trainer.__module__, "tiny": tiny, "each": each}
    return train(type(trainer.__name__, (Sized, trainer), attributes), *parse(config, argv, method_name(trainer)))
