"""Every type that PEFT has, as the method of a recipe: planned, applied, trained, saved and loaded, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftType
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diablo.data.batching import collate
from diablo.data.encoding import IGNORED
from diablo.errors import UserError
from diablo.models.adapters import load_adapter
from diablo.models.loading import count_parameters
from diablo.models.saving import save_adapter
from diablo.planning import preflight
from diablo.planning.making import adapt_on_meta
from diablo.planning.suited import check_suited
from diablo.recipes import peft_methods
from diablo.recipes.applying import apply_method, target_kinds
from diablo.recipes.methods import PeftMethod
from diablo.recipes.recipe import Recipe
from diablo.scoring.losses import summed_completion_loss

pytestmark = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="the types of PEFT that a recipe takes are those of 0.21"
)

# How each type is set up on a model whose matrices are 16 to 64 wide.
TRAINED: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 8]},
    "LN_TUNING": {},
    "IA3": {},
    "BEFT": {},
    "LORA": {"r": 4},
    "ADAMSS": {"r": 8},
    "BOFT": {},
    "LILY": {"r": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "OFT": {"oft_block_size": 16},
    "VERA": {"r": 8},
    "FROD": {"progressbar": False},
    "PVERA": {"r": 8},
    "FOURIERFT": {"n_frequency": 16},
    "GLORA": {"r": 4},
    "HRA": {"r": 4},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "UNILORA": {"theta_d_length": 64},
    "MISS": {"r": 4},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 16},
    "HIRA": {"r": 4},
    "SHIRA": {"r": 4},
    "C3A": {"block_size": 16},
    "WAVEFT": {"n_frequency": 16},
    "OSF": {},
    "DELORA": {"r": 4},
    "GRALORA": {"r": 4},
    "TINYLORA": {"u": 4},
    "PSOFT": {"r": 8},
    "PEANUT": {"r": 4},
    "SUPERTUNING": {},
    "DEFT": {"r": 4},
    "DIABLO": {"num_blocks": 4},
}

# Types that no recipe trains, with a word of the reason.
REFUSED = {
    "ADALORA": "every step",
    "CPT": "every token",
    "MULTITASK_PROMPT_TUNING": "number of a task",
    "POLY": "number of a task",
    "SHADOW": "loss of its own",
    "XLORA": "trained already",
}

# Types whose adapters stay beside the model.
BESIDE = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "ADAPTION_PROMPT", "BEFT", "LILY"}


def method_of(kind: str, **options: Any) -> PeftMethod:
    return PeftMethod.model_validate({"name": "peft", "type": kind, **TRAINED[kind], **options})


def batch_of(*rows: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Rows of consecutive tokens: first token, prompt's length, completion's length."""
    features = []
    for first, prompt, completion in rows:
        ids = list(range(first, first + prompt + completion))
        features.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return collate(features, 2)


