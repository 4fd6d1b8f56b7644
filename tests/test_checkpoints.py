"""External checkpoints: those that fit the base model are served, all others refused before an engine starts."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier

import pytest
import torch
from conftest import load_merged
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig

from trace_bench.cli import main
from trace_bench.engine import checkpoints, models
from trace_bench.engine.architecture import check_base
from trace_bench.engine.checkpoints import another_base, check_checkpoints, config_differences
from trace_bench.engine.models import ModelError
from trace_bench.evaluate import external_run
from trace_bench.run import Run, RunError, read_json
from trace_tasks.data.files import write_json
from trace_tasks.limits import LimitError, limited

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "neox": GPTNeoXConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1),
}
#: Buffers in the hub's files of LLaMA-2, Pythia and GPT-2, which today's transformers does not save.
BUFFERS = {
    "llama": {"model.layers.{}.self_attn.rotary_emb.inv_freq": (16,)},
    "neox": {"gpt_neox.layers.{}.attention.bias": (1, 1, 64, 64), "gpt_neox.layers.{}.attention.masked_bias": ()},
    "gpt2": {"transformer.h.{}.attn.bias": (1, 1, 64, 64), "transformer.h.{}.attn.masked_bias": ()},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base models with random weights, by name."""
    root = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "r": 4, **options})


