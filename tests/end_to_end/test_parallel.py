"""Models that 2 and 4 processes share, cut or sharded: no collective more, and what one process computes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_python
from transformers import LlamaConfig, LlamaForCausalLM

SCENARIOS = Path(__file__).with_name("parallel_scenarios.py")
EXACT = 1e-12

# 32 features are cut into equal slices; the MLP's 71 and the output layer's 321 are not. Of 16 blocks each process has
# whole ones but there; of 6, of 3 and of 1 the ends of slices cut through blocks everywhere. 16 blocks of the MLP are
# of 5 features: the last lies outside, and a slice's end cuts the eighth.
CASES = {2: (16, 3), 4: (6, 1)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads for four processes, and with biases, of which a row-parallel layer may add only one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=321,
        hidden_size=32,
        intermediate_size=71,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def launch(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Runs the scenarios on so many processes, once."""
    return functools.cache(lambda count: run_scenarios(model, tmp_path_factory.mktemp("found"), count))


@pytest.fixture(params=CASES)
def found(request: pytest.FixtureRequest, launch: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    return launch(request.param)


@pytest.fixture
def found_by_two(launch: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    return launch(2)


def run_scenarios(model: Path, folder: Path, count: int) -> dict[str, Any]:
    settings = {"OMP_NUM_THREADS": "1"}
    done = run_python(SCENARIOS, model, folder, *CASES[count], processes=count, settings=settings)
    assert done.returncode == 0, done.stderr[-5000:]
    results = json.loads((folder / "found.json").read_text())
    return {"processes": count, **results}


def shapes(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every number of blocks, in place and beside."""
    return [
        (f"N = {number}, {how}", own)
        for number in CASES[found["processes"]]
        for how, own in found[f"N = {number}"].items()
    ]


def test_no_collective_is_added(found):
    # One reduction in each row-parallel layer and one of the output; backward, one in each column-parallel layer.
    assert found["frozen"] == {"forward": 6, "backward": 11, "inference": 6}
    for case, own in shapes(found):
        assert own["collectives"] == found["frozen"], case
    # For comparison, and so that it is seen that they are counted.
    assert found["lora"]["backward"] == 21


def test_pefts_own_block_diagonal_method_does_what_the_readme_says_of_it(found):
    if not found["bdlora"]["column-parallel"]:
        pytest.skip("this PEFT has no BD-LoRA")
    assert found["bdlora"] == {
        "column-parallel": {"inference": found["frozen"]["inference"], "training": "RuntimeError"},
        "row-parallel": {"inference": "RuntimeError", "training": "RuntimeError"},
    }


def test_losses_gradients_and_steps_are_those_of_one_process(found):
    for case, own in shapes(found):
        differences = {what: value for what, value in own.items() if isinstance(value, float)}
        assert len(differences) == 9, case
        assert max(differences.values()) < EXACT, (case, differences)


def test_blocks_are_in_the_slices_of_the_weights_where_they_are_asked_for(found):
    for case, own in shapes(found):
        # Seven layers in each of the two, and the output layer.
        assert own["layers with blocks in their weights"] == (15 if case.endswith("in place") else 0), case


def test_an_adapter_is_saved_whole_and_every_verb_works(found_by_two):
    results = dict(found_by_two["saving and merging"])
    for verb in ("convert_to_lora", "hotswap_adapter"):
        assert "q_proj is cut over processes: save the adapter, and load it into the model without" in results.pop(verb)
    assert "Hooks are registered on a linear layer that is cut over processes" in results.pop("hooks")
    steps = [results.pop(f"trained on, low_cpu_mem_usage={low}") for low in (False, True)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-9)
    assert steps[0] > 0
    assert results.pop("safe_merge") == [True] * found_by_two["processes"], "all refuse, or none"
    assert results.pop("moved") < 1e-5
    assert len(results) == 13
    assert results.pop("unmerged") == 0
    assert max(results.values()) < EXACT, results
    assert found_by_two["bf16"]


def test_what_cannot_be_adapted_is_refused(found_by_two):
    found = found_by_two
    assert (
        "model.embed_tokens (a Embedding in the tensor-parallel style 'embedding_rowwise')"
        in (found["refusals"]["embedding"])
    )
    assert "a Linear whose weight is sharded: give it the adapter before fully_shard" in found["refusals"]["sharded"]
    assert "experts.down_proj (a parameter that is cut over processes" in found["refusals"]["experts"]
    assert found["refusals"]["saved"].startswith("modules_to_save has lm_head, which is cut over processes")


def test_a_sharded_model_trains_what_one_process_does_and_is_saved_whole(found):
    results = dict(found["sharding"])
    assert "in_place=True has become impossible for this Linear" in results.pop("in_place=True")
    assert results.pop("after a forward") < EXACT, "between passes no blocks are in what is sharded"
    assert "is sharded, so that blocks cannot be merged into it" in results.pop("merging")
    assert results.keys() == {"in_place=auto", "in_place=False"}
    for how, differences in results.items():
        assert max(differences.values()) < EXACT, (how, differences)
