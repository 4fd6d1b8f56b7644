"""The arguments and conditions with which vLLM is started, tested without vLLM."""

import contextlib
import ctypes
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import train

from trace_bench import engine
from trace_bench.engine.gpu import has_gpu
from trace_bench.run import read_json
from trace_tasks.data.files import write_json
from trainers.base import CLConfig, answering

LONGROPE = {
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
        "original_max_position_embeddings": 4096,
    }
}


@pytest.fixture
def started(monkeypatch):
    """The arguments of each start; as on a GPU, with a model that has no LoRA in vLLM."""
    starts = []

    class Swap:
        def __init__(self, **kwargs):
            starts.append(kwargs)
            if kwargs.get("enable_lora"):
                raise ValueError("StableLm does not support LoRA yet.")

    module = SimpleNamespace(FORCING="forcing", SwapVLLM=Swap)
    monkeypatch.setitem(sys.modules, "trace_bench.engine.vllm", module)
    monkeypatch.setattr(engine, "prepare_vllm", lambda args: None)
    monkeypatch.setattr(engine, "_has_newer_runner", lambda: True)
    for where in (engine, engine.start):
        monkeypatch.setattr(where, "has_gpu", lambda: True)
    return starts


def test_adapters_are_merged_if_vllm_has_no_lora_for_the_model(options, started, caplog):
    adapter = train(options).stages[1].checkpoint
    engine.open_engine("vllm", options["model_name_or_path"], checkpoints=[adapter])
    first, second = started
    assert first["adapters"] == [adapter] and first["max_lora_rank"] == 8
    kinds = {name: start[name] for start in started for name in ("tokenizer_mode", "config_format", "load_format")}
    assert set(kinds.values()) == {"hf"}, "of Mistral's models it would take other files than transformers does"
    args = {"enable_lora": True, "max_loras": 4}
    assert engine.start.lora_args(args, [adapter]) == [adapter] and args["max_cpu_loras"] == 4, "vLLM refuses fewer"
    assert second["enable_lora"] is False and not {"adapters", "max_lora_rank", "max_loras"} & second.keys()
    assert "adapters are merged: StableLm does not support LoRA yet" in caplog.text
    with pytest.raises(engine.EngineError, match="does not support LoRA"):  # as it was asked for
        engine.open_engine(
            "vllm", options["model_name_or_path"], engine_args={"enable_lora": True}, checkpoints=[adapter]
        )


@pytest.mark.parametrize(("visible", "dtype"), [("0", "float32"), ("1", None)])
def test_on_a_gpu_without_bfloat16_training_and_evaluation_compute_in_float32(visible, dtype, monkeypatch):
    """As on a machine with a T4 and an A100. CUDA itself is not asked: it would bar the GPU to vLLM's engine."""

    class Nvml:
        def nvmlInit(self): ...

        def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
            handle._obj.value = index + 100

        def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
            major._obj.value, minor._obj.value = {100: (7, 5), 101: (8, 0)}[handle.value]

    monkeypatch.setattr(engine.gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", {"libnvidia-ml.so.1": Nvml()}.__getitem__)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert engine.with_dtype({}).get("dtype") == dtype and engine.with_dtype({"dtype": "half"}) == {"dtype": "half"}
    options = {"output_dir": "x", "tasks": ["trace_fomc"], "use_cpu": True}
    assert CLConfig(**options).bf16 is (dtype is None) and CLConfig(**options, bf16=True).bf16 is True
    monkeypatch.delattr(Nvml, "nvmlInit")
    assert engine.with_dtype({}) == {}, "where NVML does not tell, the model's own type stays"


@pytest.mark.parametrize(("devices", "method"), [("MIG-1a2b", "spawn"), ("GPU-1a2b", None), ("0,1", None)])
def test_vllm_forks_its_engine_only_if_torch_counts_gpus_without_cuda(devices, method):
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": devices}):
        os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
        nvml = {"_raw_device_count_nvml": lambda: 2, "_raw_device_uuid_nvml": lambda: ["GPU-1a2b"]}
        with mock.patch.multiple(torch.cuda, **nvml):
            assert (torch.cuda._device_count_nvml() < 0) == (method == "spawn"), "then it calls cudaGetDeviceCount"
        has_gpu()
        assert os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == method


def test_only_a_way_to_give_known_tokens_that_vllm_accepts_is_switched_on(options, started, monkeypatch):
    """With speculative decoding it accepts none, and the older runner's way is slow."""
    drafts = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    for newer, forced, args in ((True, False, {}), (False, True, {}), (False, False, {}), (True, True, drafts)):
        monkeypatch.setattr(engine, "_has_newer_runner", lambda newer=newer: newer)
        engine.open_engine("vllm", options["model_name_or_path"], engine_args=args, forced=forced)
    names = ("enable_trace_replay", "logits_processors")
    assert [{name: start[name] for name in names if name in start} for start in started] == [
        {"enable_trace_replay": True},
        {"logits_processors": ["forcing"]},
        {},
        {},
    ]


def test_log_probabilities_that_vllm_would_not_give_are_refused_at_the_start(options, started, monkeypatch):
    monkeypatch.setattr(engine, "has_gpu", lambda: False)
    arguments = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    with pytest.raises(engine.EngineError, match=r"without a GPU: vLLM then gives no token.* Leave it out"):
        engine.open_engine("vllm", options["model_name_or_path"], engine_args=arguments)
    assert not started


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, True),
        ({"model_type": "granitemoehybrid", "mamba_d_head": "auto"}, False),
        ({"model_type": "mamba2", "num_heads": 8, "head_dim": 32}, False),
    ],
    ids=["Llama", "Granite 4", "Mamba-2"],
)
def test_states_are_not_cached_without_a_gpu(settings, kept, options, started, monkeypatch, tmp_path):
    """VLLM's code for them on CPUs fails at a prompt of more than 256 tokens. On a GPU vLLM decides."""
    folder = Path(shutil.copytree(options["model_name_or_path"], tmp_path / "m"))
    write_json(folder / "config.json", read_json(folder / "config.json") | settings)
    for gpu in (False, True):
        monkeypatch.setattr(engine, "has_gpu", lambda gpu=gpu: gpu)
        engine.open_engine("vllm", str(folder))
    assert [start.get("enable_prefix_caching") for start in started] == [None if kept else False, None]


