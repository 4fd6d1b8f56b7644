"""Merging: the formulas against values by hand and PEFT, the method's stages, and `trace-bench merge`."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import error, quick_options, stop_at, train
from method_runs import as_method, same
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trace_bench import evaluate
from trace_bench.cli import main
from trace_bench.engine import averaging, combining
from trace_bench.engine.averaging import Merge, between, cut, mean, merge_adapters, merge_models
from trace_bench.run import read_json
from trace_tasks.data.files import digest
from trainers.base import CLConfig, CLTrainer, ConfigError
from trainers.merge import MergeConfig, MergeTrainer, orthonormal

ADAPTER = "adapter_model.safetensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def products(folder: Path) -> dict[str, torch.Tensor]:
    """Name of A -> the weights that an adapter adds there."""
    found, s = tensors(folder), averaging.scaling(read_json(folder / "adapter_config.json"))
    return {
        name: s * (found[name.replace("lora_A", "lora_B")] @ A).float() for name, A in found.items() if "lora_A" in name
    }


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=atol)


def make_adapter(model: Path, folder: Path, seed: int, **changes) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes}
    adapted = get_peft_model(base, LoraConfig(**options))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


def make_model(model: Path, folder: Path, seed: int, dtype: torch.dtype = torch.float32, **changes) -> Path:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    torch.manual_seed(seed)
    for parameter in loaded.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    loaded.save_pretrained(folder, **changes)
    return folder


@pytest.fixture
def adapters(tiny_model, tmp_path) -> list[Path]:
    """Two adapters of one base model with different ranks and scalings."""
    return [
        make_adapter(tiny_model, tmp_path / "a", 1),
        make_adapter(tiny_model, tmp_path / "b", 2, r=6, lora_alpha=30, use_rslora=True),
    ]


@pytest.fixture
def full(tiny_model, tmp_path) -> list[Path]:
    return [make_model(tiny_model, tmp_path / f"m{seed}", seed) for seed in (1, 2)]


@pytest.fixture
def merged(tmp_path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    return folder


# ----------------------------------------------------------------------------------------------------------- the maths


def test_means_of_weights_equal_values_by_hand_at_all_ratios():
    a, b = torch.tensor([1.0, -2.0, 0.1]), torch.tensor([3.0, 2.0, 0.7])
    assert torch.equal(mean([a, b], [Fraction(1, 2)] * 2), torch.tensor([2.0, 0.0, 0.4]))
    assert torch.equal(between(a, b, 0.25), torch.tensor([1.5, -1.0, 0.25]))
    assert torch.equal(between(a, b, 0.0), a) and torch.equal(between(a, b, 1.0), b)
    odd = torch.randn(1000)
    for n in range(1, 12):
        assert torch.equal(mean([odd] * n, [Fraction(1, n)] * n), odd)
    assert torch.equal(mean([a, b], [Fraction(0), Fraction(1)]), b)


def test_magmax_takes_the_largest_change_of_each_weight():
    base = torch.tensor([1.0, 1.0, 1.0, 0.0])
    one, two = torch.tensor([3.0, 0.0, 1.0, -0.5]), torch.tensor([2.0, 1.5, 1.0, 0.5])
    how = Merge("magmax", alpha=1.0)
    assert how.of_vectors(base, [one, two], "w").tolist() == [3.0, 0.0, 1.0, 0.5], "of equals the later one"
    assert Merge("magmax").of_vectors(base, [one, two], "w").tolist() == [2.0, 0.5, 1.0, 0.25]
    odd = torch.randn(1000)
    assert torch.equal(how.of_vectors(torch.randn(1000), [odd, odd], "w"), odd)
    assert torch.equal(Merge("magmax", alpha=0.0).of_vectors(base, [one, two], "w"), base)


def test_ties_equals_values_worked_by_hand():
    """Changes are trimmed to 3 of 5, the sums elect the signs, and the mean is over the changes that agree."""
    one, two = torch.tensor([4.0, -3.0, 0.1, 2.0, 0.0]), torch.tensor([2.0, 5.0, 0.2, 0.1, -1.0])
    found = Merge("ties", density=0.6).of_vectors(torch.ones(5), [1 + one, 1 + two], "w")
    torch.testing.assert_close(found, 1 + torch.tensor([3.0, 5.0, 0.0, 2.0, -1.0]))


def test_dare_keeps_the_mean_and_is_seeded():
    how, vector = Merge("dare", density=0.25, seed=3), torch.ones(40_000)
    found = how.of_vectors(torch.zeros(40_000), [vector], "w")
    assert set(found.tolist()) == {0.0, 4.0} and abs(found.mean() - 1) < 0.05
    state = torch.get_rng_state()
    assert torch.equal(found, how.of_vectors(torch.zeros(40_000), [vector], "w"))
    assert torch.equal(state, torch.get_rng_state()), "the training's random numbers are its own"
    assert not torch.equal(found, how.of_vectors(torch.zeros(40_000), [vector], "v"))


def test_the_cut_to_a_rank_is_the_best_approximation():
    torch.manual_seed(0)
    A, B = torch.randn(6, 20), torch.randn(30, 6)
    a, b, kept, whole = cut(A, B, 3)
    U, S, V = torch.linalg.svd(B @ A)
    torch.testing.assert_close(b @ a, (U[:, :3] * S[:3]) @ V[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a @ a.T, torch.eye(3), atol=1e-5, rtol=0)
    assert abs(1 - kept / whole - float((B @ A - b @ a).square().sum() / (B @ A).square().sum())) < 1e-5


# ------------------------------------------------------------------------------------------------------------ adapters


def test_the_mean_of_adapters_is_that_of_their_products(adapters, merged):
    assert merge_adapters(adapters, merged, Merge("average")) == {"rank": 10, "lost": 0.0}
    one, two = map(products, adapters)
    close(products(merged), {name: (one[name] + two[name]) / 2 for name in one})
    assert merge_adapters(adapters, merged, Merge("wise", 0.25))["rank"] == 10
    close(products(merged), {name: 0.75 * one[name] + 0.25 * two[name] for name in one})
    assert merge_adapters(adapters[:1], merged, Merge("wise", 0.25))["rank"] == 4
    close(products(merged), {name: 0.25 * one[name] for name in one})


def test_merging_equal_adapters_or_at_the_ends_of_alpha_gives_the_bytes_of_one(adapters, tmp_path):
    one, two = adapters
    copy = shutil.copytree(one, tmp_path / "copy")
    for i, (sources, how, wanted) in enumerate(
        [
            ([one, copy], Merge("average"), one),
            ([one, copy, one], Merge("average"), one),
            ([one, copy], Merge("wise", 0.3), one),
            ([one, two], Merge("wise", 0.0), one),
            ([one, two], Merge("wise", 1.0), two),
            ([two], Merge("wise", 1.0), two),
        ]
    ):
        (target := tmp_path / f"out{i}").mkdir()
        assert merge_adapters(sources, target, how)["lost"] == 0
        for name in (ADAPTER, "adapter_config.json"):
            assert (target / name).read_bytes() == (wanted / name).read_bytes()
    (target := tmp_path / "base").mkdir()
    merge_adapters([one], target, Merge("wise", 0.0))
    assert not any(product.any() for product in products(target).values())


@pytest.mark.parametrize("method", ["average", "magmax", "ties"])
def test_equal_adapters_are_the_same_model_by_every_method(method, adapters, merged, tmp_path):
    copy = shutil.copytree(adapters[0], tmp_path / "copy")
    record = merge_adapters([adapters[0], copy], merged, Merge(method, 1.0, 1.0), rank=4)
    assert record["rank"] == 4 and record["lost"] < 1e-6
    close(products(merged), products(adapters[0]), atol=1e-5)


@pytest.mark.parametrize("method, kind", [("ties", "ties_svd"), ("dare", "dare_linear_svd"), ("average", "svd")])
def test_merges_equal_those_of_pefts_add_weighted_adapter(method, kind, tiny_model, adapters, merged, monkeypatch):
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(loaded, adapters[0], adapter_name="one")
    model.load_adapter(adapters[1], adapter_name="two")
    weights = [1.0, 1.0] if method == "ties" else [0.5, 0.5]
    given = {} if method == "average" else {"density": 0.3}
    if method == "dare":  # for each module, PEFT must draw from the same random numbers as we do
        lora = model.base_model
        original = lora._svd_generalized_task_arithmetic_weighted_adapter
        places = {id(m): n for n, m in model.named_modules()}

        def seeded(combination, given_adapters, w, rank, target, *args, **kwargs):
            name = f"{places[id(target)]}.lora_A.weight"
            torch.manual_seed(int(digest([0, name]), 16) % 2**63)
            return original(combination, given_adapters, w, rank, target, *args, **kwargs)

        monkeypatch.setattr(lora, "_svd_generalized_task_arithmetic_weighted_adapter", seeded)
    model.add_weighted_adapter(["one", "two"], weights, "both", kind, svd_rank=5, **given)
    wanted = {
        f"{name}.lora_A.weight": module.get_delta_weight("both")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    merge_adapters(adapters, merged, Merge(method, density=given.get("density")), rank=5)
    close(products(merged), {name: delta.detach() for name, delta in wanted.items()}, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- full models


def test_merges_of_full_models_equal_values_by_hand(full, tiny_model, merged):
    one, two, base = (tensors(folder) for folder in (*full, tiny_model))
    merge_models(full, merged, Merge("average"))
    close(tensors(merged), {name: (one[name] + two[name]) / 2 for name in one})
    for how, sources, origin, wanted in [
        (Merge("wise", 0.0), full, None, one),
        (Merge("wise", 1.0), full, None, two),
        (Merge("wise", 0.0), full[:1], tiny_model, base),
        (Merge("wise", 1.0), full[:1], tiny_model, one),
        (Merge("average"), [full[0], full[0], full[0]], None, one),
        (Merge("magmax", 1.0), [full[1], full[1]], tiny_model, two),
        (Merge("magmax", 0.0), full, tiny_model, base),
        (Merge("ties", 0.0), full, tiny_model, base),
    ]:
        merge_models(sources, merged, how, origin)
        assert same(tensors(merged), wanted)
    merge_models(full, merged, Merge("magmax"), tiny_model)
    for name, found in tensors(merged).items():
        a, b = one[name] - base[name], two[name] - base[name]
        torch.testing.assert_close(found, base[name] + 0.5 * torch.where(b.abs() >= a.abs(), b, a))
    assert AutoModelForCausalLM.from_pretrained(merged).config.tie_word_embeddings


def test_bf16_models_in_several_files_are_merged_without_bias(tiny_model, tmp_path, merged):
    """Each merged weight is one of two neighbours, but their mean over all weights is exact."""
    one = make_model(tiny_model, tmp_path / "one", 1, torch.bfloat16, max_shard_size="200KB")
    two = make_model(tiny_model, tmp_path / "two", 2, torch.bfloat16)
    assert len(list(one.glob("*.safetensors"))) > 2
    merge_models([two, one], merged, Merge("wise", 0.1))
    assert sorted(p.name for p in merged.iterdir()) == sorted(p.name for p in one.iterdir())
    a, b, found = (AutoModelForCausalLM.from_pretrained(f, dtype="auto").state_dict() for f in (two, one, merged))
    name = "model.embed_tokens.weight"
    assert found[name].dtype == torch.bfloat16
    exact = 0.9 * a[name].float() + 0.1 * b[name].float()
    assert ((found[name].float() - exact).abs() <= 2**-7 * exact.abs() + 1e-6).all()
    assert abs((found[name].float() - exact).mean()) < 1e-5
    merge_models([one, one], merged, Merge("average"))
    assert same(AutoModelForCausalLM.from_pretrained(merged, dtype="auto").state_dict(), b)
    merge_models([make_model(tiny_model, tmp_path / "wide", 3), one], merged, Merge("average"))
    kinds = {tensor.dtype for file in merged.glob("*.safetensors") for tensor in load_file(file).values()}
    assert kinds == {torch.bfloat16}, "as the config of the last one says, which is copied"


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("kind", ["adapters", "full"])
def test_merge_writes_a_checkpoint_that_evaluate_accepts(kind, request, tiny_model, tmp_path, demo_data, capsys):
    sources, out = request.getfixturevalue(kind), tmp_path / "new" / "out"
    main(["merge", *map(str, sources), "--method", "magmax", "--output", str(out), "--model", str(tiny_model)])
    assert str(out) in capsys.readouterr().out
    record = read_json(out / "merged_from.json")
    assert record["method"] == "magmax" and record["alpha"] == 0.5 and "density" not in record
    assert [c["name"] for c in record["checkpoints"]] == [s.name for s in sources]
    assert str(tmp_path) not in json.dumps(record) and record["kind"] == {"full": "model"}.get(kind, "adapter")
    command = ["evaluate", str(tmp_path / "run"), "--model", str(tiny_model), "--checkpoint", f"mix={out}"]
    command += ["--tasks", "trace_fomc", "--test-rows", "2", "--max-prompt-length", "96", "--max-new-tokens", "2"]
    main([*command, "--backend", "hf"])
    assert (tmp_path / "run/stages/1_mix/eval/trace_fomc.json").exists()
    assert "already exists" in error("merge", *sources, "--method", "average", "--output", out)


def test_checkpoints_that_do_not_fit_are_refused_before_weights_are_loaded(
    adapters, full, tiny_model, tmp_path, monkeypatch
):
    for name in ("merge_adapters", "merge_models"):
        monkeypatch.setattr(f"trace_bench.engine.combining.{name}", lambda *a, **k: pytest.fail("weights were read"))
    out = tmp_path / "out"

    def said(*sources, method="average", options=()):
        return error("merge", *sources, "--method", method, "--output", out, *options)

    one, two = adapters
    assert "all checkpoints must be of one kind" in said(one, full[0])
    wide = shutil.copytree(two, tmp_path / "wide")
    grown = {n: torch.cat([t, t], dim=1) if "lora_A" in n else t for n, t in tensors(wide).items()}
    save_file(grown, wide / ADAPTER)
    assert "has shape" in said(one, wide)
    other = make_adapter(tiny_model, tmp_path / "other", 3, target_modules=["v_proj"])
    assert "does not fit" in said(one, other)
    config = read_json(two / "adapter_config.json")
    (two / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "their/other-7b"}))
    assert "different base models" in said(one, two)
    for changes, words in [
        ({"use_dora": True}, "use_dora"),
        ({"of_a_later_peft": {"a": 1}}, "of_a_later_peft"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, "bias"),
        ({"r": 5}, "r=5"),
        ({"r": None}, "no number for r"),
    ]:
        (two / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        assert words in said(one, two)
    (two / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "eva"}))
    assert combining.check([one, two], Merge("average")), "it leaves the weights of the base as they are"
    assert "two checkpoints or more" in said(one)
    assert "or two" in said(one, one, one, method="wise")
    assert "needs their base" in said(*full, method="ties")
    assert "needs their base" in said(full[0], method="wise")
    assert "needs no base" in said(*full, options=("--model", tiny_model))
    assert "no rank" in said(*full, options=("--rank", 4))
    assert "--alpha is for" in said(*full, options=("--alpha", 0.5))
    assert "from 0 to 1" in said(*full, method="wise", options=("--alpha", 1.5))
    assert "--density 0.0" in said(*full, method="ties", options=("--density", 0, "--model", tiny_model))
    assert "not a checkpoint" in said(tmp_path / "nowhere", one)
    settings = read_json(full[1] / "config.json")
    (full[1] / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    assert "rms_norm_eps" in said(*full)
    (full[1] / "config.json").write_text(json.dumps(settings))
    weights = tensors(full[1])
    weights.pop("model.norm.weight")
    save_file(weights, full[1] / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight is missing" in said(*full)
    (full[1] / "model.safetensors").rename(full[1] / "pytorch_model.bin")
    assert "only safetensors" in said(*full)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_failed_merge_leaves_nothing(full, tmp_path, monkeypatch):
    monkeypatch.setattr("trace_bench.engine.averaging.mean", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        from trace_bench.engine.combining import combine

        combine(full, tmp_path / "out", Merge("average"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# ---------------------------------------------------------------------------------------------------------- the method


def stages(options: dict, **changes):
    """A run of three tasks, trained by the plain method or by merge."""
    tasks = ["trace_fomc", "trace_numglue_ds", "trace_numglue_cm"]
    options = {**options, "tasks": tasks, "max_steps": 2, "lora_dropout": 0.0, "bf16": False, **changes}
    return train(options, *((MergeTrainer, MergeConfig) if "merge" in changes else (CLTrainer, CLConfig)))


@pytest.fixture(scope="module")
def sequential(tiny_models, tmp_path_factory):
    return stages(quick_options(tiny_models["bytes"], tmp_path_factory.mktemp("sequential") / "run"))


def test_merge_alpha_1_is_sequential_training_to_the_byte(options, sequential):
    run = stages(options, merge="wise", merge_alpha=1.0)
    for stage, plain in zip(run.stages[1:], sequential.stages[1:], strict=True):
        assert (stage.checkpoint / ADAPTER).read_bytes() == (plain.checkpoint / ADAPTER).read_bytes()
        assert not stage.method_state.exists()


def test_merge_alpha_0_never_leaves_the_base_model(options):
    run = stages(options, merge="wise", merge_alpha=0.0)
    assert not any(p.any() for stage in run.stages[1:] for p in products(stage.checkpoint).values())


@pytest.mark.parametrize("merge", ["wise", "average", "magmax", "ties", "dare"])
def test_unmerged_stages_are_those_of_sequential_training_and_their_merge_is_evaluated(merge, options, sequential):
    run = stages(options, merge=merge, merge_start="unmerged")
    trained = [stage.method_state for stage in run.stages[1:]]
    for own, plain in zip(trained, sequential.stages[1:], strict=True):
        assert (own / ADAPTER).read_bytes() == (plain.checkpoint / ADAPTER).read_bytes()
    found, parts = products(run.stages[3].checkpoint), [products(own) for own in trained]
    if merge == "wise":
        close(found, {n: 0.125 * parts[0][n] + 0.25 * parts[1][n] + 0.5 * parts[2][n] for n in found}, atol=1e-5)
    if merge == "average":
        close(found, {n: sum(part[n] for part in parts) / 3 for n in found}, atol=1e-5)
    record = read_json(run.stages[3].train_file)["merged"]
    assert record["rank"] == 12 and (record["lost"] == 0) == (merge in ("wise", "average"))


def test_the_next_stage_trains_the_merged_adapter_cut_to_its_rank(options):
    """The cut loses at most alpha (1 - alpha) |dB dA|."""
    seen = []

    class Spy(MergeTrainer):
        def merge(self, own, folder):
            record = super().merge(own, folder)
            if self.stage.index > 1:
                before, after = tensors(self.previous.checkpoint), tensors(own)
                exact, found = self.exact(own), products(folder)
                for name in exact:
                    partner = name.replace("lora_A", "lora_B")
                    change = (after[partner] - before[partner]) @ (after[name] - before[name])
                    s = averaging.scaling(read_json(own / "adapter_config.json"))
                    seen.append(((exact[name] - found[name]).norm(), 0.25 * s * change.norm()))
            return record

        def exact(self, own):
            one, two = products(self.previous.checkpoint), products(own)
            return {name: (one[name] + two[name]) / 2 for name in one}

    changes = {"merge": "wise", "lora_dropout": 0.0, "learning_rate": 1e-3}
    run = train({**options, **changes}, as_method(Spy), MergeConfig)
    assert seen and all(lost <= bound + 1e-6 for lost, bound in seen)
    assert any(bound > 1e-6 for _, bound in seen)
    assert read_json(run.stages[2].checkpoint / "adapter_config.json")["r"] == options["lora_r"]


def test_slao_averages_b_and_starts_with_an_orthonormal_a(options):
    begun = {}

    class Spy(MergeTrainer):
        def begin_stage(self):
            begun[self.stage.index] = {n: p.detach().clone() for n, p in self.trained().items()}

    run = train({**options, "merge": "slao"}, as_method(Spy), MergeConfig)
    (first, own, both) = (
        tensors(f) for f in (run.stages[1].checkpoint, run.stages[2].method_state, run.stages[2].checkpoint)
    )
    assert same(first, tensors(run.stages[1].method_state)), "of one task nothing is averaged"
    for name in both:
        wanted = own[name] if "lora_A" in name else first[name] + (own[name] - first[name]) / 2**0.5
        torch.testing.assert_close(both[name], wanted)
    for name, start in begun[2].items():
        trained = first[name.replace(".default", "")]
        if "lora_A" in name:
            torch.testing.assert_close(start @ start.T, torch.eye(len(start)), atol=1e-5, rtol=0)
            R = start @ trained.T  # Q^T A^T
            assert torch.allclose(R, R.triu(), atol=1e-4) and (R.diagonal() > 0).all()
            assert torch.equal(start, orthonormal(trained))
        else:
            assert torch.equal(start, trained)


@pytest.mark.parametrize("merge", ["wise", "average", "magmax", "ties", "dare"])
def test_full_models_are_merged_and_resumed_after_a_kill(merge, options, tiny_model):
    options = {**options, "use_peft": False, "merge": merge, "dtype": "float32", "merge_density": None}
    run = train(options, MergeTrainer, MergeConfig)
    one, two = (stage.checkpoint for stage in run.stages[1:])
    whole, base = tensors(two), tensors(tiny_model)
    if merge == "magmax":
        parts = [tensors(stage.method_state) for stage in run.stages[1:]]
        for name, found in whole.items():
            a, b = (part[name] - base[name] for part in parts)
            torch.testing.assert_close(found, base[name] + 0.5 * torch.where(b.abs() >= a.abs(), b, a))
    assert (run.stages[2].method_state.exists()) == (merge in averaging.OF_VECTORS)
    assert not same(whole, tensors(one)) and not list(run.path.rglob(".base*"))
    run.stages[2].train_file.unlink()
    with pytest.raises(KeyboardInterrupt):
        train(options, stop_at(2, MergeTrainer), MergeConfig)
    train(options, MergeTrainer, MergeConfig)
    assert same(tensors(run.stages[2].checkpoint), whole)


def test_merge_from_the_base_trains_each_task_independently(options, tmp_path):
    run = train({**options, "merge": "ties"}, MergeTrainer, MergeConfig)
    alone = {**options, "tasks": options["tasks"][1:], "output_dir": str(tmp_path / "alone")}
    assert same(tensors(run.stages[2].method_state), tensors(train(alone).stages[1].checkpoint))
    evaluate.evaluate(run, stages=[2])


def test_merge_refuses_adapters_of_embeddings_before_training(options):
    with pytest.raises(ConfigError, match=r"embed_tokens.* is not a linear layer"):
        train({**options, "lora_target_modules": ["embed_tokens", "q_proj"]}, MergeTrainer, MergeConfig)
