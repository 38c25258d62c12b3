"""The card that saving an adapter writes."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tiny_models import llama
from transformers import LlamaForCausalLM

from diablo import DiabloConfig
from diablo.models.saving import save_adapter

SETTINGS = {"num_blocks": 4, "target_modules": ["q_proj", "v_proj"]}


def saved(folder, **settings) -> str:
    config = DiabloConfig(**{**SETTINGS, **settings})
    llama().save_pretrained(folder / "base")
    get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config).save_pretrained(folder)
    return (folder / "README.md").read_text()


def test_a_card_says_what_the_adapter_is(tmp_path):
    card = saved(tmp_path, block_pattern={"v_proj": 2})
    # As run.json and diablo plan have it: of all parameters, the blocks among them.
    total = sum(parameter.numel() for parameter in llama().parameters()) + 256
    # In each of two layers 16 -> 16 in 4 blocks of 4 x 4, and 16 -> 8 in 2 of 8 x 4.
    assert f"256 parameters, {256 / total:.2%} of {total:,}" in card
    assert "| base model | a folder called base |" in card
    assert str(tmp_path) not in card, "others have no use for a path of this machine"
    assert "| target modules | q_proj, v_proj |" in card
    assert '| num_blocks | 4, {"v_proj": 2} |' in card
    assert "import diablo" in card
    assert "library_name: peft" in card
    assert "- diablo" in card
    assert "More Information Needed" not in card


def test_what_somebody_wrote_into_a_card_stays_and_facts_are_renewed(tmp_path):
    first = saved(tmp_path)
    mine = first.replace("# A DIABLO adapter", "# Mine\n\nIt counts apples.") + "\nMore of mine.\n"
    (tmp_path / "README.md").write_text(mine)
    second = saved(tmp_path, num_blocks=8)
    assert "It counts apples." in second
    assert "More of mine." in second
    assert "| num_blocks | 8 |" in second
    assert "| num_blocks | 4 |" not in second


def test_a_part_that_somebody_has_edited_is_left_alone_with_a_warning(tmp_path):
    mine = saved(tmp_path).replace("| num_blocks | 4 |", "| num_blocks | four |")
    (tmp_path / "README.md").write_text(mine)
    with pytest.warns(UserWarning, match=r"left as it is: somebody has written into its part 'adapter'\. Delete it"):
        second = saved(tmp_path, num_blocks=8)
    assert "| num_blocks | four |" in second
    assert "| num_blocks | 8 |" not in second


def test_what_the_hub_reads_is_kept_where_somebody_has_set_it(tmp_path):
    first = saved(tmp_path)
    (tmp_path / "README.md").write_text(first.replace("tags:\n", "license: mit\ntags:\n- apples\n", 1))
    told = ModelCard(saved(tmp_path, num_blocks=8)).data
    assert (told.license, told["library_name"]) == ("mit", "peft")
    assert "diablo" in told.tags


def test_an_adapter_of_another_method_has_no_path_in_its_card_either(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    save_adapter(model, None, tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "| method | LORA |" in card
    assert str(tmp_path) not in card
    assert ModelCard(card).data.base_model is None


def test_a_configuration_alone_writes_no_card(tmp_path):
    DiabloConfig(num_blocks=4).save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
