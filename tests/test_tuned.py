"""The tables of methods' settings for each size of model."""

import pytest
import yaml
from conftest import config_of

from trace_bench import packaged
from trainers.base import CLConfig, ConfigError
from trainers.base.stages import parse
from trainers.base.tuned import tuned_words

SIZES = {"135m": "quickstart", "7b": "llama2_7b_lora", "70b": "llama2_70b_lora"}


@pytest.mark.parametrize("size", SIZES)
def test_every_table_has_every_method_with_valid_settings(size, tmp_path):
    table = yaml.safe_load(packaged.tuned()[size].read_text())
    assert table.keys() == packaged.methods().keys()
    for method in [name for name, entry in table.items() if entry]:
        config, model = parse(config_of(method), ["--config", SIZES[size], "--output_dir", str(tmp_path)], method)
        for name, value in table[method].items():
            assert getattr(config if hasattr(config, name) else model, name) == value, (method, name)


def test_the_table_overrides_the_config_and_the_command_line_the_table(tmp_path):
    table, config = tmp_path / "mine.yaml", tmp_path / "config.yaml"
    table.write_text("ewc: {ewc_lambda: 7, learning_rate: 0.5, bf16: false, lora_target_modules: [q_proj, v_proj]}\n")
    config.write_text(f"tuned: {table}\nlearning_rate: 0.1\nweight_decay: 0.3\nbf16: true\n")
    kind, given = config_of("ewc"), ["--config", str(config), "--output_dir", str(tmp_path)]
    found, model = parse(kind, given, "ewc")
    assert (found.ewc_lambda, found.learning_rate, found.weight_decay, found.bf16) == (7, 0.5, 0.3, False)
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    found, _ = parse(kind, ["--learning_rate", "2", *given], "ewc")
    assert (found.ewc_lambda, found.learning_rate) == (7, 2), "wherever it stands"
    found, _ = parse(kind, [*given, "--tuned", "none"], "ewc")
    assert (found.ewc_lambda, found.learning_rate) == (400, 0.1)
    assert tuned_words(given, "my_method") == [], "a method that the table does not know keeps its own"
    assert "tuned" not in found.manifest(), "what it sets is on record itself"


@pytest.mark.parametrize(
    ("content", "said"),
    [("- ewc\n", "not a table"), ("ewc: 3\n", "not a table"), ("{", "cannot be read"), (None, "135m")],
)
def test_an_invalid_table_is_refused(tmp_path, content, said):
    table = tmp_path / "mine.yaml"
    if content is not None:
        table.write_text(content)
    with pytest.raises((ConfigError, packaged.UnknownName), match=said):
        tuned_words(["--tuned", str(table)], "ewc")


def test_a_setting_unknown_to_the_method_is_named(tmp_path):
    table = tmp_path / "mine.yaml"
    table.write_text("sequential: {ewc_lambda: 3}\n")
    with pytest.raises(ConfigError, match="no option ewc_lambda"):
        parse(CLConfig, ["--tuned", str(table), "--output_dir", str(tmp_path)], "sequential")
