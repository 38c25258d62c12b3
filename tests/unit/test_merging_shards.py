"""Merging file by file: to the bit what PEFT's verbs make of the loaded model, and never the whole model in memory."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from launching import run_python
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from versions import saves_biases

from diablo import DiabloConfig
from diablo.errors import UserError
from diablo.merging import merge_adapter, shards


def make_adapter(base: Path, folder: Path, std: float = 0.05, **options) -> Path:
    """An adapter with random blocks on a saved model."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), DiabloConfig(**options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=std)
            assert "diablo_" in name or options.keys() & {"bias", "modules_to_save"}
    model.save_pretrained(folder)
    return folder


def copy_tokenizer(tiny_model: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(adapter))
    return model.merge_and_unload().state_dict()


@pytest.fixture
def sharded(tiny_model, tmp_path) -> Path:
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model).to(torch.bfloat16).save_pretrained(folder, max_shard_size="15KB")
    copy_tokenizer(tiny_model, folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_the_files_hold_what_merging_the_loaded_model_gives_to_the_bit(sharded, tmp_path, dtype):
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    report = merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    written = stored_tensors(report.folder)
    assert report.verified == len(written) == 21
    expected = merged_by_peft(sharded, adapter, dtype or torch.bfloat16)
    for name, tensor in written.items():
        assert tensor.dtype == (dtype or torch.bfloat16)
        assert torch.equal(tensor, expected[name]), name
    base = stored_tensors(sharded)
    assert sum(not torch.equal(tensor, base[name].to(tensor.dtype)) for name, tensor in written.items()) == 10
    assert {path.name for path in report.folder.glob("*.safetensors")} == {
        p.name for p in sharded.glob("*.safetensors")
    }
    loaded = AutoModelForCausalLM.from_pretrained(report.folder)
    assert loaded.dtype == (dtype or torch.bfloat16)
    assert report.logits[0] <= 0.05 * report.logits[1]


def test_a_model_that_does_not_fit_is_never_loaded(sharded, tmp_path, monkeypatch, diablo):
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    status, out, _ = diablo("merge", adapter, tmp_path / "merged")
    assert status == 0
    assert "Read back 21 tensors: each is the base model's, plus the blocks on its diagonal, to the bit." in out
    assert "Logits were not compared" in out


def test_the_memory_of_a_file_is_enough(tmp_path, tiny_model):
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=320, hidden_size=1024, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=8
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base, max_shard_size="16MB")
    copy_tokenizer(tiny_model, base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in base.glob("*.safetensors"))
    adapter = make_adapter(base, tmp_path / "adapter", num_blocks=64)
    script = f"""
import psutil, types
from pathlib import Path
from diablo.merging import merge_adapter
psutil.virtual_memory = lambda: types.SimpleNamespace(available=0)
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
merge_adapter(Path({str(adapter)!r}), Path({str(tmp_path / "merged")!r}))
print(peak() - before)
"""
    # A fork would have pages of libraries come in that stand in a process of its own already.
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown = int(run.stdout.split()[-1])
    assert size > 10 * largest
    assert grown < 4 * largest, f"{grown / 1e6:.0f} MB for files of up to {largest / 1e6:.0f} MB"


def test_a_weight_of_the_other_orientation_and_ragged_sizes(tmp_path, tiny_model):
    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=10, vocab_size=320, n_positions=64)).save_pretrained(base)
    copy_tokenizer(tiny_model, base)
    adapter = make_adapter(base, tmp_path / "adapter", num_blocks=4, target_modules=["c_attn", "c_fc"])
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.verified is not None
    expected = merged_by_peft(base, adapter, torch.float32)
    for name, tensor in stored_tensors(report.folder).items():
        assert torch.equal(tensor, expected[name]), name


def test_experts_that_are_stored_one_by_one_are_merged_through_the_loaded_model(tmp_path, tiny_model):
    torch.manual_seed(0)
    base = tmp_path / "base"
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(base)
    copy_tokenizer(tiny_model, base)
    options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "num_blocks": 4}
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    report = merge_adapter(adapter, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(report.folder).state_dict()
    expected = merged_by_peft(base, adapter, torch.float32)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"modules_to_save": ["lm_head"]}, id="modules"),
        pytest.param({"bias": "all"}, id="biases", marks=saves_biases),
    ],
)
def test_an_adapter_that_holds_more_than_blocks_is_merged_through_the_loaded_model(tiny_model, tmp_path, options):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", num_blocks=4, **options)
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.verified is None
    expected = merged_by_peft(tiny_model, adapter, torch.float32)
    for name, tensor in AutoModelForCausalLM.from_pretrained(report.folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_same_weights_under_other_names_are_not_looked_at(sharded, tmp_path):
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, sharded / "consolidated.safetensors")
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    report = merge_adapter(adapter, tmp_path / "merged")
    assert not (report.folder / "consolidated.safetensors").exists()
    assert report.verified == 21


