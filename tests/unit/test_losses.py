"""The loss on completion tokens against the plain one, which computes every logit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from references import SavedBytes
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from diablo import DiabloConfig
from diablo.data.batching import collate
from diablo.data.encoding import IGNORED, EncodedRow
from diablo.scoring.generation import held_out_loss
from diablo.scoring.losses import summed_completion_loss


def llama(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def gemma2(_: Path) -> Any:
    """A model that soft-caps its logits, with a cap low enough to matter."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def adapted(folder: Path) -> Any:
    torch.manual_seed(0)
    return get_peft_model(llama(folder), DiabloConfig(num_blocks=4, target_modules=["q_proj"], init_weights=False))


MODELS = {"llama": llama, "gemma2": gemma2, "adapted": adapted}


@pytest.fixture(scope="module")
def rows() -> list[EncodedRow]:
    """Rows of various lengths; one has two supervised stretches, one is supervised from its first token."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (length, supervised) in enumerate([(12, {8, 9, 10, 11}), (7, {2, 3, 6}), (5, set(range(5))), (3, {2})]):
        ids = torch.randint(3, 320, (length,), generator=generator).tolist()
        rows.append(EncodedRow(number, ids, [t if i in supervised else IGNORED for i, t in enumerate(ids)]))
    return rows


@pytest.fixture(scope="module")
def batch(rows: list[EncodedRow]) -> dict[str, torch.Tensor]:
    return collate([row.features for row in rows], 2)


def plain_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_logits(
    name: str, tiny_model: Path, batch: dict[str, torch.Tensor]
) -> None:
    model = MODELS[name](tiny_model).eval()
    results = []
    for function in (plain_loss, summed_completion_loss):
        model.zero_grad()
        loss = function(model, batch)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (expected, expected_gradients), (loss, gradients) = results
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


def test_soft_cap_matters_in_this_test(tiny_model: Path, batch: dict[str, torch.Tensor]) -> None:
    model = gemma2(tiny_model).eval()
    with torch.no_grad():
        capped = summed_completion_loss(model, batch)
        model.config.final_logit_softcapping = None
        assert (summed_completion_loss(model, batch) - capped).abs() > 1


@pytest.mark.parametrize("chunk", [1024, 3])
@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothed_labels_are_those_of_torch_in_float64(
    tiny_model: Path, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, chunk: int, smoothing: float
) -> None:
    monkeypatch.setattr("diablo.scoring.losses._CHUNK", chunk)
    model = adapted(tiny_model).eval()
    loss = summed_completion_loss(model, batch, label_smoothing=smoothing)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    exact = adapted(tiny_model).eval().double()
    logits = exact(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.dtype == torch.float64
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=smoothing,
    )
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradients
    for name, parameter in exact.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].double(), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        assert abs(summed_completion_loss(model, batch).item() - loss.item()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_output_layer_sees_the_supervised_positions_only(
    name: str, tiny_model: Path, rows: list[EncodedRow], batch: dict[str, torch.Tensor]
) -> None:
    model = MODELS[name](tiny_model).eval()
    seen = []
    head = (model.get_base_model() if name == "adapted" else model).lm_head
    with torch.no_grad():
        handle = head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
        summed_completion_loss(model, batch)
        # Nothing of it stays behind: the next forward has every logit again.
        model(input_ids=batch["input_ids"])
        handle.remove()
    assert seen == [sum(row.supervised for row in rows), batch["input_ids"].numel()]


def test_hook_is_removed_where_the_forward_fails(tiny_model: Path, batch: dict[str, torch.Tensor]) -> None:
    model = llama(tiny_model)
    with pytest.raises(IndexError):
        summed_completion_loss(model, batch | {"input_ids": batch["input_ids"] + 10_000})
    with torch.no_grad():
        assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape


def test_batch_without_supervised_tokens_has_no_loss(tiny_model: Path, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        nothing = {"labels": torch.full_like(batch["labels"], IGNORED), "predicting": batch["predicting"][:0]}
        loss = summed_completion_loss(llama(tiny_model), batch | nothing)
    assert loss.item() == 0


def test_held_out_loss_does_not_depend_on_the_batches(
    tiny_model: Path, rows: list[EncodedRow], batch: dict[str, torch.Tensor]
) -> None:
    model = llama(tiny_model).train()
    with torch.no_grad():
        expected = plain_loss(model, batch).item() / sum(row.supervised for row in rows)
    for batch_size in (1, 2, 3, 32):
        for order in (rows, rows[::-1]):
            assert held_out_loss(model, order, 2, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    assert model.training  # as it was found


@pytest.mark.parametrize("name", MODELS)
def test_many_supervised_tokens_are_taken_a_part_at_a_time(
    name: str, tiny_model: Path, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name](tiny_model).eval()
    results = []
    for chunk in (1024, 3):
        monkeypatch.setattr("diablo.scoring.losses._CHUNK", chunk)
        model.zero_grad()
        loss = summed_completion_loss(model, batch)
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_parts_keep_no_logits_in_fp32(
    tiny_model: Path, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tiny_model).bfloat16().requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    kept = []
    for chunk in (1024, 3):
        monkeypatch.setattr("diablo.scoring.losses._CHUNK", chunk)
        with SavedBytes(model) as saved:
            summed_completion_loss(model, batch)
        kept.append(saved.total)
    supervised = len(batch["predicting"])
    # The logits themselves are kept now, and the log-probabilities in fp32 no longer.
    assert kept[0] - kept[1] >= supervised * 320 * (4 - 2) - 8 * supervised
