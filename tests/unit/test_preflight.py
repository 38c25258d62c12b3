"""Each check on a setup with the fault that it is for, and on one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from diablo import DiabloConfig
from diablo.data.batching import collate
from diablo.data.encoding import IGNORED, EncodedRow, RowEncoder
from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.planning import preflight


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def adapt(model: Any, *, autocast_adapter_dtype: bool = True, **options: Any) -> Any:
    config = DiabloConfig(num_blocks=4, **({"target_modules": ["q_proj", "up_proj"]} | options))
    return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> list[EncodedRow]:
    encoder = RowEncoder(AutoTokenizer.from_pretrained(tiny_model))
    return [encoder.encode(Row(1, "Problem: a", " x = 3")), encoder.encode(Row(2, "b", " x = 3 + 4 + 5"))]


@pytest.fixture(scope="module")
def batch(rows: list[EncodedRow]) -> dict[str, torch.Tensor]:
    return collate([rows[0].features], 2)


def test_supervision(rows: list[EncodedRow]) -> None:
    preflight.check_supervision(rows, "training")
    bare = EncodedRow(9, [5, 6, 7], [IGNORED] * 3)
    # A label on the first token is not predicted from anything: such a row has no loss either.
    first_only = EncodedRow(12, [5, 6], [5, IGNORED])
    with pytest.raises(UserError, match=r"2 of 4 held-out rows have no supervised token \(rows 9 and 12\)"):
        preflight.check_supervision([*rows, bare, first_only], "held-out")


def test_supervision_lists_only_some_of_many() -> None:
    bare = [EncodedRow(number, [5, 6], [IGNORED] * 2) for number in range(1, 21)]
    with pytest.raises(UserError, match=r"rows 1, 2, 3 and 17 more\)"):
        preflight.check_supervision(bare, "training")


def test_stop_tokens_survive_our_collator_and_not_one_that_masks_padding_by_id(rows: list[EncodedRow]) -> None:
    stop = rows[0].input_ids[-1]
    batch = collate([row.features for row in rows], pad_token_id=stop)
    preflight.check_stop_tokens(rows, batch, frozenset([stop]))

    # What DataCollatorForLanguageModeling and many a training script do.
    masked = batch | {"labels": batch["labels"].masked_fill(batch["input_ids"] == stop, IGNORED)}
    with pytest.raises(UserError, match="Of 2 supervised stop tokens in a batch, 0 carry loss"):
        preflight.check_stop_tokens(rows, masked, frozenset([stop]))


def test_rows_without_a_stop_token_are_refused(rows: list[EncodedRow]) -> None:
    cut = [EncodedRow(row.number, row.input_ids[:-1], row.labels[:-1]) for row in rows]
    with pytest.raises(UserError, match="Of 0 supervised stop tokens"):
        preflight.check_stop_tokens(cut, collate([row.features for row in cut], 0), frozenset([rows[0].input_ids[-1]]))


def test_something_is_trainable(tiny_model: Path) -> None:
    adapted = adapt(load(tiny_model))
    preflight.check_trainable(adapted)
    with pytest.raises(UserError, match="No parameter is trainable"):
        preflight.check_trainable(adapted.requires_grad_(False))


def test_trainable_parameters_are_fp32(tiny_model: Path) -> None:
    preflight.check_trainable(adapt(load(tiny_model, dtype=torch.bfloat16)))  # frozen weights may be bf16
    low = adapt(load(tiny_model, dtype=torch.bfloat16), autocast_adapter_dtype=False)
    with pytest.raises(UserError, match=r"4 trainable parameters are not fp32, such as .*\(torch\.bfloat16\)"):
        preflight.check_trainable(low)


def test_gradients_arrive(tiny_model: Path, batch: dict[str, torch.Tensor]) -> None:
    adapted = adapt(load(tiny_model)).train()
    preflight.check_gradients(adapted, batch, checkpointing=False)
    assert all(parameter.grad is None for parameter in adapted.parameters())  # nothing is left for the first step


def test_no_gradient_under_reentrant_checkpointing_of_inputs_without_one(
    tiny_model: Path, batch: dict[str, torch.Tensor]
) -> None:
    adapted = adapt(load(tiny_model)).train()
    base = adapted.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads() if hasattr(base, "_require_grads_hook") else None
    with pytest.raises(UserError, match=r"No gradient reaches 4 .* under gradient checkpointing the inputs must"):
        preflight.check_gradients(adapted, batch, checkpointing=True)
    base.enable_input_require_grads()
    preflight.check_gradients(adapted, batch, checkpointing=True)


def test_no_gradient_at_a_module_that_takes_no_part(tiny_model: Path, batch: dict[str, torch.Tensor]) -> None:
    model = load(tiny_model)
    model.spare = nn.Linear(8, 8)
    adapted = adapt(model, target_modules=["q_proj", "spare"]).train()
    with pytest.raises(UserError, match=r"No gradient reaches 1 trainable parameters, such as \S*spare\S*: they take"):
        preflight.check_gradients(adapted, batch, checkpointing=False)


def test_optimizer_made_before_the_method(tiny_model: Path) -> None:
    model = load(tiny_model)
    early = torch.optim.AdamW(model.parameters())
    adapted = adapt(model)
    with pytest.raises(UserError, match="does not hold 4 of 4 trainable parameters: it was made before the method"):
        preflight.check_optimizer(early, adapted)
    preflight.check_optimizer(torch.optim.AdamW(p for p in adapted.parameters() if p.requires_grad), adapted)


def test_optimizer_that_misses_some(tiny_model: Path) -> None:
    adapted = adapt(load(tiny_model))
    some = [p for p in adapted.parameters() if p.requires_grad][1:]
    with pytest.raises(UserError, match="does not hold 1 of 4"):
        preflight.check_optimizer(torch.optim.AdamW(some), adapted)


@pytest.fixture
def llava() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **sizes},
        text_config={"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2, **sizes},
        image_token_index=63,
    )
    return LlavaForConditionalGeneration(config)


def test_vision_tower_is_not_adapted_unless_chosen(llava: Any) -> None:
    # Both towers have a q_proj: a plain name reaches into both.
    adapted = adapt(llava, target_modules=["q_proj"])
    assert any("vision_tower" in name and "diablo" in name for name, _ in adapted.named_parameters())
    with pytest.raises(UserError, match=r"method\.target_modules: 1 of the adapted modules .*vision_tower"):
        preflight.check_towers(adapted, chosen=False)
    preflight.check_towers(adapted, chosen=True)


def test_text_tower_alone_passes(llava: Any, tiny_model: Path) -> None:
    adapted = adapt(llava, target_modules=r".*language_model.*q_proj")
    preflight.check_towers(adapted, chosen=False)
    preflight.check_towers(adapt(load(tiny_model)), chosen=False)
