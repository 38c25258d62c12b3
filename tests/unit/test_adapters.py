"""Adapters on disk: whatever does not fit is an error, and nothing is left half written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from diablo import DiabloConfig
from diablo.errors import UserError
from diablo.merging import merge_adapter
from diablo.models.adapters import load_adapter, write_as_lora
from diablo.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder, base_model_of, is_adapter
from diablo.models.saving import save_adapter

PROBE = torch.arange(40).unsqueeze(0)


def adapted_model(tiny_model: Path) -> Any:
    """With blocks that are not zero, or else it would be the base model and the tests would show nothing."""
    torch.manual_seed(3)
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn_init = torch.randn_like(parameter) * 0.3
            parameter.data.copy_(nn_init)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: a loaded adapter stands beside the weight, one that is trained stands in it."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A saved adapter and the logits of the model that it was saved from."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model = adapted_model(tiny_model)
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model), folder)
    return folder, logits(model)


@pytest.fixture
def adapter(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "adapter"))


def change_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def test_loaded_adapter_computes_what_the_saved_one_did(saved: tuple[Path, torch.Tensor], tiny_model: Path) -> None:
    model, tokenizer = load_adapter(saved[0])
    assert_same(logits(model), saved[1])
    assert not model.training
    assert tokenizer("x")["input_ids"]
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert (base - saved[1]).abs().max() > 1e-2


def test_saved_folder_has_a_card_and_no_leftovers(saved: tuple[Path, torch.Tensor], tiny_model: Path) -> None:
    names = {path.name for path in saved[0].iterdir()}
    assert names == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"}
    assert [path.name for path in saved[0].parent.iterdir()] == ["adapter"]
    card = (saved[0] / "README.md").read_text(encoding="utf-8")
    assert f"a folder called {tiny_model.name}" in card
    assert str(tiny_model) not in card
    assert "| num_blocks | 4 |" in card


def test_saving_again_replaces_the_folder(saved: tuple[Path, torch.Tensor], adapter: Path, tiny_model: Path) -> None:
    (adapter / "stale").write_text("")
    save_adapter(adapted_model(tiny_model), None, adapter)
    assert not (adapter / "stale").exists()
    assert_same(logits(load_adapter(adapter)[0]), saved[1])


def test_adapter_is_found_in_its_folder_and_in_the_run(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    assert adapter_folder(saved[0]) == adapter_folder(saved[0].parent) == saved[0]
    assert is_adapter(saved[0])
    assert is_adapter(saved[0].parent)
    assert not is_adapter(tmp_path)
    with pytest.raises(UserError, match=f"is no adapter: it has no {ADAPTER_CONFIG}"):
        adapter_folder(tmp_path)


def test_missing_tensor(adapter: Path) -> None:
    gone = next(iter(load_file(adapter / ADAPTER_WEIGHTS)))
    change_weights(adapter, lambda tensors: tensors.__delitem__(gone))
    with pytest.raises(UserError) as caught:
        load_adapter(adapter)
    assert "does not fit" in str(caught.value)
    assert f"lacks {gone}" in str(caught.value)


def test_unexpected_tensor(adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors.update(stray=torch.zeros(2)))
    with pytest.raises(UserError, match="none missing, stray too many"):
        load_adapter(adapter)


def test_tensor_of_another_shape(adapter: Path) -> None:
    name = next(iter(load_file(adapter / ADAPTER_WEIGHTS)))
    change_weights(adapter, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    with pytest.raises(UserError, match=r"does not fit .*size mismatch"):
        load_adapter(adapter)


def test_adapter_of_another_number_of_blocks(adapter: Path) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"num_blocks": 8}))
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(adapter)


def test_truncated_weights(adapter: Path) -> None:
    content = (adapter / ADAPTER_WEIGHTS).read_bytes()
    for length in (0, 4, len(content) // 2, len(content) - 1):
        (adapter / ADAPTER_WEIGHTS).write_bytes(content[:length])
        with pytest.raises(UserError, match=f"{ADAPTER_WEIGHTS} cannot be read: .*truncated"):
            load_adapter(adapter)


def test_pickled_weights_are_not_loaded(adapter: Path) -> None:
    torch.save(load_file(adapter / ADAPTER_WEIGHTS), adapter / "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"has no {ADAPTER_WEIGHTS}; other formats are not loaded"):
        load_adapter(adapter)


@pytest.mark.parametrize("content", ["{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": ""}'])
def test_config_that_names_no_base_model(adapter: Path, content: str) -> None:
    (adapter / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(UserError, match=f"{ADAPTER_CONFIG} does not name a base model; give one with --base"):
        base_model_of(adapter)


def test_config_without_base_model_loads_with_one_given(
    saved: tuple[Path, torch.Tensor], adapter: Path, tiny_model: Path
) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not name a base model"):
        load_adapter(adapter)
    assert_same(logits(load_adapter(adapter, base=str(tiny_model))[0]), saved[1])


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_config_that_cannot_be_read(adapter: Path, content: bytes) -> None:
    (adapter / ADAPTER_CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=ADAPTER_CONFIG):
        load_adapter(adapter)


@pytest.mark.parametrize("change", [{"peft_type": "NO_SUCH"}, {"num_blocks": "many"}, {"num_blocks": 10_000}])
def test_config_with_settings_that_mean_nothing(adapter: Path, change: dict[str, Any]) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError):
        load_adapter(adapter)


def test_merged_model_computes_what_the_adapted_one_does(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    report = merge_adapter(saved[0], tmp_path / "deep" / "merged")
    merged = AutoModelForCausalLM.from_pretrained(report.folder)
    torch.testing.assert_close(logits(merged), saved[1], rtol=1e-4, atol=1e-5)
    assert report.folder == tmp_path / "deep" / "merged"
    assert report.dtype == merged.dtype == torch.float32
    difference, largest = report.logits
    assert 0 <= difference < 1e-5 < largest
    assert AutoTokenizer.from_pretrained(report.folder)("x")["input_ids"]
    assert not is_adapter(report.folder)
    assert [path.name for path in report.folder.parent.iterdir()] == ["merged"]


def test_merge_in_another_dtype(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    report = merge_adapter(saved[0], tmp_path / "merged", dtype=torch.bfloat16)
    assert report.dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(report.folder).dtype == torch.bfloat16


def test_merge_into_what_is_already_there(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for taken in ("full", "file"):
        with pytest.raises(UserError, match="exists and is not empty"):
            merge_adapter(saved[0], tmp_path / taken)
    assert (tmp_path / "full" / "precious").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    assert (merge_adapter(saved[0], tmp_path / "empty").folder / "config.json").is_file()


def test_adapter_with_nan_is_not_merged(adapter: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).view(-1)[0] = float("nan")

    change_weights(adapter, spoil)
    with pytest.raises(UserError, match="cannot be merged"):
        merge_adapter(adapter, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_written_as_lora_with_its_error(adapter: Path, saved, tiny_model: Path, tmp_path: Path) -> None:
    report = write_as_lora(adapter, tmp_path / "lora", 1.0)
    assert report.relative_error < 1e-3
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), saved[1], rtol=1e-3, atol=1e-3)
    assert write_as_lora(adapter, tmp_path / "rank_one", 1).relative_error > 0.1
    card = (tmp_path / "rank_one" / "README.md").read_text()
    assert "relative error of the update" in card
    assert "import diablo" not in card


def test_a_conversion_that_fails_leaves_no_folder(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank=0 is out of range"):
        write_as_lora(adapter, tmp_path / "lora", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"into": "dequantized"}, "--into: found dequantized, but nothing is quantized"),
        ({"into": "requantized", "calibration": lambda tokenizer: torch.ones(1, 8)}, "but nothing is quantized"),
        ({"calibration": lambda tokenizer: torch.ones(1, 8)}, "--calibration: give it with --into requantized"),
    ],
)
def test_choices_for_quantized_bases_are_refused_where_nothing_is_quantized(
    saved: tuple[Path, torch.Tensor], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        merge_adapter(saved[0], tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()
