"""Packed rows: where they go, and that what is computed of them is what is computed of each alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from diablo import DiabloConfig
from diablo.data.batching import collate
from diablo.data.encoding import IGNORED, EncodedRow
from diablo.data.packing import flatten, join, pack
from diablo.errors import UserError
from diablo.planning import preflight
from diablo.planning.making import make_plan
from diablo.recipes.reading import check_settings
from diablo.scoring.losses import summed_completion_loss

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(attention: str) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention))


def gemma3(attention: str) -> Any:
    """Its first layer sees the last four tokens only."""
    config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, attn_implementation=attention)
    config.layer_types = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(config)


def mixtral(attention: str) -> Any:
    config = MixtralConfig(**SIZES, num_local_experts=4, attn_implementation=attention)
    # The fused product of the experts does not take float64.
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


def gpt2(attention: str) -> Any:
    """It learns its positions."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def mamba(_: str) -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


def bloom(attention: str) -> Any:
    return BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, attn_implementation=attention)
    )


TARGETS = {llama: ["q_proj", "up_proj"], gemma3: ["q_proj", "up_proj"], gpt2: ["c_attn"], mixtral: ["q_proj", "v_proj"]}


def adapted(make: Any, attention: str) -> Any:
    torch.manual_seed(0)
    config = DiabloConfig(num_blocks=4, target_modules=TARGETS[make], init_weights=False)
    return get_peft_model(make(attention), config).double()


@pytest.fixture(scope="module")
def rows() -> list[EncodedRow]:
    """Rows of several lengths. The third is a document: it is supervised from its first token on."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (length, prompt) in enumerate([(9, 5), (14, 3), (7, 0), (2, 1), (11, 10)], start=1):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        rows.append(EncodedRow(number, ids, [IGNORED] * prompt + ids[prompt:]))
    return rows


def loss_and_gradients(model: Any, features: list[dict[str, list[int]]]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = summed_completion_loss(model, collate(features, 0))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@given(st.data(), st.integers(1, 40), st.integers(0, 3))
def test_every_row_is_in_one_sequence_and_no_sequence_is_too_long(data: Any, capacity: int, seed: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    sequences = pack(lengths, capacity, seed)
    assert sorted(index for rows in sequences for index in rows) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in rows) for rows in sequences)
    assert all(tokens <= capacity for tokens in filled)
    # Any two would not fit into one.
    assert len(filled) < 2 or filled[0] + filled[1] > capacity
    assert pack(lengths, capacity, seed) == sequences


def test_the_seed_chooses_among_rows_of_one_length_and_not_how_many_sequences_there_are() -> None:
    lengths = [4] * 20
    assert pack(lengths, 12, 0) != pack(lengths, 12, 1)
    assert len(pack(lengths, 12, 0)) == len(pack(lengths, 12, 1)) == 7


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
def test_loss_and_gradients_of_packed_rows_are_those_of_rows_apart(
    rows: list[EncodedRow], make: Any, attention: str
) -> None:
    model = adapted(make, attention)
    loss, gradients = loss_and_gradients(model, [row.features for row in rows])
    # The second sequence is shorter, so that there is padding.
    sequences = [join(rows[:3]), join(rows[3:])]
    for packed in (sequences, [flatten(sequences)]):
        packed_loss, packed_gradients = loss_and_gradients(model, packed)
        # Losses are summed in fp32.
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert gradients.keys() == packed_gradients.keys() != set()
        for name, gradient in gradients.items():
            torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_rows_that_are_not_told_apart_have_another_loss(rows: list[EncodedRow]) -> None:
    model = adapted(llama, "eager")
    batch = collate([join(rows)], 0)
    apart = summed_completion_loss(model, batch)
    del batch["position_ids"]
    assert abs(summed_completion_loss(model, batch) - apart) > 0.01


def test_a_row_does_not_predict_the_first_token_of_the_next(rows: list[EncodedRow]) -> None:
    batch = collate([join(rows)], 0)
    assert len(batch["predicting"]) == sum(row.supervised for row in rows)
    ends = torch.tensor([len(row.input_ids) for row in rows]).cumsum(0) - 1
    assert not torch.isin(batch["predicting"], ends).any()


def test_padding_is_apart_from_rows_too(rows: list[EncodedRow]) -> None:
    batch = collate([join(rows[:2]), join(rows[2:3])], 0)
    assert "attention_mask" not in batch
    assert batch["position_ids"][1].tolist() == [*range(7), *range(16)]
    assert (batch["labels"][1, 7:] == IGNORED).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
def test_models_that_keep_rows_apart_pass(rows: list[EncodedRow], make: Any, attention: str) -> None:
    preflight.check_packing(adapted(make, attention).float(), collate([join(rows[:2])], 0))


@pytest.mark.parametrize("make", [mamba, bloom])
def test_models_in_which_packed_rows_see_one_another_are_refused(rows: list[EncodedRow], make: Any) -> None:
    model = make("eager")
    with pytest.raises(UserError, match=f"model of type {make.__name__} packed rows see one another; leave it out"):
        preflight.check_packing(model, collate([join(rows[:2])], 0))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("attention", "packing", "is_flat"),
    [("flash_attention_2", True, True), ("flash_attention_2", False, False), ("sdpa", True, False)],
)
def test_a_batch_of_packed_rows_is_one_sequence_under_flash_attention_alone(
    tiny_model: Any, tmp_path: Any, attention: str, packing: bool, is_flat: bool
) -> None:
    settings = {
        "model": str(tiny_model),
        "task": "mawps",
        "data": {"limit": 8},
        "method": {"num_blocks": 4},
        "training": {"packing": packing, "max_length": 256},
        "output": str(tmp_path / "run"),
    }
    plan = make_plan(check_settings(settings))
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"attention": attention}))
    assert plan.is_flat == is_flat
    assert (plan.padding_share == 0) == is_flat