def test_every_type_of_peft_is_either_trained_or_refused():
    assert sorted([*TRAINED, *REFUSED]) == sorted(kind.value for kind in PeftType)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_type_is_planned_trained_saved_loaded_and_merged(tiny_model, tmp_path, kind):
    method = method_of(kind)
    planned, parameters = adapt_on_meta(method, AutoConfig.from_pretrained(tiny_model))
    torch.manual_seed(0)
    adapted = apply_method(AutoModelForCausalLM.from_pretrained(tiny_model), method)
    assert parameters == count_parameters(adapted)
    # What ADAMSS adapts of a weight depends on its values.
    if kind != "ADAMSS":
        assert planned == target_kinds(adapted)
    assert sum(each.parameters for each in planned) == parameters[0]
    assert all(each.adapter for each in planned)

    batch = batch_of((3, 5, 4), (6, 3, 5))
    adapted.train()
    preflight.check_trainable(adapted)
    preflight.check_gradients(adapted, batch, checkpointing=False)
    trained = {name: values.detach().clone() for name, values in adapted.named_parameters() if values.requires_grad}
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = summed_completion_loss(adapted, batch)
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    assert any(not torch.equal(trained[name], dict(adapted.named_parameters())[name]) for name in trained)

    adapted.eval()
    with torch.no_grad():
        # Ours is the loss that the model itself has, whatever is put before the tokens.
        own = adapted(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        ours = summed_completion_loss(adapted, batch) / len(batch["predicting"])
        torch.testing.assert_close(ours, own)
        save_adapter(adapted, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "adapter")
        loaded, _ = load_adapter(tmp_path / "adapter")
        assert f"| method | {kind} |" in (tmp_path / "adapter" / "README.md").read_text()
        logits = adapted(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(loaded(input_ids=batch["input_ids"]).logits, logits)
        if kind in BESIDE:
            with pytest.raises(UserError, match=rf"^merge: {kind} cannot be merged"):
                peft_methods.check_merges(kind, "merge")
        else:
            peft_methods.check_merges(kind, "merge")
            merged = loaded.merge_and_unload(safe_merge=True)
            torch.testing.assert_close(merged(input_ids=batch["input_ids"]).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_that_no_recipe_trains_is_refused_with_the_reason(kind):
    with pytest.raises(ValueError, match=rf"found {kind}, which no recipe trains: .*{REFUSED[kind]}"):
        PeftMethod.model_validate({"name": "peft", "type": kind})


def test_targets_default_to_those_of_diablo_where_a_type_adapts_linear_layers(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)

    def kinds(kind: str, **options: Any) -> list[str]:
        return [each.kind for each in adapt_on_meta(method_of(kind, **options), config)[0]]

    assert kinds("SHIRA") == kinds("GRALORA") == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert kinds("SHIRA", target_modules=["q_proj", "o_proj"]) == ["q_proj", "o_proj"]
    assert kinds("LN_TUNING") == ["input_layernorm", "post_attention_layernorm", "norm"]
    assert kinds("TRAINABLE_TOKENS") == ["embed_tokens"]
    assert kinds("PREFIX_TUNING") == ["embedding"]


def test_a_target_that_matches_nothing_is_named(tiny_model):
    with pytest.raises(UserError, match=r"method.target_modules: qq match no module"):
        adapt_on_meta(method_of("GRALORA", target_modules=["q_proj", "qq"]), AutoConfig.from_pretrained(tiny_model))


def test_a_size_that_the_model_refuses_is_a_fault_of_the_method(tiny_model):
    with pytest.raises(UserError, match=r"^method: .*the block size is 7"):
        adapt_on_meta(method_of("C3A", block_size=7), AutoConfig.from_pretrained(tiny_model))


def test_settings_that_train_nothing_are_refused(tiny_model):
    method = method_of("PREFIX_TUNING", num_virtual_tokens=0)
    with pytest.raises(UserError, match="nothing would be trained"):
        adapt_on_meta(method, AutoConfig.from_pretrained(tiny_model))


def test_what_several_layers_share_is_counted_once(tiny_model):
    kinds, (trained, _) = adapt_on_meta(method_of("UNILORA"), AutoConfig.from_pretrained(tiny_model))
    assert trained == 64
    assert [(each.kind, each.shape, each.adapter, each.parameters) for each in kinds if each.parameters] == [
        ("unilora_theta_d", None, "64", 64)
    ]
    assert {each.adapter for each in kinds if not each.parameters} == {"shared"}


def test_a_type_that_reads_the_weights_is_not_trained_over_quantized_ones(tmp_path):
    settings = {"model": "some/model", "task": "mawps", "output": str(tmp_path), "quantization": "nf4"}
    recipe, config = Recipe.model_validate(settings), AutoConfig.for_model("llama")
    check_suited(recipe, config, torch.float32, [method_of("LORA"), method_of("PROMPT_TUNING")])
    with pytest.raises(UserError, match=r"^method: HRA, DEFT would have to read or change weights that nf4 quantizes"):
        check_suited(recipe, config, torch.float32, [method_of("HRA"), method_of("DEFT")])


def test_a_type_that_trains_in_the_precision_of_the_weights_is_trained_in_fp32():
    peft_methods.check_precision("LN_TUNING", torch.float32)
    peft_methods.check_precision("GRALORA", torch.bfloat16)
    with pytest.raises(UserError, match=r"^precision: LN_TUNING .* bfloat16, .* precision=fp32"):
        peft_methods.check_precision("LN_TUNING", torch.bfloat16)


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_trained_beside_bf16_weights_is_fp32_or_the_type_asks_for_fp32(tiny_model, kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    adapted = apply_method(model, method_of(kind))
    dtypes = {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad}
    try:
        peft_methods.check_precision(kind, torch.bfloat16)
    except UserError:
        assert dtypes == {torch.bfloat16}
    else:
        assert dtypes == {torch.float32}


def test_recipes_wait_for_peft_only_where_they_name_one_of_its_types():
    source = Path(peft_methods.__file__).with_name("methods.py").read_text(encoding="utf-8")
    assert [line for line in source.splitlines() if line.startswith(("import ", "from ")) and "peft" in line] == []
