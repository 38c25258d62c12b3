"""Liger's kernels in a model: what is replaced, what is left alone, and that loss and gradients are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from peft import LNTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from triton.runtime import interpreter

from diablo import DiabloConfig
from diablo.data.batching import collate
from diablo.models.liger import apply_liger, liger_obstacle
from diablo.ops.kernels import INTERPRETED
from diablo.scoring.losses import summed_completion_loss

pytest.importorskip("liger_kernel")
from liger_kernel.ops import rms_norm

ROWS = [{"input_ids": [5, 7, 9, 11, 4], "labels": [-100, -100, 9, 11, 4]}, {"input_ids": [8, 6], "labels": [-100, 6]}]


class Number(float):
    """A number as a compiled kernel gets it. Triton's interpreter hands on the number itself, which has no dtype."""

    def to(self, dtype: Any) -> Number:
        return self


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels in Triton's interpreter, which has no functions of a GPU's own library."""
    if not INTERPRETED:
        pytest.skip("Triton compiles for a GPU")
    convert = interpreter._implicit_cvt
    monkeypatch.setattr(
        interpreter, "_implicit_cvt", lambda given: Number(given) if isinstance(given, float) else convert(given)
    )

    def rsqrt(values: Any) -> Any:
        # The interpreter replaces the name in Triton's module, so that it has to be looked up when it is called.
        return tl.rsqrt(values)

    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).train()


def with_liger(folder: Path) -> Any:
    model = model_of(folder)
    apply_liger(model)
    return model


def test_only_this_models_norms_and_gated_layers_are_replaced(tiny_model: Path):
    cross_entropy, rotary = torch.nn.functional.cross_entropy, modeling_llama.apply_rotary_pos_emb
    before = dict(vars(modeling_llama))
    model = with_liger(tiny_model)
    replaced = {name.rpartition(".")[2] for name, module in model.named_modules() if "forward" in vars(module)}
    assert replaced == {"mlp", "norm", "input_layernorm", "post_attention_layernorm"}
    # The loss is of the model's own logits, and models that are loaded later are as if nothing had been applied.
    assert model.forward.__func__ is LlamaForCausalLM.forward
    assert torch.nn.functional.cross_entropy is cross_entropy
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert dict(vars(modeling_llama)) == before
    assert not any("forward" in vars(module) for module in model_of(tiny_model).modules())


def test_a_type_without_kernels_is_refused(tiny_model: Path):
    assert liger_obstacle("llama", torch.device("cuda")) is None
    assert liger_obstacle("qwen3_moe", torch.device("xpu")) is None
    message = liger_obstacle("gpt2", torch.device("cuda"))
    assert message == "Liger has no kernels for models of type 'gpt2'; leave it out"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "config",
    [DiabloConfig(num_blocks=4), LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"])],
    ids=["blocks", "norms"],
)
def test_the_loss_and_its_gradients_are_those_without(tiny_model: Path, config: Any):
    results = []
    for make in (model_of, with_liger):
        model = get_peft_model(make(tiny_model), config)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        loss = summed_completion_loss(model, collate(ROWS, pad_token_id=2))
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in trained.items()}))
    (expected, gradients), (found, others) = results
    torch.testing.assert_close(found, expected)
    assert gradients.keys() == others.keys()
    for name, values in gradients.items():
        assert values is not None
        assert values.any(), name
        torch.testing.assert_close(others[name], values, rtol=1e-4, atol=1e-5)