def make_adapter(base: Path, folder: Path, config) -> Path:
    """Saves an adapter with random weights, as a training would."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(bases, tmp_path) -> Path:
    """A plain LoRA adapter of the Llama."""
    return make_adapter(bases["llama"], tmp_path / "a", lora())


@pytest.fixture
def model(bases, tmp_path) -> Path:
    """A full checkpoint: a copy of the Llama."""
    return Path(shutil.copytree(bases["llama"], tmp_path / "m"))


def run_of(base: Path | str, *folders: Path, **entries) -> Run:
    """A run of checkpoints that is not written to the disk."""
    named = {f"v{i}": str(folder) for i, folder in enumerate(folders, 1)}
    return Run(Path("nowhere"), {"model": {"name": str(base)}, "tasks": [], "checkpoints": named, **entries})


def check(base: Path | str, *folders: Path, backend: str = "vllm", **entries) -> None:
    run = run_of(base, *folders, **entries)
    check_checkpoints(run, run.stages, backend)


def refused(message: str, *args, **kwargs) -> str:
    with pytest.raises((RunError, ModelError), match=message) as e:
        check(*args, **kwargs)
    return str(e.value)


def rewrite(folder: Path, change, file: str = "adapter_model.safetensors") -> Path:
    """Changes the tensors of a checkpoint."""
    save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})
    return folder


def without_first(tensors: dict) -> dict:
    return dict(sorted(tensors.items())[1:])


def reconfigure(folder: Path, file: str = "adapter_config.json", **entries) -> Path:
    write_json(folder / file, {**read_json(folder / file), **entries})
    return folder


# ---------------------------------------------------------------------------------------------------- kinds of adapters

#: Kind of adapter -> settings that PEFT needs in addition to its defaults on the tiny model.
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 32},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4]},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 32},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
}


def config_of(kind: str):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    named = {} if "target_modules" not in config.__dataclass_fields__ else {"target_modules": ["q_proj", "down_proj"]}
    return config(**{"task_type": "CAUSAL_LM", **named, **OPTIONS.get(kind, {})})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(checkpoints.MERGED | checkpoints.UNMERGED))
def test_served_kinds_fit_and_their_merged_model_is_the_trained_one(kind, bases, tmp_path):
    folder = make_adapter(bases["llama"], tmp_path / kind, config_of(kind))
    check(bases["llama"], folder, backend="hf")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), folder)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        trained = model.eval()(ids).logits
        if kind in checkpoints.UNMERGED:
            refused(rf"kind {kind}.*--backend hf", bases["llama"], folder)
        else:
            check(bases["llama"], folder)
            assert torch.allclose(model.merge_and_unload()(ids).logits, trained, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(bases["llama"])(ids).logits
    assert not torch.allclose(trained, base, atol=1e-5), "it changes the model"
    if len(load_file(folder / "adapter_model.safetensors")) > 1:
        refused("does not fit", bases["llama"], rewrite(folder, without_first), backend="hf")


@pytest.mark.parametrize(
    "entries, message",
    [
        # The router of Lily takes the mean of all tokens in a batch, with those that come later.
        *(({"peft_type": k}, f"the kind {k}, which is not supported.*LORA") for k in ("XLORA", "LILY", "NEW", None)),
        *(({"peft_type": kind}, f"the kind {kind}, .*PROMPT_TUNING") for kind in ("PREFIX_TUNING", "ADAPTION_PROMPT")),
        ({"task_type": "SEQ_CLS"}, "task type SEQ_CLS"),
        ({"alora_invocation_tokens": [1, 2]}, "uses alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication"),
        ({"lora_bias": True}, "LORA with lora_bias.*--backend hf"),
        # PEFT's merge would leave the wrapper around the whole module.
        ({"peft_type": "LN_TUNING", "modules_to_save": ["lm_head"]}, "LN_TUNING with modules_to_save.*--backend hf"),
        ({"peft_type": "PVERA", "sample_at_inference": True}, "sample_at_inference.*Set it to false"),
        *(
            ({"init_lora_weights": start}, f"has init_lora_weights='{start}': its training changed the weights")
            for start in ("pissa_niter_4", "corda", "lora_ga", "loftq", "new")
        ),
        (
            {"use_new_lora": True, "new_size": 0, "peft_version": "9.1"},
            r"has use_new_lora=True, which the installed PEFT does not know.*Install the PEFT that wrote it \(9\.1\)",
        ),
        ({"r": 8}, r"size mismatch for .*\[4, .*\[8, "),
        (
            {"target_modules": ["language_model.model.layers.0.self_attn.q_proj"]},
            r"not found in the base model.*such as model\.layers\.0",
        ),
    ],
)
def test_adapters_that_do_not_add_to_these_weights_are_refused(entries, message, bases, adapter):
    refused(message, bases["llama"], reconfigure(adapter, **entries))


#: Variants of LoRA, as options of its configuration.
LORA = [
    {"use_dora": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 2, "query_key_value": 2}, "alpha_pattern": {"down_proj": 3}},
    {"bias": "all"},
    {"bias": "lora_only", "layers_to_transform": [1]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"target_modules": "all-linear"},
    {"target_modules": r".*layers\.1\..*(q_proj|dense)"},
    {"modules_to_save": ["lm_head", "embed_tokens", "embed_in"]},
    {"trainable_token_indices": [3, 4]},
    {"target_modules": ["embed_tokens", "embed_in", "lm_head"]},
    {"task_type": None},
    {"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
]
#: Ordinary patterns of adapters, which are matched in time.
PATTERNS = [
    {"target_modules": r".*\.layers\.[0-9]+\.(self_attn|mlp)\.(q_proj|v_proj|down_proj)"},
    {"target_modules": r"model.layers.(0|1).self_attn.(q|v)_proj"},
    {"target_modules": r"^(?!.*down).*_proj$"},
    {"rank_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj": 8, "down_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    {"exclude_modules": r".*\.0\.mlp\.down_proj"},
    {"layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
]
NEOX = {"target_modules": ["query_key_value", "dense_4h_to_h"]}
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "base, options",
    [
        *(("llama", options) for options in (*LORA, *PATTERNS)),
        *(("neox", {**NEOX, **options}) for options in LORA),
        ("mixtral", EXPERTS),
    ],
)
def test_all_variants_of_lora_fit_and_a_removed_tensor_is_noticed(base, options, bases, tmp_path):
    folder = make_adapter(bases[base], tmp_path / "a", lora(**options))
    check(bases[base], folder)
    rewrite(folder, lambda t: dict([item for item in sorted(t.items()) if "base_layer" not in item[0]][:-1]))
    refused("does not fit", bases[base], folder)


@pytest.mark.filterwarnings("ignore")
def test_pruned_ranks_of_adalora_are_recognised(bases, tmp_path):
    whole = make_adapter(bases["llama"], tmp_path / "whole", config_of("ADALORA"))
    pruned, kept = Path(shutil.copytree(whole, tmp_path / "pruned")), [i % 3 == 0 for i in range(12)]
    rewrite(whole, lambda t: {k: v * torch.tensor(kept)[:, None] if "lora_E" in k else v for k, v in t.items()})
    sides = {"lora_E": 0, "lora_A": 0, "lora_B": 1}
    rewrite(
        pruned,
        lambda t: {k: v.index_select(sides[k[-6:]], torch.arange(0, 12, 3)) for k, v in t.items() if k[-6:] in sides},
    )
    names = [
        k.removeprefix("base_model.model.") for k in load_file(pruned / "adapter_model.safetensors") if "lora_E" in k
    ]
    reconfigure(pruned, rank_pattern=dict.fromkeys(names, kept))
    check(bases["llama"], pruned)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted, found = (models.load_model(str(bases["llama"]), f).eval()(ids).logits for f in (whole, pruned))
    assert torch.allclose(found, wanted, atol=1e-5)
    reconfigure(pruned, rank_pattern=dict.fromkeys(names, [True] * 2 + [False] * 10))
    refused("does not fit", bases["llama"], pruned)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_ties_its_own_head_and_embeddings_is_merged_into_a_whole_model(tmp_path):
    torch.manual_seed(0)
    tied = LlamaConfig(**SIZES, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(tied).save_pretrained(tmp_path / "tied")
    options = lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    base, folder = str(tmp_path / "tied"), make_adapter(tmp_path / "tied", tmp_path / "a", options)
    models.save_merged(base, folder, str(tmp_path / "merged"), None, False)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        merged, wanted = models.load_model(str(tmp_path / "merged"), None), models.load_model(base, folder)
        assert torch.allclose(merged.eval()(ids).logits, wanted.eval()(ids).logits, atol=1e-5)


@pytest.fixture
def of_experts(bases, tmp_path) -> tuple[Path, Path]:
    """An adapter with matrices for each expert, as in older transformers, and the model with the adapter added."""
    folder, merged = tmp_path / "experts", Path(shutil.copytree(bases["mixtral"], tmp_path / "merged"))
    torch.manual_seed(2)
    weights, pairs = load_file(merged / "model.safetensors"), {}
    for name in sorted(weights):
        if ".experts." in name:
            pair = [torch.randn(4, weights[name].shape[1]) / 4, torch.randn(weights[name].shape[0], 4) / 4]
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            pairs |= {f"{stem}.lora_A.weight": pair[0], f"{stem}.lora_B.weight": pair[1]}
            weights[name] += 2.0 * pair[1] @ pair[0]
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    lora(
        target_modules=["w1", "w2", "w3"], lora_alpha=8, base_model_name_or_path=str(bases["mixtral"])
    ).save_pretrained(folder)
    save_file(pairs, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder, merged


def test_adapters_of_single_experts_are_joined_unless_their_scales_differ(bases, of_experts):
    folder, merged = of_experts
    check(bases["mixtral"], folder)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        for load in (models.load_model, load_merged):
            assert torch.allclose(load(str(bases["mixtral"]), folder).eval()(ids).logits, wanted, atol=1e-4)
    assert checkpoints.plain_lora_rank(folder) is None
    reconfigure(folder, use_rslora=True)
    refused(r"an adapter for each expert.*with use_rslora", bases["mixtral"], folder)


def test_lora_requests_get_only_adapters_that_vllm_serves(bases, tmp_path):
    """VLLM would ignore the diagonal of KaSA, and an option that it does not know."""
    plain = make_adapter(bases["llama"], tmp_path / "plain", lora(use_rslora=True, lora_dropout=0.1))
    assert checkpoints.plain_lora_rank(plain) == 4
    of_training = {"kasa_config": KasaConfig()}, {"monteclora_config": MontecloraConfig()}
    for more in (*of_training, {"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        folder = make_adapter(bases["llama"], tmp_path / next(iter(more)), lora(**more))
        check(bases["llama"], folder)
        assert checkpoints.plain_lora_rank(folder) is None
    embeddings = {"base_model.model.model.embed_tokens.weight": torch.zeros(96, 64)}
    assert checkpoints.plain_lora_rank(rewrite(plain, lambda tensors: tensors | embeddings)) is None


def test_an_adapter_next_to_a_full_model_is_refused(bases, adapter, model):
    shutil.copytree(adapter, model, dirs_exist_ok=True)
    refused("has both an adapter and a full model", bases["llama"], model, backend="hf")


def test_a_base_model_with_an_adapter_in_its_folder_is_refused(adapter, model, monkeypatch):
    """Transformers would put the adapter on the base model itself."""
    shutil.copytree(adapter, model, dirs_exist_ok=True)
    with pytest.raises(ModelError, match=r"has an adapter \(adapter_config\.json\)"):
        models.resolve_model(str(model))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **_: str(model / file))
    with pytest.raises(ModelError, match="mine/both has an adapter"):
        models.pinned_revision("mine/both")


def test_a_soft_prompt_with_a_wrong_width_or_length_is_refused(bases, tmp_path):
    folder = make_adapter(bases["llama"], tmp_path / "a", config_of("PROMPT_TUNING"))
    check(bases["llama"], folder)
    reconfigure(folder, num_virtual_tokens=3)
    refused(r"prompt_embeddings have shape \[4, 64\].*width give \[3, 64\]", bases["llama"], folder)
    reconfigure(folder, num_virtual_tokens=4)
    rewrite(folder, lambda tensors: {k: v[:, :32].contiguous() for k, v in tensors.items()})
    refused(r"prompt_embeddings have shape \[4, 32\].*width give \[4, 64\]", bases["llama"], folder)


# ----------------------------------------------------------------------------------------------------- names and shapes


def test_an_adapter_whose_tensors_fit_no_module_is_refused_with_both_names(bases, adapter):
    """PEFT only warns ("Found missing adapter keys"), and the base model would be measured."""
    mine = "base_model.model.language_model.model.layers"
    rewrite(adapter, lambda tensors: {k.replace("base_model.model.model.layers", mine): v for k, v in tensors.items()})
    text = refused("8 of its tensors fit no module, such as base_model.model.language_model", bases["llama"], adapter)
    assert "modules that it names, such as base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" in text


def test_a_module_with_a_different_vocabulary_is_refused(bases, tmp_path):
    folder = make_adapter(bases["llama"], tmp_path / "a", lora(modules_to_save=["lm_head"]))
    rewrite(folder, lambda t: {k: torch.zeros(104, 64) if "lm_head" in k else v for k, v in t.items()})
    refused(r"size mismatch for .*lm_head.*\[104, 64\].*\[96, 64\].*added tokens: merge it", bases["llama"], folder)


@pytest.mark.parametrize(
    "file, damage",
    [
        ("adapter_config.json", lambda content: content[:100]),
        ("adapter_config.json", lambda content: b"[]"),
        ("adapter_model.safetensors", lambda content: content[:100]),
        *(
            ("adapter_model.safetensors", lambda content, n=n: n.to_bytes(8, "little") + content[8:])
            for n in (2**63, 10**8, 0)
        ),
    ],
)
def test_a_damaged_adapter_is_an_error_that_names_the_file(file, damage, bases, adapter):
    (adapter / file).write_bytes(damage((adapter / file).read_bytes()))
    refused(f"{file} is .*damaged", bases["llama"], adapter)


# ------------------------------------------------------------------------------------------------------- the base model


@pytest.mark.parametrize(
    "model, said, other",
    [
        ("meta-llama/Llama-2-7b-hf", None, False),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", False),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/llama-2-7b-hf", False),
        ("meta-llama/Llama-2-7b-hf", "/data/models/Llama-2-7b-hf/", False),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", True),
        ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b-hf", True),
        ("meta-llama/Llama-2-7b-hf", "/data/models/merged-1", True),
        ("m/x", "/h/hub/models--m--x/snapshots/" + "a" * 40, False),
        ("m/x", "/h/hub/models--m--x/snapshots/" + "b" * 40, True),
        ("m/x", "/h/hub/models--n--x/snapshots/" + "a" * 40, True),
    ],
)
def test_the_base_that_an_adapter_names_is_compared_by_name_and_commit(model, said, other):
    entry = {"name": model, "revision": "a" * 40}
    assert (another_base({"base_model_name_or_path": said}, entry) is not None) == other


def test_the_revision_that_an_adapter_names_is_compared(monkeypatch):
    entry = {"name": "EleutherAI/pythia-1b", "revision": "a" * 40}
    known = {"step3000": "b" * 40, "v1": "a" * 40}

    def pinned(base, revision="main"):
        if revision not in known:
            raise ModelError(revision)
        return known[revision]

    monkeypatch.setattr("trace_bench.engine.models.pinned_revision", pinned)
    for revision, other in {None: 0, "main": 0, "v1": 0, "a" * 40: 0, "step3000": 1, "b" * 40: 1, "gone": 1}.items():
        adapter = {"base_model_name_or_path": "EleutherAI/pythia-1b", "revision": revision}
        assert bool(another_base(adapter, entry)) == other, revision


def test_the_base_that_an_adapter_names_is_compared_by_its_files(bases, tmp_path):
    base = bases["llama"]
    for name in ("copy", "other", "longer rope"):
        shutil.copytree(base, tmp_path / name)
    (tmp_path / "copy" / "README.md").write_text("mine")
    rewrite(tmp_path / "other", lambda tensors: {k: v + 1 for k, v in tensors.items()}, "model.safetensors")
    reconfigure(tmp_path / "longer rope", "config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    (tmp_path / "link").symlink_to(base)
    same = [str(base), f"{base}/../llama/", str(tmp_path / "link"), str(tmp_path / "copy"), "org/Llama", "/gone/llama"]
    other = [str(tmp_path / "other"), str(tmp_path / "longer rope"), "org/llama-2", "/gone/merged", "\0", "x" * 999]
    for said in (*same, *other):
        found = another_base({"base_model_name_or_path": said}, {"name": str(base)})
        assert (found is None) == (said in same), said


def external(path: Path, base: Path, folders: dict[str, Path], **options) -> Run:
    """A run of checkpoints without tasks, which needs no data."""
    return external_run(
        path, {k: str(v) for k, v in folders.items()}, model=str(base), tasks=[], settings={"backend": "hf"}, **options
    )


def test_a_different_base_is_an_error_that_options_can_overrule(bases, adapter, tmp_path):
    base, path = bases["llama"], tmp_path / "run"
    reconfigure(adapter, base_model_name_or_path="/gone/merged-1")
    with pytest.raises(RunError, match=r"not trained from the base model.*merged-1.*--model.*--renamed-base.*--chain"):
        external(path, base, {"v1": adapter})
    assert not path.exists(), "nothing is recorded"
    run = external(path, base, {"v1": adapter}, renamed_base=True)
    assert run.manifest["renamed_base"] is True and "chain" not in run.manifest
    check_checkpoints(Run.open(path), Run.open(path).stages, "hf")  # it is remembered


def test_two_commands_that_add_checkpoints_at_the_same_time_lose_none(bases, tmp_path, monkeypatch):
    base, path, both = bases["llama"], tmp_path / "run", Barrier(2)
    folders = {name: make_adapter(base, tmp_path / name, lora()) for name in "abcd"}
    # Both have read the run before one of them writes.
    monkeypatch.setattr("trace_bench.evaluate.external.check_checkpoints", lambda *args: both.wait(60))
    for pair in ("ab", "cd"):  # to a new run, and to one that is measured
        with ThreadPoolExecutor(2) as pool:
            runs = [*pool.map(lambda name: external(path, base, {name: folders[name]}), pair)]
        assert {name for run in runs for name in run.manifest["checkpoints"]} >= {*pair}
        assert {*pair} <= Run.open(path).manifest["checkpoints"].keys()
        write_json(path / "stages" / "0_base" / "eval" / "x.json", {})
    assert sorted(Run.open(path).manifest["checkpoints"]) == [*"abcd"]


# --------------------------------------------------------------------------------------------------------------- chains


def test_a_chain_stacks_adapters_in_the_order_given(bases, tmp_path):
    base, path = bases["llama"], tmp_path / "run"
    folders = {f"v{i}": make_adapter(base, tmp_path / f"v{i}", lora()) for i in (1, 2, 3)}
    for i in (2, 3):  # each was trained on the previous merged model
        reconfigure(folders[f"v{i}"], base_model_name_or_path=f"/gone/merged-{i - 1}")
    run = external(path, base, {k: folders[k] for k in ("v1", "v2")}, chain=True)
    assert run.manifest["chain"] is True
    assert [stage.below for stage in run.stages] == [(), (), (folders["v1"],)]
    write_json(path / "stages" / "1_v1" / "eval" / "x.json", {})
    for names in (("v2", "v1"), ("v3", "v1")):
        with pytest.raises(RunError, match="fixed order, which is v1, v2"):
            external(path, base, {k: folders[k] for k in names}, chain=True)
    with pytest.raises(RunError, match=r"chain: True -> 'absent'"):
        external(path, base, {"v3": folders["v3"]}, renamed_base=True)
    run = external(path, base, {"v3": folders["v3"]}, chain=True)
    assert Run.open(path).stages[3].below == (folders["v1"], folders["v2"])


def test_the_fingerprint_of_a_stage_of_a_chain_covers_the_adapters_below(bases, tmp_path):
    folders = [make_adapter(bases["llama"], tmp_path / f"v{i}", lora()) for i in (1, 2)]
    chain, apart = run_of(bases["llama"], *folders, chain=True), run_of(bases["llama"], *folders)
    before = [s.fingerprint() for s in chain.stages]
    assert before[:2] == [s.fingerprint() for s in apart.stages][:2]
    assert before[2] != apart.stages[2].fingerprint()
    rewrite(folders[0], lambda tensors: {k: v + 1 for k, v in tensors.items()})
    after = [s.fingerprint() for s in chain.stages]
    assert before[1] != after[1] and before[2] != after[2]


def test_only_the_first_adapter_of_a_chain_must_name_the_base_but_all_must_fit(bases, tmp_path):
    folders = [make_adapter(bases["llama"], tmp_path / f"v{i}", lora()) for i in (1, 2)]
    reconfigure(folders[1], base_model_name_or_path="/gone/merged")
    check(bases["llama"], *folders, chain=True)
    refused("v2 was not trained from the base.*--chain", bases["llama"], *folders)
    refused("v2 was not trained from the base", bases["llama"], *reversed(folders), chain=True)
    rewrite(folders[0], without_first)
    run = run_of(bases["llama"], *folders, chain=True)
    with pytest.raises(RunError, match="v1 does not fit"):
        check_checkpoints(run, run.stages[2:], "hf")  # it is below in the chain


def test_full_models_and_soft_prompts_cannot_be_in_a_chain(bases, adapter, tmp_path):
    refused(r"is a full model.*without --chain", bases["llama"], adapter, bases["llama"], chain=True)
    prompt = make_adapter(bases["llama"], tmp_path / "p", config_of("PROMPT_TUNING"))
    refused(r"is a soft prompt.*without --chain", bases["llama"], adapter, prompt, chain=True)


def test_the_command_records_both_options_and_refuses_them_without_checkpoints(bases, tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr("trace_bench.evaluate.evaluate", lambda run, **_: evaluated.append(run) or 1)
    monkeypatch.setattr("trace_tasks.data.source_fingerprint", lambda name: "x")
    folders = [make_adapter(bases["llama"], tmp_path / f"v{i}", lora()) for i in (1, 2, 3)]
    reconfigure(folders[0], base_model_name_or_path="/gone/x")
    command = ["evaluate", str(tmp_path / "run")]
    given = [f"--checkpoint=v{i}={folder}" for i, folder in enumerate(folders, 1)]
    rest = ["--model", str(bases["llama"]), "--tasks", "none", "--general", "general_boolq", "--backend", "hf"]
    main([*command, *given[:2], *rest, "--chain", "--renamed-base"])
    (run,) = evaluated
    assert run.manifest["chain"] is run.manifest["renamed_base"] is True and run.stages[2].below == (folders[0],)
    assert not {"chain", "renamed_base"} & run.manifest["config"].keys()
    with pytest.raises(SystemExit, match="--chain: only with --checkpoint"):
        main([*command, "--chain"])
    write_json(run.path / "stages" / "1_v1" / "eval" / "general_boolq.json", {})
    main([*command, given[2]])  # alone, it goes on top of the chain
    assert evaluated[-1].stages[3].below == tuple(folders[:2])


# ---------------------------------------------------------------------------------------------------------- full models


@pytest.mark.parametrize("base", BUFFERS)
def test_buffers_in_files_do_not_count_as_weights(base, bases, tmp_path):
    with_buffers, without = tmp_path / "with", tmp_path / "without"
    for folder in (with_buffers, without):
        shutil.copytree(bases[base], folder)
    buffers = {name.format(i): torch.ones(shape) for name, shape in BUFFERS[base].items() for i in range(2)}
    rewrite(with_buffers, lambda tensors: tensors | buffers, "model.safetensors")
    for a, b in ((with_buffers, without), (without, with_buffers)):
        for backend in ("vllm", "hf"):
            check(a, b, backend=backend)
    rewrite(without, without_first, "model.safetensors")  # a real tensor is still missed
    refused(r"without lacks 1 tensors of the model that its config\.json describes", with_buffers, without)


def test_tensor_names_of_older_files_are_recognised(bases, tmp_path):
    """GPT-2's file on the hub has no prefix, Mixtral's has a tensor for each expert."""
    shutil.copytree(bases["gpt2"], tmp_path / "gpt2")
    rewrite(tmp_path / "gpt2", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}, "model.safetensors")
    check(bases["gpt2"], tmp_path / "gpt2")
    names = load_file(bases["mixtral"] / "model.safetensors").keys()
    assert any("block_sparse_moe.experts.3.w2" in name for name in names), "as on the hub"
    mixtral = Path(shutil.copytree(bases["mixtral"], tmp_path / "mixtral"))
    check(bases["mixtral"], mixtral)
    rewrite(mixtral, lambda t: {k: v for k, v in t.items() if "experts.3.w2" not in k}, "model.safetensors")
    refused("mixtral", bases["mixtral"], mixtral)


MORE = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    "change, message",
    [
        # A training program that wraps the model saves such names: "module.", "_orig_mod.".
        (
            lambda tensors: {f"module.{k}": v for k, v in tensors.items()},
            r"such as lm_head\.weight; it has module\.lm_head\.weight",
        ),
        (
            lambda tensors: tensors | {MORE: torch.ones(64)},
            f"1 tensors that do not belong to the model .*, such as {MORE}",
        ),
        (lambda tensors: {k: torch.empty(0) for k in tensors}, r"no values for \d+ tensors.*ZeRO-3.*zero_to_fp32\.py"),
        (lambda tensors: tensors | {"v_head.weight": torch.ones(64)}, None),
    ],
)
def test_a_checkpoint_with_different_tensor_names_is_refused_with_both_names(change, message, bases, model, caplog):
    rewrite(model, change, "model.safetensors")
    if message:
        refused(message, bases["llama"], model, backend="hf")
    else:
        check(bases["llama"], model)
        assert "tensors outside the language model, such as v_head.weight" in caplog.text


@pytest.mark.parametrize("prefix", ["", "model.model."], ids=["without", "twice"])
def test_names_that_only_transformers_completes_are_refused_for_vllm(prefix, bases, model):
    """The model within the causal one may be saved alone. vLLM would fail when the base model is measured."""
    rewrite(model, lambda t: {k.replace("model.", prefix, 1): v for k, v in t.items()}, "model.safetensors")
    check(bases["llama"], model, backend="hf")
    for base in (bases["llama"], model):
        refused(f"tensor names such as {prefix}embed_tokens.weight.*save it again", base, model)


def test_the_names_that_save_pretrained_gives_a_model_with_images_are_known(tmp_path):
    """Those of Gemma 3 have no first part "model.", on the hub and whenever it is saved."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    parts = {"vision_config": {**sizes, "image_size": 28, "patch_size": 14}, "text_config": {**sizes, "vocab_size": 96}}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", **parts, eos_token_id=1))
    made.save_pretrained(tmp_path / "m")
    assert "multi_modal_projector.mm_input_projection_weight" in load_file(tmp_path / "m" / "model.safetensors")
    check(tmp_path / "m", tmp_path / "m")


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}'])
def test_a_generation_config_without_eos_is_refused_before_the_base_is_measured(content, bases, model):
    (model / "generation_config.json").write_text(content)
    for base in (bases["llama"], model):
        refused("generation_config.json is damaged|eos_token_id is '</s>'", base, model, backend="hf")


