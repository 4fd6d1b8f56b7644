"""The table of architectures and kinds of checkpoint: what is evaluated is the model that was trained.

Every cell is compared with a plain greedy loop over the unmerged PEFT model (see architectures.py): one row at a time,
no cache, float32. None answers differently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import ne
from pathlib import Path

import pytest
from architectures import (
    ARCHITECTURES,
    KINDS,
    MORE_KINDS,
    PROMPTS,
    by_transformers,
    by_vllm,
    make_base,
    make_checkpoint,
    reference,
    reference_likelihoods,
    reload,
)
from conftest import byte_tokenizer, pieces_tokenizer
from transformers import AutoTokenizer

#: Contexts and texts of one token or several, as in MMLU and PIQA.
PAIRS = [
    *(("Which of them is it?\nAnswer:", f" {letter}") for letter in "ABCD"),
    ("A", " longer text, of several words."),
    ("Die Straße ist", " naß"),
]
#: Architectures for vLLM -> the kinds of checkpoint: dense, tied, and with experts.
VLLM = {
    "llama": (*KINDS, *MORE_KINDS),
    "llama_tied": (*KINDS, *MORE_KINDS),
    "qwen3": KINDS,
    "mixtral": KINDS,
    "qwen2_moe": KINDS,
}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable[[str], tuple[Path, list[str]]]:
    """The base model of an architecture and what it answers, made once."""
    folder = tmp_path_factory.mktemp("architectures")

    @cache
    def make(architecture: str) -> tuple[Path, list[str]]:
        # Of a Qwen transformers makes the tokenizer byte-level, whatever its files say.
        tokenizer = byte_tokenizer() if architecture.startswith("qwen") else pieces_tokenizer()
        base = make_base(architecture, folder / architecture, tokenizer)
        answers = reference(reload(base, None), AutoTokenizer.from_pretrained(base), PROMPTS)
        assert len(set(answers)) == len(PROMPTS), "lively texts, or nothing is shown"
        return base, answers

    return make


# ------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_answers_as_the_trained_model(architecture, kind, base_of, tmp_path):
    served_by_transformers(*base_of(architecture), kind, tmp_path)


@pytest.mark.parametrize("kind", MORE_KINDS)
@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_transformers_answers_as_the_trained_model_of_further_kinds(architecture, kind, base_of, tmp_path):
    served_by_transformers(*base_of(architecture), kind, tmp_path)


def served_by_transformers(base: Path, answers_of_base: list[str], kind: str, tmp_path: Path) -> None:
    checkpoint, model = make_checkpoint(kind, base, tmp_path / kind)
    expected = reference(model, AutoTokenizer.from_pretrained(base), PROMPTS)
    if kind == "base":
        assert by_transformers(base, [None], PROMPTS) == [{"answers": expected}]
    else:
        assert all(map(ne, expected, answers_of_base)), "another model"
        assert by_transformers(base, [checkpoint, None], PROMPTS) == [
            {"answers": expected},
            {"answers": answers_of_base},
        ], "the checkpoint, and back"


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "mpt", "mamba", "mixtral"])
def test_likelihoods_of_transformers_are_those_of_the_trained_model(architecture, kind, base_of, tmp_path):
    base, _ = base_of(architecture)
    checkpoint, model = make_checkpoint(kind, base, tmp_path / kind)
    expected = reference_likelihoods(model, AutoTokenizer.from_pretrained(base), PAIRS)
    (found,) = by_transformers(base, [checkpoint], PROMPTS[:1], PAIRS)
    assert found["likelihoods"] == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- vllm


@pytest.fixture(scope="session")
def vllm_of(base_of, tmp_path_factory):
    """What one engine of vLLM makes of every kind of checkpoint of an architecture, the base between any two of them.

    A kind -> its path, what was found, what is expected, and what was found of the base after it.
    """

    @cache
    def serve(architecture: str) -> dict[str, dict]:
        base, _ = base_of(architecture)
        tokenizer, folder = AutoTokenizer.from_pretrained(base), tmp_path_factory.mktemp(architecture)
        cells, loads = {}, []
        for kind in VLLM[architecture]:
            checkpoint, model = make_checkpoint(kind, base, folder / kind)
            answers = reference(model, tokenizer, PROMPTS)
            expected = {"answers": answers, "likelihoods": reference_likelihoods(model, tokenizer, PAIRS)}
            cells[kind] = {"checkpoint": checkpoint, "expected": expected}
            loads += [checkpoint, None]
        found = by_vllm(base, loads, PROMPTS, PAIRS)
        for cell, now, after in zip(cells.values(), found[::2], found[1::2], strict=True):
            cell |= {"found": now, "after": after}
        return cells

    return serve


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("architecture", "kind"), [(name, kind) for name, kinds in VLLM.items() for kind in kinds])
def test_vllm_answers_as_the_trained_model(architecture, kind, vllm_of):
    cell, base = vllm_of(architecture)[kind], vllm_of(architecture)["base"]["expected"]
    assert_same(cell["found"], cell["expected"])
    assert_same(cell["after"], base)


def assert_same(found: dict, expected: dict) -> None:
    assert found["answers"] == expected["answers"]
    assert found["likelihoods"] == pytest.approx(expected["likelihoods"], rel=1e-3)