def test_asking_for_a_gpu_before_importing_vllm_leaves_it_usable_for_the_engine(monkeypatch, tmp_path):
    """The engine is a fork of this process. After torch itself has asked, forks cannot use CUDA's runtime."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "")
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK")
    by_nvml = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: by_nvml.append(torch.cuda._nvml_based_avail()) or False)
    monkeypatch.setattr(engine, "open_engine", lambda *args, **kwargs: None)
    job = {"sampling": {"temperature": 1.0}, "seed": 0}
    order = {"jobs": [], "engine_args": {}, "checkpoint": None, "backend": "vllm", "base": "x", "revision": None}
    for jobs in ([], [job]):
        write_json(tmp_path / "order.json", {**order, "jobs": jobs})
        with contextlib.suppress(AttributeError):  # there is no engine
            answering.answer(tmp_path / "order.json")
    assert by_nvml and all(by_nvml)


DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "max_position_embeddings": 4096,
}


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
#: Positions for each type of layer.
NESTED = [
    {
        "model_type": "gemma3_text",
        "rope_parameters": {"sliding_attention": PLAIN, "full_attention": settings["rope_parameters"]},
        **{name: value for name, value in settings.items() if name != "rope_parameters"},
    }
    for settings in (LONGROPE, DYNAMIC)
]


@pytest.mark.parametrize("settings", [LONGROPE, DYNAMIC, *NESTED, {"model_type": "cohere2", "sliding_window": 4096}])
def test_the_context_is_one_in_which_vllm_reads_texts_as_training_does(settings, options, started):
    """VLLM takes the long factors of Phi-3 for every text once its context is longer, and wider windows of Cohere 2.

    With dynamic positions it allows `factor` times the context, but has positions for the context alone.
    """
    folder = Path(options["model_name_or_path"])
    config = read_json(folder / "config.json") | {"max_position_embeddings": 131072, **settings}
    plain = Path(shutil.copytree(folder, options["output_dir"]))
    engine.open_engine("vllm", str(plain))
    write_json(plain / "config.json", config)
    engine.open_engine("vllm", str(plain))
    engine.open_engine("vllm", str(plain), engine_args={"max_model_len": 512})
    assert [start.get("max_model_len") for start in started] == [None, 4096, 512]
    later = {"max_model_len": None}  # so lm-eval has it, with which a checkpoint gets an engine of its own
    engine.bound_context("m", engine.models.load_config(plain, None, False), later)
    assert later == {"max_model_len": 4096}
    for length in (8192, -1, 0):
        with pytest.raises(engine.EngineError, match=rf"max_model_len={length} is not allowed.* Use 1 to 4096, or"):
            engine.open_engine("vllm", str(plain), engine_args={"max_model_len": length})