def test_a_checkpoint_of_a_different_size_is_served_only_with_its_own_config(bases, tmp_path):
    small = LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, num_key_value_heads=2, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "m")
    check(bases["llama"], tmp_path / "m", backend="hf")
    refused("m lacks 9 tensors of the base model", bases["llama"], tmp_path / "m")
    wide = LlamaConfig(**{**SIZES, "vocab_size": 104}, num_key_value_heads=2, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "w")
    check(bases["llama"], tmp_path / "w", backend="hf")
    refused(r"has shape \[104, 64\], but .* has \[96, 64\].*--backend hf", bases["llama"], tmp_path / "w")


def test_a_checkpoint_without_embeddings_of_tokens_of_the_tokenizer_is_refused(tiny_model, tmp_path):
    """Its evaluation would end at the first text with such a token."""
    resized = AutoModelForCausalLM.from_pretrained(tiny_model)
    for size in (250, 300):
        resized.resize_token_embeddings(size)
        resized.save_pretrained(shutil.copytree(tiny_model, tmp_path / str(size)))
    refused(r"has 250 embeddings and .* 259: 9 tokens", tiny_model, tmp_path / "250", backend="hf")
    check(tiny_model, tmp_path / "300", backend="hf")
    check(tmp_path / "300", tiny_model, backend="hf")  # of rows that no token has some may go