def test_blocks_that_are_not_finite_leave_nothing_behind(sharded, tmp_path):
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    list(tensors.values())[-1][0, 0, 0] = torch.inf
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"cannot be merged: model\.layers\.1.* would have NaN or infinite values"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused_before_anything_is_written(sharded, tmp_path, tiny_model):
    torch.manual_seed(0)
    other = tmp_path / "other"
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(other)
    copy_tokenizer(tiny_model, other)
    adapter = make_adapter(other, tmp_path / "adapter", num_blocks=4)
    with pytest.raises(
        UserError, match=r"does not fit .*q_proj\.diablo_blocks is \(4, 16, 16\) and should be \(4, 8, 8\)"
    ):
        merge_adapter(adapter, tmp_path / "merged", base=str(sharded))
    assert not (tmp_path / "merged").exists()


def test_a_base_of_one_indexed_file_can_be_loaded_when_it_is_merged(sharded, tiny_model, tmp_path):
    base = tmp_path / "indexed"
    shutil.copytree(sharded, base)
    for path in base.glob("*.safetensors"):
        path.unlink()
    tensors = {name: tensor.clone() for name, tensor in stored_tensors(sharded).items()}
    save_file(tensors, base / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    report = merge_adapter(make_adapter(base, tmp_path / "adapter", num_blocks=4), tmp_path / "merged")
    assert report.verified == 21
    assert AutoModelForCausalLM.from_pretrained(report.folder).dtype == torch.bfloat16


def test_the_whole_file_goes_before_an_index_as_in_transformers(sharded, tmp_path):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in stored_tensors(sharded).items()}
    save_file(tensors, sharded / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    report = merge_adapter(adapter, tmp_path / "merged")
    assert [path.name for path in report.folder.glob("*.safetensors")] == ["model.safetensors"]
    expected = merged_by_peft(sharded, adapter, torch.bfloat16)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored_tensors(report.folder).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_transformers_keeps_in_fp32_stays_so_in_another_dtype(sharded, tmp_path, dtype, monkeypatch):
    # One kind is kept in both half precisions, the other in fp16 alone. Llama itself could not compute so.
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["post_attention_layernorm"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["o_proj.weight"])
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    report = merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(report.folder, dtype=dtype).state_dict()
    for name, tensor in stored_tensors(report.folder).items():
        assert tensor.dtype == loaded[name].dtype, name


def test_an_index_that_promises_what_a_file_has_not_is_a_clear_error(sharded, tmp_path):
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: files[files.index(file) - 1] for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not hold what the index says"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_a_damaged_base_is_a_clear_error(sharded, tmp_path, damage):
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    path = sorted(sharded.glob("*.safetensors"))[1]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        path.unlink()
    else:
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["?"]}))
    with pytest.raises(UserError, match=r"model"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_file_that_reads_back_otherwise_is_noticed(sharded, tmp_path, monkeypatch):
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    write = shards.write_tensors

    def write_with_a_fault(tensors, path):
        for tensor in tensors.values():
            tensor.view(-1)[-1] += 1
        write(tensors, path)

    monkeypatch.setattr(shards, "write_tensors", write_with_a_fault)
    with pytest.raises(UserError, match="reads back otherwise"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(sharded, tmp_path):
    adapter = make_adapter(sharded, tmp_path / "adapter", num_blocks=4)
    script = f"""
import resource
from pathlib import Path
from diablo.errors import UserError
from diablo.merging import merge_adapter
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    merge_adapter(Path({str(adapter)!r}), Path({str(tmp_path / "merged")!r}))
except UserError as error:
    print("refused:", error)
"""
    run = run_python("-c", script)
    assert "cannot be written" in run.stdout, run.stdout + run.stderr
    assert "is the disk full?" in run.stdout
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob("tmp*"))


def test_an_adapter_is_not_merged_into_other_weights_unless_that_is_asked_for(tiny_model, tmp_path, diablo):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", num_blocks=4)
    # A later revision of the same model.
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.model.layers[-1].mlp.down_proj.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    copy_tokenizer(tiny_model, tmp_path / "other")
    arguments = ("merge", adapter, tmp_path / "merged", "--base", tmp_path / "other")
    status, _, errors = diablo(*arguments)
    assert status == 2
    assert f"was trained on {tiny_model}, whose weights differ" in " ".join(errors.split())
    assert not (tmp_path / "merged").exists()
    status, output, _ = diablo(*arguments, "--other-base")
    assert status == 0
    assert "other weights than the one that the adapter was trained on" in " ".join(output.split())
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_what_is_merged_through_the_loaded_model_is_checked_too(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", num_blocks=4, modules_to_save=["lm_head"])
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.model.layers[-1].mlp.down_proj.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    copy_tokenizer(tiny_model, tmp_path / "other")
    with pytest.raises(UserError, match="whose weights differ"):
        merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()
    report = merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "other"), other_base=True)
    assert report.is_same_base is False
    assert merge_adapter(adapter, tmp_path / "own").is_same_base is True


