"""GGUF files and what Ollama takes: what is ours with a stand-in, and real files by llama.cpp where it is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from diablo import DiabloConfig
from diablo.models.builtin import builtin_model
from diablo.models.saving import save_adapter
from diablo.publishing.gguf import SCRIPT, VARIABLE

# It writes a file that says what it was given. That a model is converted rightly, llama.cpp's own shows below.
STAND_IN = """
import argparse, json, sys
from pathlib import Path
from gguf import GGUFWriter
import numpy as np
parser = argparse.ArgumentParser()
for name in ("model", "--outfile", "--outtype", "--model-name"):
    parser.add_argument(name)
given = parser.parse_args()
model = Path(given.model)
if "fails" in given.model_name:
    sys.exit("Traceback ...\\nNotImplementedError: Architecture 'X' not supported!")
if "package" in given.model_name:
    sys.exit("ModuleNotFoundError: No module named 'sentencepiece'")
if "torn" in given.model_name:
    Path(given.outfile).write_bytes(b"GGUF")
    sys.exit(0)
writer = GGUFWriter(given.outfile, "llama")
writer.add_name(given.model_name)
writer.add_string("test.outtype", given.outtype)
writer.add_string("test.files", json.dumps(sorted(path.name for path in model.iterdir())))
writer.add_tensor("token_embd.weight", np.ones((2, 3), dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / SCRIPT).write_text(STAND_IN)
    monkeypatch.delenv(VARIABLE, raising=False)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("exported") / "adapter", num_blocks=4)


def make_adapter(model: Path, folder: Path, **settings) -> Path:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), DiabloConfig(task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "diablo" in name:
                parameter.normal_(std=0.02)
    save_adapter(adapted, None, folder)
    return folder


def field(path: Path, name: str) -> str:
    return GGUFReader(path).get_field(name).contents()


def test_an_adapter_is_merged_for_the_converter_and_nothing_else_is_left(
    diablo, llama_cpp, adapter, tmp_path, monkeypatch
):
    out = tmp_path / "out" / "apples.gguf"
    out.parent.mkdir()
    status, text, _ = diablo("export", "gguf", adapter, out, "--llama-cpp", llama_cpp, "--outtype", "q8_0")
    assert status == 0
    assert f"Wrote {out}: 1 tensors of llama, 6 parameters" in text
    assert field(out, "test.outtype") == "q8_0"
    assert field(out, "general.name") == "apples"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(json.loads(field(out, "test.files")))
    assert os.listdir(out.parent) == ["apples.gguf"]
    # llama.cpp is also found where the environment says, and on the PATH.
    monkeypatch.setenv(VARIABLE, str(llama_cpp / SCRIPT))
    assert diablo("export", "gguf", adapter, out)[0] == 0
    monkeypatch.delenv(VARIABLE)
    (llama_cpp / SCRIPT).chmod(0o755)
    monkeypatch.setenv("PATH", str(llama_cpp), prepend=os.pathsep)
    status, text, _ = diablo("export", "gguf", adapter, out, "--json")
    assert status == 0
    record = json.loads(text)
    assert (record["path"], record["tensors"], record["bytes"]) == (str(out), 1, out.stat().st_size)


def test_a_plain_model_is_converted_where_it_lies(diablo, llama_cpp, tiny_model, tmp_path):
    out = tmp_path / "model.gguf"
    assert diablo("export", "gguf", tiny_model, out, "--llama-cpp", llama_cpp)[0] == 0
    assert set(json.loads(field(out, "test.files"))) == {path.name for path in tiny_model.iterdir()}


def test_exporting_says_what_is_missing_and_writes_nothing(
    diablo, llama_cpp, adapter, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", "")
    out, given = tmp_path / "x.gguf", ("--llama-cpp", llama_cpp)
    for arguments, expected in (
        (("gguf", adapter, out), "of llama.cpp is not found; get it with: git clone"),
        (("gguf", adapter, out, "--llama-cpp", tmp_path), f"--llama-cpp: found '{tmp_path}', where there is no"),
        (("gguf", adapter, out, *given, "--outtype", "q4"), "--outtype: found 'q4'; allowed: auto, f32, f16, bf16"),
        (("gguf", tmp_path / "none", out, *given), "holds neither an adapter nor a model"),
        (("gguf", tiny_model, out, *given, "--base", tiny_model), "--base: "),
        (("gguf", adapter, tmp_path / "no" / "x.gguf", *given), "OUT: "),
        (
            ("gguf", tiny_model, tmp_path / "fails.gguf", *given),
            "failed: NotImplementedError: Architecture 'X' not supp",
        ),
        (
            ("gguf", tiny_model, tmp_path / "package.gguf", *given),
            "it needs the package sentencepiece; install what it",
        ),
        (("gguf", tiny_model, tmp_path / "torn.gguf", *given), "The GGUF file cannot be read back"),
        (("ollama", adapter, llama_cpp, *given), "exists and is not empty"),
        (("ollama", adapter, out, *given, "--no-chat", "--system", "Be brief."), "--system: found one for a model tha"),
        (("ollama", adapter, out, *given, "--system", 'a """ b'), "--system: found a text that is empty, or has"),
    ):
        status, _, error = diablo("export", *arguments)
        assert (status, expected in error) == (2, True), error
        assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"llama.cpp"}


def test_ollama_is_told_to_ask_a_model_as_it_was_trained(diablo, llama_cpp, tiny_model, adapter, tmp_path):
    folder = tmp_path / "Apples"
    status, text, _ = diablo(
        "export", "ollama", adapter, folder, "--llama-cpp", llama_cpp, "--system", "You count apples."
    )
    assert status == 0
    assert f"ollama create apples -f {folder / 'Modelfile'}" in text
    assert {path.name for path in folder.iterdir()} == {"Modelfile", "model.gguf"}
    told = (folder / "Modelfile").read_text()
    assert told.startswith('FROM ./model.gguf\nTEMPLATE """{{ if .System }}<s>system\n')
    assert 'SYSTEM """You count apples."""' in told
    assert 'PARAMETER stop "</s>"' in told
    assert "PARAMETER temperature 0\n" in told, "the generation config does not sample"

    # A model that was trained on plain text has a chat template all the same, which Ollama would take.
    assert diablo("export", "ollama", adapter, tmp_path / "plain", "--llama-cpp", llama_cpp, "--no-chat")[0] == 0
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "plain" / "Modelfile").read_text()