def test_models_with_code_and_models_that_are_not_causal_are_refused(bases, model, tmp_path):
    (model / "mine.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    for config in ({"model_type": "t5"}, {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}, {}):
        write_json(model / "config.json", config)
        refused(str(model), bases["llama"], model, backend="hf")
    assert not (tmp_path / "ran").exists()


def in_parts(folder: Path) -> None:
    """Splits the weights of a full model into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    parts = {f"model-0000{n}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    write_json(folder / "model.safetensors.index.json", index)


def test_weights_are_searched_where_transformers_reads_them(bases, model):
    """A folder may have two models, one for transformers and one for vLLM, or parts that neither finds."""
    single, index = model / "model.safetensors", model / "model.safetensors.index.json"
    in_parts(model)
    refused(r"has two models.*would load model\.safetensors, but vLLM the files", bases["llama"], model, backend="hf")
    single.unlink()
    check(bases["llama"], model)
    index.unlink()
    for backend in ("hf", "vllm"):
        refused(r"has no model\.safetensors and no .*it has model-00001", bases["llama"], model, backend=backend)
    next(model.glob("*-00001-*")).rename(single)  # half of the weights under the name of all
    refused(r"lacks \d+ tensors of the model", bases["llama"], model, backend="hf")
    next(model.glob("*-00002-*")).unlink()
    reconfigure(model, "config.json", quantization_config={})  # vLLM takes that as none, and would keep the base's
    refused(r"lacks \d+ tensors of the model", bases["llama"], model)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "optimizer.safetensors"])
def test_additional_weights_that_vllm_would_load_are_refused_for_vllm(name, bases, model):
    shutil.copy(bases["llama"] / "model.safetensors", model / name)
    check(bases["llama"], model, backend="hf")
    refused(f"has {name} next to the model", bases["llama"], model)
    refused(f"has {name} next to the model", model, bases["llama"])
    in_parts(model)
    (model / "model.safetensors").unlink()
    check(bases["llama"], model)  # vLLM takes what the index names


GROUPS = {"bits": 4, "group_size": 128, "zero_point": True}


@pytest.mark.parametrize(
    "packed",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        *({"quant_method": how, **GROUPS} for how in ("gptq", "awq")),
        {},
    ],
)
def test_quantised_weights_without_their_package_are_refused_before_the_base_is_measured(packed, bases, model):
    reconfigure(model, "config.json", quantization_config=packed)
    refused("has quantised weights that transformers cannot load here", bases["llama"], model, backend="hf")


def test_a_checkpoint_that_became_a_model_for_embeddings_is_refused(bases, model):
    """Its states of a token depend on those behind it, so what is generated depends on the cache."""
    reconfigure(model, "config.json", is_causal=False)
    refused("m reads a text in both directions", bases["llama"], model, backend="hf")


# ------------------------------------------------------------------------------------------------------ the base itself


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if name not in key}


@pytest.mark.parametrize("name", ["lm_head", "layers.1.mlp.down_proj"])
def test_a_base_model_that_lacks_tensors_is_refused(name, bases, model, adapter):
    rewrite(model, without(name), "model.safetensors")
    for backend in ("hf", "vllm"):
        refused(rf"lacks 1 tensors of the model .*{name}", model, bases["llama"], backend=backend)
    for checkpoint in (None, adapter):  # one of the hub is noticed in the same way
        with pytest.raises(ModelError, match=rf"lacks 1 tensors of its model, such as .*{name}"):
            models.load_model(str(model), checkpoint)


def test_a_base_model_whose_head_contradicts_its_config_is_refused(tiny_model, tmp_path):
    """Transformers would accept it, but vLLM and lm-eval's class would not."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    rewrite(folder, lambda t: {**t, "lm_head.weight": torch.randn(259, 128)}, "model.safetensors")
    for use in (lambda: check(folder), lambda: models.load_model(str(folder), None)):
        with pytest.raises(ModelError, match="ties the head to the embeddings"):
            use()
    check(tiny_model, folder)
    served = models.load_model(str(tiny_model), folder)
    served.tie_weights()
    assert torch.equal(served.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])
    check(reconfigure(folder, "config.json", tie_word_embeddings=False), backend="hf")


