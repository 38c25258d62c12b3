"""The authors' checkpoints: read, refused, and applied as their layout says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_python
from peft import PeftModel
from transformers import AutoModelForCausalLM

from diablo.errors import UserError
from diablo.models.adapters import load_adapter
from diablo.models.authors import import_checkpoint

# The tiny model has a width of 32, 16 for keys and values, and 64 inside the MLP.
SIZES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.up_proj": (32, 64)}


def write(path: Path, num_blocks: int, dtype=torch.float32, layers=(0, 1)) -> Path:
    """A file in the authors' key format; sizes that N does not divide as the paper has them."""
    generator = torch.Generator().manual_seed(0)
    content = {}
    for layer in layers:
        for kind, (rows, columns) in SIZES.items():
            d1, d2 = -(-rows // num_blocks), -(-columns // num_blocks)
            count = max(-(-rows // d1), -(-columns // d2))
            content[f"model.layers.{layer}.{kind}.block_A"] = (
                torch.randn(count, d1, d2, generator=generator).mul(0.2).to(dtype)
            )
    torch.save(content, path)
    return path


def dense_logits(base: Path, checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    for key, blocks in torch.load(checkpoint).items():
        weight = model.get_submodule(key.removesuffix(".block_A")).weight.data
        count, d1, d2 = blocks.shape
        for block in range(count):
            for i in range(block * d1, min((block + 1) * d1, weight.shape[1])):
                for o in range(block * d2, min((block + 1) * d2, weight.shape[0])):
                    weight[o, i] += blocks[block, i - block * d1, o - block * d2]
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("num_blocks", [4, 5, 7, 16])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_an_imported_adapter_gives_the_logits_of_the_dense_weights(num_blocks, layers, tiny_model, tmp_path):
    checkpoint = write(tmp_path / "adapter.chkpt", num_blocks, layers=layers)
    report = import_checkpoint(checkpoint, tmp_path / "adapter", base=str(tiny_model))
    assert report.modules == 3 * len(layers)
    assert report.parameters == sum(tensor.numel() for tensor in torch.load(checkpoint).values())
    ids = torch.arange(3, 23)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        got = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=ids).logits
    expected = dense_logits(tiny_model, checkpoint, ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-2
    # The strict loading of the command line finds nothing missing and nothing left over.
    load_adapter(tmp_path / "adapter")


def test_values_and_their_dtype_go_over_unchanged(tiny_model, tmp_path):
    from safetensors.torch import load_file

    checkpoint = write(tmp_path / "adapter.chkpt", 7, torch.bfloat16)
    import_checkpoint(checkpoint, tmp_path / "adapter", base=str(tiny_model))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for key, blocks in torch.load(checkpoint).items():
        got = saved[f"base_model.model.{key.removesuffix('.block_A')}.diablo_blocks"]
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, blocks)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_executed(tiny_model, tmp_path):
    torch.save({"model.layers.0.self_attn.q_proj.block_A": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.chkpt")
    with pytest.raises(UserError, match="not executed"):
        import_checkpoint(tmp_path / "bomb.chkpt", tmp_path / "adapter", base=str(tiny_model))
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "adapter").exists()


Q = "model.layers.0.self_attn.q_proj.block_A"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({}, "holds a dict, not a dict of"),
        ({"lora_A": torch.zeros(4, 8, 8)}, "the key 'lora_A'"),
        ({3: torch.zeros(4, 8, 8)}, "the key 3"),
        ({Q: "text"}, "is str"),
        ({Q: torch.zeros(4, 8)}, r"torch.float32 \(4, 8\)"),
        ({Q: torch.zeros(4, 8, 8, dtype=torch.int64)}, "torch.int64"),
        ({Q: torch.full((4, 8, 8), float("nan"))}, "NaN"),
        ({Q: torch.zeros(3, 8, 8)}, r"\(3, 8, 8\), which no number of blocks gives for a layer of 32 -> 32"),
        ({"model.layers.9.q_proj.block_A": torch.zeros(4, 8, 8)}, "names no linear layer of LlamaForCausalLM"),
        ({"model.embed_tokens.block_A": torch.zeros(4, 8, 8)}, "names no linear layer"),
    ],
)
def test_a_file_of_something_else_is_refused(content, words, tiny_model, tmp_path):
    torch.save(content, tmp_path / "file.chkpt")
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path / "file.chkpt", tmp_path / "adapter", base=str(tiny_model))
    assert not (tmp_path / "adapter").exists()


def test_a_damaged_or_absent_file_and_a_folder_in_use_are_refused(tiny_model, tmp_path):
    checkpoint = write(tmp_path / "adapter.chkpt", 4)
    # The last two make torch's own reader fail with an IndexError, as fuzzing has found.
    for content in (*(checkpoint.read_bytes()[:size] for size in (0, 10, 1000)), b"e", b"\x80\x02K\x01b."):
        (tmp_path / "cut.chkpt").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            import_checkpoint(tmp_path / "cut.chkpt", tmp_path / "adapter", base=str(tiny_model))
    with pytest.raises(UserError, match="is no file"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "adapter", base=str(tiny_model))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        import_checkpoint(checkpoint, tmp_path / "used", base=str(tiny_model))


def test_the_command(tiny_model, tmp_path):
    checkpoint = write(tmp_path / "adapter.chkpt", 4)
    command = ["-m", "diablo", "import", checkpoint, tmp_path / "out", "--base", tiny_model]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    assert "6 modules" in done.stdout
    assert "num_blocks=4" in done.stdout
    again = run_python(*command)
    assert again.returncode == 2
    assert "not empty" in again.stderr
