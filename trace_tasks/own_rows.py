"""A task of lm-eval whose rows are those of a folder that the user names, as TRACE_DATA and GENERAL_DATA do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask

from trace_tasks.data import rows_digest

#: What names the rows of tasks.
_VARIABLES = ("TRACE_DATA", "TRACE_REASONING", "TRACE_CL_BENCHMARK", "GENERAL_DATA")


class OwnRows(ConfigurableTask):
    """lm-eval's ConfigurableTask, which does not take the requests of other rows from a cache (`--cache_requests`)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """As ConfigurableTask; the key `class`, by which lm-eval has found the class, is left out."""
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        # The name of a task does not say which data it was; results of lm-eval hold the metadata.
        named = {variable: os.environ[variable] for variable in _VARIABLES if variable in os.environ}
        self.config.metadata = {**(self.config.metadata or {}), "data": named, "rows": rows_digest([self.eval_docs])}

    def build_all_requests(
        self, *, cache_requests: bool = False, tokenizer_name: str = "", samples: list[int] | None = None, **kwargs: Any
    ) -> None:
        """Makes the requests, or takes them from lm-eval's cache. See `ConfigurableTask.build_all_requests`.

        The cache knows requests by the name of the task, whatever its rows are now. It also knows the name of the
        tokenizer: rows, seed and what a request holds besides the prompt are added to it.
        """
        if cache_requests:
            seed = self.sampler.rnd.getstate() if self.config.num_fewshot else None
            shots = self.fewshot_docs() if self.config.num_fewshot else []
            key = rows_digest([self.eval_docs, shots or [], [self.config.generation_kwargs, seed, samples]])
            tokenizer_name = f"{tokenizer_name}-{key}"
        super().build_all_requests(
            cache_requests=cache_requests, tokenizer_name=tokenizer_name, samples=samples, **kwargs
        )