@pytest.mark.parametrize("size", ["1GB", "100KB"])
def test_the_embedding_of_the_padding_token_is_read_from_the_file(size, tmp_path):
    """Transformers clears it when it loads a Youtu. Here it is EOS, and tied to the head."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("youtu", vocab_size=300, **sizes, eos_token_id=2, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings().weight.data[2] = 1.0
    model.save_pretrained(tmp_path, max_shard_size=size)
    loaded = models.load_model(str(tmp_path), None).state_dict()
    assert not [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, loaded[name])]


def test_attention_applies_the_soft_cap(tmp_path):
    """A tiny cap gives all tokens equal attention, as without queries. Torch's kernel ignores caps."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 300, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes, attn_logit_softcapping=1e-6))
    model.save_pretrained(tmp_path)
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(models.load_model(str(tmp_path), None)(ids).logits, model(ids).logits)


# ---------------------------------------------------------------------------------------------------------- config.json


LLAMA = json.loads(CONFIGS["llama"].to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
OLD_ROPE = {k: v for k, v in LLAMA.items() if k != "rope_parameters"} | {"rope_theta": 10000.0, "rope_scaling": None}
MIXTRAL = json.loads(CONFIGS["mixtral"].to_json_string())


@pytest.mark.parametrize(
    "base, theirs, lines",
    [
        (LLAMA, {**LLAMA, "dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": False}, []),
        (LLAMA, {**LLAMA, "eos_token_id": [1, 2], "vocab_size": 104, "unsloth_fixed": True}, []),
        (LLAMA, {k: v for k, v in LLAMA.items() if k not in ("head_dim", "mlp_bias", "tie_word_embeddings")}, []),
        (LLAMA, OLD_ROPE, []),
        (OLD_ROPE, {**OLD_ROPE, "rope_theta": 10000}, []),
        (LLAMA, {**OLD_ROPE, "rope_theta": 1e6}, ["rope_parameters.rope_theta: 10000.0 -> 1000000.0"]),
        (
            {**OLD_ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {**OLD_ROPE, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            ["rope_parameters.factor: 2.0 -> 4.0"],
        ),
        (LLAMA, {**LLAMA, "rms_norm_eps": 1e-5}, ["rms_norm_eps: 1e-06 -> 1e-05"]),
        (LLAMA, {**LLAMA, "hidden_act": "gelu"}, ["hidden_act: 'silu' -> 'gelu'"]),
        (LLAMA, {**LLAMA, "attention_bias": True}, ["attention_bias: False -> True"]),
        (LLAMA, {**LLAMA, "tie_word_embeddings": True}, ["tie_word_embeddings: False -> True"]),
        (LLAMA, {**LLAMA, "logit_scale": 0.5}, ["logit_scale: None -> 0.5"]),
        (LLAMA, {**LLAMA, "quantization_config": {"bits": 4}}, ["quantization_config.bits: None -> 4"]),
        (
            MIXTRAL,
            {**MIXTRAL, "num_experts_per_tok": 1, "sliding_window": 8},
            ["num_experts_per_tok: 2 -> 1", "sliding_window: None -> 8"],
        ),
        (
            {**LLAMA, "layer_types": ["full_attention"] * 2, "max_window_layers": 28},
            {**LLAMA, "model_type": "qwen2"},
            ["model_type: 'llama' -> 'qwen2'"],
        ),
    ],
)
def test_only_entries_of_a_config_that_change_answers_count(base, theirs, lines, tmp_path):
    for name, config in {"base": base, "theirs": theirs}.items():
        write_json(tmp_path / name / "config.json", config)
    assert config_differences(tmp_path / "base", tmp_path / "theirs") == lines


def test_a_tied_config_with_a_separate_head_in_the_file_is_untied(tiny_model, tmp_path, monkeypatch):
    """Transformers unties it, but an engine that was started with the tied base would ignore the head."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    assert config_differences(tiny_model, folder) == []
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": embedding.clone()}, "model.safetensors")
    assert config_differences(tiny_model, folder) == []
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": embedding + 1}, "model.safetensors")
    assert config_differences(tiny_model, folder) == ["tie_word_embeddings: True -> False"]
    read = models.load_config  # vLLM loads a base model of the hub without this head, transformers with it
    monkeypatch.setattr(models, "load_config", lambda base, *more: read(folder if base == "mine/tied" else base, *more))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *words, **more: str(folder))
    with pytest.raises(ModelError, match="a different head"):
        check_base("mine/tied", "vllm", False)


# ------------------------------------------------------------------------------------- what would never come to an end

SLOW = r"(.*)*(.*)*(.*)*(.*)*x"


@pytest.fixture
def little_time(monkeypatch):
    monkeypatch.setattr(models, "READING", (0.4, 2**30))


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, entries",
    [
        ("LORA", {"target_modules": r"(\w+\.?)*\d!"}),
        ("LORA", {"target_modules": SLOW}),
        ("LORA", {"exclude_modules": SLOW}),
        ("LORA", {"rank_pattern": {SLOW: 8}}),
        ("LORA", {"layers_pattern": [SLOW], "layers_to_transform": [0]}),
        ("LORA", {"r": 10**9}),
        ("LORA", {"init_lora_weights": "pissa_niter_1000000000"}),
        ("LORA", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}}),
        ("LORA", {"layer_replication": [[0, 10**9]]}),
        ("VERA", {"r": 10**9}),
        ("PEANUT", {"depth": 10**9}),
        ("OFT", {"num_cayley_neumann_terms": 10**9}),
        ("PROMPT_TUNING", {"num_virtual_tokens": 10**9}),
        ("IA3", {"target_modules": SLOW}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_adapter_that_takes_too_much_time_or_memory_is_refused(kind, entries, bases, tmp_path, little_time):
    folder = make_adapter(bases["llama"], tmp_path / "a", config_of(kind))
    refused(str(folder), bases["llama"], reconfigure(folder, **entries), backend="hf")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**18, "hidden_size": 10**18},
        {"num_labels": 10**10},
        {"hidden_size": -1},
        {"num_hidden_layers": "many"},
        {"model_type": "mixtral", "num_local_experts": 10**18},
    ],
    ids=str,
)
def test_a_config_with_absurd_sizes_is_refused_quickly(entries, bases, model, little_time):
    assert "\n" not in refused(str(model), bases["llama"], reconfigure(model, "config.json", **entries), backend="hf")


@pytest.mark.timeout(60)
def test_an_adapter_in_a_foreign_run_has_the_same_limits(bases, tmp_path, little_time):
    """Its train.json may have any fingerprint, so the fingerprint does not make the adapter trustworthy."""
    origin = {"method": "m", "model": {"name": str(bases["llama"])}, "tasks": ["trace_fomc"], "data": {}, "config": {}}
    run = Run.create(tmp_path / "run", origin)
    folder = make_adapter(bases["llama"], run.stages[1].path / "adapter", lora())
    kept = read_json(folder / "adapter_config.json")
    for entries in ({}, {"target_modules": SLOW}, {"init_lora_weights": "pissa_niter_999999"}):
        write_json(folder / "adapter_config.json", {**kept, **entries})
        write_json(run.stages[1].train_file, {"checkpoint": checkpoints.fingerprint(folder)})
        with pytest.raises(RunError, match=str(folder)) if entries else nullcontext():
            check_checkpoints(run, run.stages, "hf")


def test_an_interrupted_call_leaves_no_open_context():
    """Torch restores a device's context by such a generator. If it ends late, its device stays set for later code."""
    closed = []

    def opened():
        try:
            yield
        finally:
            closed.append(True)

    def work():
        generator = opened()
        next(generator)
        torch.set_grad_enabled(False)  # as an interrupted end of `no_grad` leaves it
        while True:
            pass

    with pytest.raises(LimitError) as kept, limited(0.05, 2**30):
        work()
    assert closed and kept.value.__context__ and torch.is_grad_enabled()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_model_does_not_block(name, bases, model):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for use in (lambda: check(bases["llama"], model), lambda: models.resolve_model(str(model))):
        with pytest.raises(ModelError, match=rf"{name} is a pipe|not a model: it has no config"):
            use()


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja"])
def test_a_too_long_file_of_a_model_is_refused(name, bases, model):
    with (model / name).open("ab") as f:
        f.truncate(models.MOST_FILE + 1)
    refused(rf"{name} is damaged: it has more than 256 MiB", bases["llama"], model)


@pytest.mark.parametrize(
    "content",
    [{"weight_map": {"a": "../other/model.safetensors"}}, {"weight_map": {"a": 3}}, {"weight_map": ["a"]}, []],
)
def test_an_index_may_only_name_files_of_its_folder(content, bases, model):
    write_json(model / "model.safetensors.index.json", content)
    refused(r"index\.json is damaged", bases["llama"], model)
