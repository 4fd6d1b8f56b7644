"""A task of lm-eval whose rows come from a folder that the user names, such as TRACE_DATA or GENERAL_DATA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask

from trace_tasks.data import rows_digest

#: The variables that name the folders with the rows of tasks.
_VARIABLES = ("TRACE_DATA", "TRACE_REASONING", "TRACE_CL_BENCHMARK", "GENERAL_DATA")


class OwnRows(ConfigurableTask):
    """lm-eval's ConfigurableTask, but `--cache_requests` never returns the requests of different rows."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Like ConfigurableTask, but without the key `class`, by which lm-eval has found this class."""
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        # The name of a task does not say which data was used, so it is added to the metadata in lm-eval's results.
        named = {variable: os.environ[variable] for variable in _VARIABLES if variable in os.environ}
        self.config.metadata = {**(self.config.metadata or {}), "data": named, "rows": rows_digest([self.eval_docs])}

    def build_all_requests(
        self, *, cache_requests: bool = False, tokenizer_name: str = "", samples: list[int] | None = None, **kwargs: Any
    ) -> None:
        """Makes the requests, or takes them from lm-eval's cache. See `ConfigurableTask.build_all_requests`.

        lm-eval's key of a cached request has the names of task and tokenizer, but not the rows. So the rows, the seed
        and the settings of the requests are added to the name of the tokenizer.
        """
        if cache_requests:
            seed = self.sampler.rnd.getstate() if self.config.num_fewshot else None
            shots = self.fewshot_docs() if self.config.num_fewshot else []
            key = rows_digest([self.eval_docs, shots or [], [self.config.generation_kwargs, seed, samples]])
            tokenizer_name = f"{tokenizer_name}-{key}"
        super().build_all_requests(
            cache_requests=cache_requests, tokenizer_name=tokenizer_name, samples=samples, **kwargs
        )
