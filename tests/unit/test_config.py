"""What DiabloConfig refuses, in which words, and that it survives being saved."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig, PeftType

from diablo import DiabloConfig


@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "64", None], ids=repr)
def test_num_blocks_must_be_a_positive_integer(value):
    with pytest.raises(ValueError, match=rf"^num_blocks={value!r}: .*integer from 1 to the smaller dimension"):
        DiabloConfig(num_blocks=value)


@pytest.mark.parametrize("value", [0, -2, True, 1.5, "8", None], ids=repr)
def test_block_pattern_values_are_held_to_the_same(value):
    with pytest.raises(ValueError, match=rf"^block_pattern\['v_proj'\]={value!r}: .*integer from 1 to"):
        DiabloConfig(block_pattern={"q_proj": 4, "v_proj": value})


@pytest.mark.parametrize("value", [["v_proj"], "v_proj", 8], ids=repr)
def test_block_pattern_must_be_a_mapping(value):
    with pytest.raises(TypeError, match=r"block_pattern must map module names to num_blocks, got "):
        DiabloConfig(block_pattern=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, 1.5, float("nan"), "0.1", None], ids=repr)
def test_dropout_out_of_range(value):
    with pytest.raises(ValueError, match=rf"diablo_dropout must be from 0 to below 1, got {value!r}"):
        DiabloConfig(diablo_dropout=value)


@pytest.mark.parametrize("value", [0, 0.0, 0.05, 0.999])
def test_dropout_in_range(value):
    assert DiabloConfig(diablo_dropout=value).diablo_dropout == value


@pytest.mark.parametrize("value", ["lora_only", "None", "", True, None], ids=repr)
def test_bias_must_be_one_of_three(value):
    with pytest.raises(ValueError, match=rf"bias must be 'none', 'all' or 'diablo_only', got {value!r}"):
        DiabloConfig(bias=value)


@pytest.mark.parametrize("value", ["none", "all", "diablo_only"])
def test_bias_takes_each_of_the_three(value):
    assert DiabloConfig(bias=value).bias == value


@pytest.mark.parametrize("value", ["yes", "True", None, 2], ids=repr)
def test_in_place_must_be_auto_or_a_boolean(value):
    with pytest.raises(ValueError, match=rf"in_place must be 'auto', True or False, got {value!r}"):
        DiabloConfig(in_place=value)


@pytest.mark.parametrize(("name", "value"), [("layers_to_transform", [0, 1]), ("layers_pattern", "blocks")])
def test_layers_contradict_a_regular_expression(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be combined with .*target_modules='\.\*q_proj'"):
        DiabloConfig(target_modules=".*q_proj", **{name: value})


def test_layers_go_with_names_and_all_linear():
    for target_modules in ("all-linear", ["q_proj"], None):
        config = DiabloConfig(target_modules=target_modules, layers_to_transform=[0], layers_pattern="blocks")
        assert config.layers_to_transform == [0]


def test_layers_pattern_alone_has_no_effect_and_is_refused():
    with pytest.raises(ValueError, match=r"layers_pattern='blocks' has no effect without layers_to_transform"):
        DiabloConfig(layers_pattern="blocks")


def test_index_zero_counts_as_an_index():
    # 0 is falsy: taking it for "not given" would train every layer, or refuse the pattern.
    assert DiabloConfig(layers_pattern="blocks", layers_to_transform=0).layers_to_transform == 0
    with pytest.raises(ValueError, match="layers_to_transform=0 cannot be combined"):
        DiabloConfig(target_modules=".*", layers_to_transform=0)


LISTS = (
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "modules_to_save",
)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in LISTS for value in ([], (), "")] + [("block_pattern", None), ("block_pattern", {})],
)
def test_what_is_empty_is_not_given(name, value):
    assert DiabloConfig(**{name: value}) == DiabloConfig()


def test_a_file_in_which_every_list_is_empty_is_that_of_the_defaults(tmp_path):
    path = tmp_path / "adapter_config.json"
    DiabloConfig().save_pretrained(tmp_path)
    empty = {name: [] for name in LISTS} | {"block_pattern": None}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | empty), encoding="utf-8")
    config = PeftConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in empty} == {name: getattr(DiabloConfig(), name) for name in empty}


def test_empty_lists_go_with_an_expression():
    config = DiabloConfig(target_modules=".*q_proj", layers_to_transform=[], layers_pattern=[])
    assert (config.layers_to_transform, config.layers_pattern) == (None, None)


def test_an_empty_list_of_modules_asks_for_none_and_no_list_for_the_default_ones():
    assert DiabloConfig(target_modules=[]).target_modules == set()
    assert DiabloConfig(target_modules=[], target_parameters=["experts.down_proj"]).target_modules == set()
    assert DiabloConfig(target_modules=None, target_parameters=["experts.down_proj"]).target_modules == set()
    assert DiabloConfig(target_modules=None, target_parameters=[]).target_modules is None


def test_defaults_are_those_of_the_paper():
    config = DiabloConfig()
    assert config.peft_type is PeftType.DIABLO
    assert (config.num_blocks, config.bias, config.diablo_dropout) == (64, "none", 0.0)
    assert config.init_weights is True
    assert config.target_modules is None


def test_module_names_become_sets_and_expressions_stay():
    config = DiabloConfig(target_modules=["q_proj", "v_proj", "q_proj"], exclude_modules=("lm_head",))
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.exclude_modules == {"lm_head"}
    assert DiabloConfig(target_modules=".*q_proj").target_modules == ".*q_proj"


def test_mutable_defaults_are_not_shared():
    DiabloConfig().block_pattern["v_proj"] = 2
    assert DiabloConfig().block_pattern == {}


FULL = {
    "num_blocks": 8,
    "block_pattern": {"v_proj": 4, r".*\.up_proj": 2},
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "exclude_modules": ["lm_head"],
    "diablo_dropout": 0.05,
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "bias": "diablo_only",
    "modules_to_save": ["classifier"],
    "init_weights": False,
    "in_place": False,
    "base_model_name_or_path": "some/model",
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize("settings", [{}, FULL, {"target_modules": "all-linear"}], ids=["defaults", "full", "string"])
@pytest.mark.parametrize("reader", [DiabloConfig, PeftConfig])
def test_saved_and_read_again(tmp_path, settings, reader):
    config = DiabloConfig(**settings)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["peft_type"] == "DIABLO"
    assert written["num_blocks"] == config.num_blocks

    loaded = reader.from_pretrained(tmp_path)
    assert type(loaded) is DiabloConfig
    assert loaded.peft_type is PeftType.DIABLO
    for name in FULL:
        assert getattr(loaded, name) == getattr(config, name), name


def test_a_saved_file_that_was_spoiled_by_hand_is_refused(tmp_path):
    DiabloConfig(num_blocks=8).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"num_blocks": 0}), encoding="utf-8")
    with pytest.raises(ValueError, match="num_blocks=0"):
        PeftConfig.from_pretrained(tmp_path)
