"""The engine of transformers' generate for a model that is in memory and in training."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from trace_bench.engine.hf import SwapHF

#: The greedy settings are put on the model, and on the one within PEFT's, which hands its own on when it generates.
_SETTINGS = "generation_config"


class LiveHF(SwapHF):
    """Answers with the weights that a model has at the moment. Use it within `left_as_it_was`.

    Args:
        model: A causal model of transformers, or PEFT's model around one; without DDP's wrapper.
        tokenizer: Its tokenizer, of which a copy is used.
        batch_size: Prompts at once.
        precision: The dtype of autocast that the training uses; None = none.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, precision: torch.dtype | None = None) -> None:
        # lm-eval would tie the weights of a model that it is given, and set the padding of its tokenizer.
        stand_in = SimpleNamespace(config=model.config, device=model.device)
        options = {"batch_size": batch_size, "mixed_precision_dtype": precision}
        with quiet():
            super().__init__(pretrained=stand_in, tokenizer=copy.deepcopy(tokenizer), **options)
        self.base, self.max_prompt_length = model.config._name_or_path or type(model).__name__, None
        self.tokenizer = copy.deepcopy(tokenizer)
        self.take(model)
        self.served = {"weights": "in training"}
        found = model.generation_config.eos_token_id
        self.ends = frozenset({tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])} - {None})

    def take(self, model: Any) -> None:
        """Uses this model from now on; its soft prompt is copied, and put next to the text."""
        self._model, self.soft_prompt = model, None
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            self._model, self.soft_prompt = model.get_base_model(), model.get_prompt(1)[0].detach()

    @property
    def device(self) -> torch.device:
        """Where the model is now: the trainer may have moved it."""
        return self._model.device

    def decode_greedily(self) -> None:
        """See `SwapHF`; PEFT's model hands on the settings of its own, if it has some."""
        super().decode_greedily()
        if _SETTINGS in vars(self._model):
            self._model.generation_config = self._inner.generation_config

    @contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """In the block the model answers greedily and without dropout; then it and the random state are restored.

        Compiled code is not used: it would be compiled again for each new length of a text, and dynamo's limit on that
        would then end compilation for the training, too.
        """
        modes = {module: module.training for module in self._model.modules()}
        models = {id(m): m for m in (self._model, self._inner) if _SETTINGS in vars(m)}.values()
        settings = [(m, vars(m)[_SETTINGS]) for m in models]
        try:
            with same_numbers(self.device), torch.compiler.set_stance("force_eager"), quiet():
                self._model.eval()
                self.decode_greedily()
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for model, own in settings:
                model.generation_config = own


@contextmanager
def same_numbers(device: torch.device) -> Iterator[None]:
    """Afterwards the next random numbers, those of the device too, are what they would have been."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the lines that lm-eval logs for each evaluation: they would interrupt the training's output."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
