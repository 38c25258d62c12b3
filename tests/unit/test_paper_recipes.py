"""The paper's recipes train, by their models' shapes, the share of parameters that the paper prints."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from diablo.errors import UserError
from diablo.models.loading import count_parameters, meta_model
from diablo.recipes.applying import apply_method
from diablo.recipes.methods import DiabloMethod, LoraMethod
from diablo.recipes.reading import load_recipe, shipped_recipes

CONFIGS: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-2-7b-hf": LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
    ),
    "meta-llama/Meta-Llama-3-8B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "huggyllama/llama-13b": LlamaConfig(
        vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40
    ),
    "mistralai/Mistral-7B-v0.1": MistralConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
LLAMA3 = CONFIGS["meta-llama/Meta-Llama-3-8B"]

# Percent of the model's own parameters, blocks not counted among them. For LLaMA2-7B and LLaMA-13B these are the
# paper's figures; it prints 1.04 for LLaMA3-8B (see the last tests) and none that is known here for Mistral-7B.
SHARES = {
    "paper/commonsense-llama2-7b": "0.52",
    "paper/commonsense-llama2-7b-n64": "1.04",
    "paper/commonsense-llama3-8b": "0.89",
    "paper/commonsense-llama-13b": "1.06",
    "paper/commonsense-mistral-7b": "0.98",
    "paper/gsm8k-llama2-7b": "1.04",
    "paper/gsm8k-llama3-8b": "0.89",
    "paper/metamathqa-llama2-7b": "2.09",
    "paper/code-llama3-8b": "0.89",
    "paper/code-mistral-7b": "0.98",
    "paper/safety-llama3-8b": "0.89",
    "paper/safety-mistral-7b": "0.98",
    "paper/math10k-llama2-7b": "1.04",
}

PAPER_RECIPES = {name: path for name, path in shipped_recipes().items() if name.startswith("paper/")}


def counts(config: PretrainedConfig, method: Any) -> tuple[int, int]:
    """Trained parameters, and those of the model itself."""
    trained, total = count_parameters(apply_method(meta_model(config), method))
    return trained, total - trained


def test_every_recipe_has_a_share_to_be_held_against() -> None:
    assert SHARES.keys() == PAPER_RECIPES.keys()


@pytest.mark.parametrize("name", sorted(PAPER_RECIPES))
def test_the_trained_share_is_the_papers(name: str) -> None:
    settings = yaml.safe_load(PAPER_RECIPES[name].read_text(encoding="utf-8"))
    method = DiabloMethod.model_validate(settings["method"])
    trained, of_model = counts(CONFIGS[settings["model"]], method)
    assert f"{100 * trained / of_model:.2f}" == SHARES[name]
    assert settings["output"] == f"runs/{name}"


def test_the_papers_count_for_llama2() -> None:
    trained, _ = counts(CONFIGS["meta-llama/Llama-2-7b-hf"], DiabloMethod(num_blocks=64))
    assert f"{trained / 1e6:.2f}" == "70.25"


@pytest.mark.parametrize(
    ("method", "printed"),
    [
        (DiabloMethod(num_blocks=64), "1.04"),
        (LoraMethod(name="lora", r=32), "0.78"),
    ],
    ids=["DiaBlo, N = 64", "LoRA, r = 32"],
)
def test_the_papers_shares_of_llama3_count_key_and_value_as_square(method: Any, printed: str) -> None:
    ungrouped = LlamaConfig(**(LLAMA3.to_diff_dict() | {"num_key_value_heads": LLAMA3.num_attention_heads}))
    _, of_model = counts(LLAMA3, method)
    assert f"{100 * counts(ungrouped, method)[0] / of_model:.2f}" == printed
    assert f"{100 * counts(LLAMA3, method)[0] / of_model:.2f}" != printed


def test_a_recipe_is_found_by_its_name_and_a_wrong_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("paper/commonsense-lama2-7b")
    assert "Did you mean paper/commonsense-llama2-7b?" in str(caught.value)
    assert "quickstart" in str(caught.value)
    assert len(str(caught.value)) < 250