def test_ollama_samples_as_the_generation_config_says_and_is_told_of_a_template_that_it_cannot_have(
    diablo, llama_cpp, tiny_model, tmp_path
):
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=None, eos_token_id=stops).save_pretrained(model)
    status, text, _ = diablo("export", "ollama", model, tmp_path / "out", "--llama-cpp", llama_cpp)
    assert status == 0
    assert "ollama show --template out" in text
    told = (tmp_path / "out" / "Modelfile").read_text()
    assert "TEMPLATE" not in told
    assert 'PARAMETER stop "</s>"\nPARAMETER stop "<pad>"\n' in told
    assert "PARAMETER temperature 0.6\n" in told
    assert "PARAMETER top_p 0.9\n" in told


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} does not name llama.cpp")
def test_llama_cpps_own_converter_makes_a_file_of_the_merged_weights(diablo, tmp_path):
    adapter = make_adapter(builtin_model("smollm2-135m"), tmp_path / "adapter", num_blocks=64)
    merged, out = tmp_path / "merged", tmp_path / "model.gguf"
    assert diablo("merge", adapter, merged)[0] == 0
    status, text, error = diablo("export", "gguf", adapter, out, "--outtype", "f32")
    assert status == 0, error
    assert "272 tensors of llama, 134,515,008 parameters" in text
    tensors = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    assert len(tensors) == 272
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.attn_v.weight": "model.layers.3.self_attn.v_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    base = builtin_model("smollm2-135m") / "model.safetensors"
    with safe_open(merged / "model.safetensors", "np") as file, safe_open(base, "np") as before:
        for name, ours in names.items():
            expected = file.get_tensor(ours)
            assert tuple(reversed(tensors[name].shape.tolist())) == expected.shape
            np.testing.assert_array_equal(tensors[name].data.reshape(expected.shape), expected)
            changed = not np.array_equal(expected, before.get_tensor(ours))
            assert changed == ("proj" in ours), "the blocks are in it"
    assert "im_start" in field(out, "tokenizer.chat_template")
