"""The tokens that end an answer: those that a model was trained to end with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trace_bench.engine import models
from trace_bench.engine.models import ModelError
from trace_tasks.errors import brief


def end_ids(tokenizer: Any, base: str, revision: str | None = None, checkpoint: Path | None = None) -> frozenset[int]:
    """The tokens that end an answer: the EOS of the tokenizer, of the base model, and of a checkpoint."""
    found: set[Any] = {tokenizer.eos_token_id, *ends_of_model(base, revision)}
    if checkpoint is not None:
        # An adapter has no model configuration, but may have learned a different EOS than its base model's.
        text, known = eos_text(checkpoint), tokenizer.get_vocab()
        found.add(known[text] if text in known else eos_number(checkpoint, text))
        if not models.is_adapter(checkpoint):
            found |= ends_of_model(checkpoint)
    return frozenset(found - {None})


def ends_of_model(place: str | Path, commit: str | None = None) -> set[int | None]:
    """The tokens that end an answer by the configurations of a model.

    Raises:
        ModelError, RunError: if they do not say it in a way that can be read.
    """
    settings = models.model_file(place, "generation_config.json", commit)
    if not isinstance(settings, dict | None):
        raise ModelError(
            f"{place}/generation_config.json is damaged: it is not a JSON object. Copy it again, or remove it."
        )
    eos = (settings or {}).get("eos_token_id")
    if eos is None:  # as in transformers, config.json says what this file does not
        eos = models.read_config(place, commit).get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int | None) for token in tokens):
        raise ModelError(f"{place}: eos_token_id is {eos!r:.80}, but must be a token's number or a list of them.")
    return set(tokens)


def eos_text(checkpoint: Path) -> str | None:
    """The EOS of the tokenizer that a checkpoint brings; None where it brings none.

    Raises:
        ModelError: if its tokenizer_config.json is damaged.
    """
    file = checkpoint / "tokenizer_config.json"
    try:  # not by read_json, which takes no number as long as many a model_max_length
        said = json.loads(file.read_bytes()).get("eos_token") if file.is_file() else None
    except (ValueError, AttributeError, RecursionError) as e:
        raise ModelError(f"{file} is damaged ({brief(e)}). Copy the tokenizer again, or remove it.") from e
    text = said.get("content") if isinstance(said, dict) else said
    return text if isinstance(text, str) else None


def eos_number(checkpoint: Path, text: str | None) -> int | None:
    """The id of that EOS in the tokenizer.json of the folder; None if there is no such file, or it lacks the EOS.

    Raises:
        ModelError: if the file is damaged.
    """
    file = checkpoint / "tokenizer.json"
    if text is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        with models.reading(checkpoint):
            return Tokenizer.from_file(str(file)).token_to_id(text)
    except Exception as e:  # tokenizers raises no other
        raise ModelError(f"{file} is damaged ({brief(e)}). Copy the tokenizer again, or remove it.") from e
