"""The limits of the methods' own options, tested with the nearest values on both sides of each."""

import pytest
from conftest import config_of

from trainers.base import ConfigError

WEIGHT = ((-0.1,), (0.0, 1.5))
SHARE = ((-0.1, 1.1), (0.0, 1.0))
PART = ((0.0, 1.1), (0.1, 1.0))  # a share above 0
COUNT = ((0,), (1, 2))
COUNT_OR_NONE = ((-1,), (0, 1))
LIMITS = {
    "anchor": {"anchor_lambda": WEIGHT},
    "der": {"replay_ratio": PART, "der_lambda": SHARE, "der_top": COUNT},
    "ewc": {"ewc_lambda": WEIGHT, "ewc_gamma": SHARE, "ewc_rows": COUNT},
    "freeze": {"freeze_layers": COUNT_OR_NONE, "freeze_from": COUNT},
    "gem": {"gem_margin": WEIGHT, "memory_rows": COUNT, "memory_batch_size": COUNT},
    "icl": {"num_fewshot": COUNT_OR_NONE, "icl_prompt_length": COUNT},
    "inflora": {"inflora_threshold": SHARE, "inflora_rows": COUNT},
    "lfpt5": {
        **{"replay_ratio": SHARE, "lfpt5_lm": WEIGHT, "lfpt5_kl": WEIGHT},
        **{"lfpt5_temperature": ((0.0,), (0.1, 3.0)), "prompt_tokens": COUNT},
    },
    "lwf": {"lwf_lambda": WEIGHT, "lwf_temperature": ((0.0,), (0.1, 3.0))},
    "migu": {"migu_quantile": SHARE},
    "mofo": {"mofo_fraction": PART},
    "nlora": {"nlora_lambda": WEIGHT},
    "ogd": {"ogd_rows": COUNT, "ogd_size": COUNT},
    "olora": {"olora_lambda": WEIGHT},
    "opr": {"replay_ratio": PART, "opr_prompts": COUNT, "opr_samples": COUNT, "opr_temperature": WEIGHT},
    "osf": {"osf_preserved": ((0.0, 1.0), (0.1, 0.9))},
    "pp": {"prompt_tokens": COUNT, "prompt_mlp": ((-1,), (0, 2))},
    "replay": {"replay_ratio": SHARE, "alignment_rows": COUNT},
    "rewrite": {"rewrite_accept": SHARE, "rewrite_temperature": WEIGHT, "rewrite_top_p": PART},
    "sdft": {"sdft_ema": SHARE, "sdft_tokens": COUNT},
    "seekr": {
        **{"replay_ratio": PART, "seekr_weight": WEIGHT, "seekr_layers": COUNT, "seekr_heads": COUNT},
        **{"seekr_queries": COUNT},
    },
    "stm": {"stm_threshold": ((0.9,), (1.0, 5.0))},
    "sequential": {
        **dict.fromkeys(("train_rows", "test_rows", "max_prompt_length", "max_answer_length", "max_new_tokens"), COUNT),
        **{"general_rows": COUNT, "judged_rows": COUNT, "judged_max_new_tokens": COUNT, "replay_ratio": SHARE},
    },
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, own in LIMITS.items() for option in own])
def test_an_option_is_refused_beyond_its_limits_and_allowed_at_them(name, option):
    config, (refused, allowed) = config_of(name), LIMITS[name][option]
    for value in refused:
        with pytest.raises(ConfigError, match=f"{option}={value!r} is not allowed"):
            config(output_dir="x", **{option: value})
    for value in allowed:
        assert getattr(config(output_dir="x", **{option: value}), option) == value