# Tied weights.


@pytest.fixture(params=["one file", "several files"])
def tied(request, tiny_model, tmp_path) -> Path:
    folder = tmp_path / "tied"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder, **({} if request.param == "one file" else {"max_shard_size": "30KB"}))
    copy_tokenizer(tiny_model, folder)
    assert "lm_head.weight" not in stored_tensors(folder)
    assert (folder / "model.safetensors.index.json").exists() == (request.param == "several files")
    return folder


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(64).unsqueeze(0)).logits


def assert_computes_as_beside(base: Path, adapter: Path, merged: Path) -> None:
    """The merged model, read back from the disk, computes what the adapter does beside its base, and not the base."""
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert not loaded.config.tie_word_embeddings
    assert not torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits_of(plain)
    beside = logits_of(PeftModel.from_pretrained(plain, str(adapter)))
    assert (logits_of(loaded) - beside).abs().max() < 1e-4 * (beside - before).abs().max()


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_tied_weight_that_an_adapter_changes_is_untied_in_what_is_written(tied, tmp_path, diablo, targets):
    adapter = make_adapter(tied, tmp_path / "adapter", std=0.3, num_blocks=4, target_modules=targets)
    status, out, _ = diablo("merge", adapter, tmp_path / "merged")
    assert status == 0
    assert "Untied lm_head.weight from model.embed_tokens.weight" in out
    assert "Read back 21 tensors" in out
    written = stored_tensors(tmp_path / "merged")
    changed = {f"model.{name}.weight" if name == "embed_tokens" else f"{name}.weight" for name in targets}
    base = stored_tensors(tied)["model.embed_tokens.weight"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(written[name], base) == (name not in changed)
    assert_computes_as_beside(tied, adapter, tmp_path / "merged")


def test_a_tied_weight_that_an_adapter_leaves_alone_stays_tied(tied, tmp_path):
    adapter = make_adapter(tied, tmp_path / "adapter", num_blocks=4)
    report = merge_adapter(adapter, tmp_path / "merged")
    assert not report.untied
    assert report.verified == 20
    assert AutoModelForCausalLM.from_pretrained(report.folder).config.tie_word_embeddings


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DiabloConfig(num_blocks=4, target_modules=["lm_head"], bias="all"), marks=saves_biases),
        DiabloConfig(num_blocks=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
        LoraConfig(r=4, target_modules=["embed_tokens"]),
    ],
    ids=["biases", "modules_to_save", "lora", "lora-embeddings"],
)
def test_a_tied_weight_is_untied_also_where_the_model_is_merged_as_a_whole(tied, tmp_path, config):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied), copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert report.verified is None
    assert report.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert_computes_as_beside(tied, tmp_path / "adapter", report.folder)


def test_a_tied_weight_that_is_stored_under_the_other_name_is_untied(tied, tmp_path):
    adapter = make_adapter(tied, tmp_path / "adapter", std=0.3, num_blocks=4, target_modules=["lm_head"])
    tensors = stored_tensors(tied)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.verified == 21
    assert_computes_as_beside(tied, adapter, report.folder)


def test_embeddings_that_an_adapter_brings_of_its_own_are_merged_through_the_loaded_model(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", num_blocks=4, target_modules=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.verified is None
    expected = merged_by_peft(tiny_model, adapter, torch.float32)["lm_head.weight"]
    assert torch.equal(stored_tensors(report.folder)["lm_head.weight"], expected)
