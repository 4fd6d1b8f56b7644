"""In-context learning: nothing is trained; the base model is evaluated with demonstrations in front of each prompt.

A baseline of the paper ("ICL", section 4.1): six demonstrations, balanced over the answers on classification tasks,
no answer twice elsewhere, in half of the length budget. Prompts, the ends of answers and scores are those of the
official ICL code (`trace_tasks.utils.TraceTask`): the instruction once, then its sentence that announces examples, then
demonstrations and question without the instruction; MeetingBank has no demonstrations; the answer is the first
generated token (C-STANCE, FOMC) or what precedes the text by which the next example would begin.

What differs: demonstrations are drawn from training rows that are no test prompt, with the run's seed (officially
from the test rows, so that a question can be among its own demonstrations); decoding is greedy (officially sampled at
temperature 0.1). Prompts have up to 3584 tokens as officially, or what the model's context has room for.
`--num_fewshot 0` is the base model alone, asked and decoded as every other run.

    python -m trainers.icl --config trainers/configs/quickstart.yaml --output_dir runs/icl
"""

import logging
from dataclasses import dataclass
from typing import Any

from trace_bench.engine import models
from trace_bench.engine.architecture import context_length
from trace_bench.evaluate import answer_tokens
from trace_bench.tasks import load_tasks
from trace_tasks.utils import ICL_VERSION
from trainers.base import CLConfig, CLTrainer, ConfigError, main, option
from trainers.base.config import ENGINE_CONTEXT

log = logging.getLogger(__name__)


@dataclass
class ICLConfig(CLConfig):
    """CLConfig; only its options for the evaluation are used."""

    num_fewshot: int = option(6, "Number of demonstrations in each prompt; 0 = none.", least=0)
    icl_prompt_length: int = option(
        3584, "Most tokens of a prompt with demonstrations, instead of max_prompt_length.", least=1
    )

    @property
    def stages(self) -> list[str]:
        """No stage is trained."""
        return []


class ICLTrainer(CLTrainer):
    """Never asked to train."""

    own_memory = True

    @classmethod
    def prepare(cls, config: ICLConfig, model_args: Any) -> dict[str, Any]:
        """Makes room for prompts with demonstrations: in the limit of prompts, and in the engine's context."""
        if not config.num_fewshot:
            return {}
        answers = (answer_tokens(task) for task in load_tasks(config.tasks).values())
        answer = min(max(answers), config.max_new_tokens or 10**9)
        context = context_length(models.read_config(model_args.model_name_or_path, model_args.model_revision)) or 10**9
        room = context - answer
        if room < 1:
            raise ConfigError(
                f"An answer of {answer} tokens fills the model's context of {context}. Lower max_new_tokens."
            )
        config.max_prompt_length = min(config.icl_prompt_length, room)
        if room < config.icl_prompt_length:
            log.warning(
                "Prompts with demonstrations have at most %d tokens, not %d: an answer needs %d tokens of the model's "
                "context of %d.",
                *(room, config.icl_prompt_length, answer, context),
            )
        engine, needed = config.engine_args or {}, config.max_prompt_length + answer
        assert isinstance(engine, dict)
        for name in ENGINE_CONTEXT:
            given = engine.get(name)
            if given and given < needed:
                log.warning(
                    "engine_args %s=%d is raised to %d, which prompts with demonstrations need. To keep it, use "
                    "--icl_prompt_length %d.",
                    *(name, given, needed, max(given - answer, 1)),
                )
                engine = config.engine_args = {**engine, name: needed}
        return {"icl": ICL_VERSION}


if __name__ == "__main__":
    main(ICLTrainer, ICLConfig)
