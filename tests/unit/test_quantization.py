"""Quantization: MagR against a direct solver, layers against the plain formula, models through transformers."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.optimize import lsq_linear, minimize_scalar
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from versions import not_on_oldest_peft

from diablo import DiabloConfig
from diablo.errors import UserError
from diablo.models import loading
from diablo.models.loading import load_model, load_tokenizer
from diablo.quantization import Scheme, calibration_rows
from diablo.quantization import model as quantization
from diablo.quantization.magr import objective, project_on_l1_ball, reduce_magnitude, shrink_largest
from diablo.quantization.model import quantize_model
from diablo.quantization.weights import dequantize, quantize_weight

QUIET = Console(quiet=True)


# MagR


@settings(deadline=None)
@given(
    vector=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12),
    radius=st.sampled_from([1e-4, 0.01, 0.5, 3.0, 1e3]),
)
def test_the_projection_is_that_of_sorting(vector: list[float], radius: float) -> None:
    [projected] = project_on_l1_ball(torch.tensor([vector], dtype=torch.float64), radius)
    sizes = sorted((abs(value) for value in vector), reverse=True)
    if sum(sizes) <= radius:
        threshold = 0.0
    else:
        sums = [sum(sizes[: count + 1]) for count in range(len(sizes))]
        kept = [count for count, size in enumerate(sizes, start=1) if size * count > sums[count - 1] - radius]
        threshold = (sums[kept[-1] - 1] - radius) / kept[-1]
    expected = [max(abs(value) - threshold, 0.0) * (1 if value > 0 else -1) for value in vector]
    assert projected.tolist() == pytest.approx(expected, abs=1e-9)
    assert float(projected.abs().sum()) <= radius * (1 + 1e-9)


def test_shrinking_lowers_the_largest_entries_of_each_group_to_one_size() -> None:
    row = torch.tensor([[3.0, -2.0, 0.5, 0.1, 0.2, -0.1]], dtype=torch.float64)
    shrunk = shrink_largest(row, 1.5, 3)
    # 3 and 2 come down by 1.25 and 0.25 to the same size; the second group is within the scale and vanishes.
    assert shrunk.tolist()[0] == pytest.approx([1.75, -1.75, 0.5, 0, 0, 0])


def calibrated(outputs: int, inputs: int, *, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the gram of inputs that hardly reach most directions, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) * 0.1
    reached = torch.randn(200, rank, generator=generator, dtype=torch.float64)
    samples = reached @ torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    samples += 0.05 * torch.randn(200, inputs, generator=generator, dtype=torch.float64)
    return weight, samples.T @ samples


def solved(weight: torch.Tensor, gram: torch.Tensor, alpha: float) -> float:
    """The least objective of one output whose inputs are one group: a box of each size, and the best size of a box."""
    normalised = gram / torch.linalg.eigvalsh(gram)[-1]
    root = torch.linalg.cholesky(normalised, upper=True).numpy()

    def best(bound: float) -> float:
        return lsq_linear(root, root @ weight.numpy(), bounds=(-bound, bound), method="bvls").cost + alpha * bound

    largest = float(weight.abs().max())
    return minimize_scalar(best, bounds=(1e-9, largest), method="bounded", options={"xatol": 1e-10}).fun


@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 1e-2])
def test_magr_reaches_the_objective_of_a_direct_solver(alpha: float) -> None:
    weight, gram = calibrated(4, 12, rank=5)
    reduced = reduce_magnitude(weight, gram, group_size=None, alpha=alpha, iterations=2000)
    found = objective(reduced, weight, gram, group_size=None, alpha=alpha)
    for row, value in zip(weight, found.tolist(), strict=True):
        assert value == pytest.approx(solved(row, gram, alpha), rel=1e-4)
    before = objective(weight, weight, gram, group_size=None, alpha=alpha)
    assert bool((found < before).all())
    assert bool((reduced.abs().amax(1) < weight.abs().amax(1)).all())


def test_magr_shrinks_the_largest_weight_of_each_group_and_keeps_the_outputs() -> None:
    weight, gram = calibrated(16, 64, rank=20)
    reduced = reduce_magnitude(weight, gram, group_size=16, alpha=1e-4)
    groups = [each.unflatten(1, (-1, 16)).abs().amax(2) for each in (reduced, weight)]
    assert float((groups[0] / groups[1]).mean()) < 0.8
    change = reduced - weight
    error = ((change @ gram) * change).sum() / ((weight @ gram) * weight).sum()
    assert float(error) < 1e-3


def test_inputs_of_nothing_leave_the_weight_as_it_is() -> None:
    weight = torch.randn(4, 16)
    assert torch.equal(reduce_magnitude(weight, torch.zeros(16, 16), group_size=16, alpha=1e-4), weight)


# One layer

needs_gptqmodel = pytest.mark.skipif(
    not (find_spec("gptqmodel") and find_spec("optimum")), reason="gptqmodel or optimum is missing"
)


def plainly_rounded(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Each group on the grid between its least and largest weight, and 0."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return ((((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale).flatten(1)


@needs_gptqmodel
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_layer_is_what_its_stored_integers_say(bits: int) -> None:
    weight, gram = (each.float() for each in calibrated(96, 128, rank=40))
    bias = torch.randn(96)
    errors = {}
    for method in ("rtn", "gptq", "magr-gptq"):
        scheme = Scheme(bits, 32, method)
        found = quantize_weight(weight, bias, gram, scheme)
        assert torch.equal(dequantize(found.tensors, scheme), found.weight)
        packed = found.tensors["qweight"]
        assert packed.numel() * 32 == weight.numel() * bits
        assert torch.equal(found.tensors["bias"], bias.half())
        # Scales are stored in fp16.
        levels = found.weight.unflatten(1, (-1, 32))
        assert max(len(row.unique()) for row in levels.flatten(0, 1)) <= 2**bits
        change = found.weight - weight
        expected = ((change @ gram * change).sum() / (weight @ gram * weight).sum()).sqrt()
        assert found.error == pytest.approx(float(expected), rel=1e-4)
        errors[method] = found.error
        if method == "rtn":
            plain = plainly_rounded(weight, bits, 32)
            assert float((found.weight - plain).abs().max()) < 2e-3 * float(plain.abs().max())
    assert errors["gptq"] < 0.8 * errors["rtn"]
    if bits == 2:
        assert errors["magr-gptq"] < errors["gptq"]


# A model


@pytest.fixture(scope="module", autouse=True)
def kernels_are_not_compiled() -> Iterator[None]:
    """The compiled kernels of gptqmodel are its own, and each takes seconds to compile."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def calibration(tiny_model: Path) -> torch.Tensor:
    return calibration_rows("builtin", load_tokenizer(str(tiny_model)), rows=12, length=48)


@pytest.fixture(scope="module")
def quantized(tiny_model: Path, calibration: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    folder = tmp_path_factory.mktemp("quantized") / "model"
    quantize_model(str(tiny_model), folder, Scheme(4, 32), calibration, console=QUIET)
    return folder


def test_transformers_loads_a_quantized_model(quantized: Path, tiny_model: Path, calibration: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    errors = json.loads((quantized / "quantization.json").read_text())["errors"]
    assert len(errors) == 14
    stored: dict[str, torch.Tensor] = {}
    for path in quantized.glob("*.safetensors"):
        stored |= load_file(path)
    for name in errors:
        tensors = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        plain.get_submodule(name).weight.data = dequantize(tensors, Scheme(4, 32))
    with torch.no_grad():
        outputs = [each(input_ids=calibration[:2]).logits for each in (model, plain)]
    # gptqmodel multiplies by scales in fp16.
    assert float((outputs[0] - outputs[1]).norm() / outputs[1].norm()) < 5e-3
    assert model.config.quantization_config.meta["method"] == "magr-gptq"
    assert not list(quantized.parent.glob("*.partial"))


def test_an_interrupted_call_goes_on_and_ends_with_the_same_files(
    quantized: Path, tiny_model: Path, calibration: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, original, calls = tmp_path / "again", quantization._quantize_block, []

    def once(block: nn.Module, prefix: str, *rest: Any) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(prefix)
        original(block, prefix, *rest)

    monkeypatch.setattr(quantization, "_quantize_block", once)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(str(tiny_model), folder, Scheme(4, 32), calibration, console=QUIET)
    assert not folder.exists()
    monkeypatch.setattr(quantization, "_quantize_block", original)
    with pytest.raises(UserError, match=r"bits: changed since the quantization in .*again.partial"):
        quantize_model(str(tiny_model), folder, Scheme(2, 32), calibration, console=QUIET)

    def count(block: nn.Module, prefix: str, *rest: Any) -> None:
        calls.append(prefix)
        original(block, prefix, *rest)

    monkeypatch.setattr(quantization, "_quantize_block", count)
    quantize_model(str(tiny_model), folder, Scheme(4, 32), calibration, console=QUIET)
    assert calls == ["model.layers.0.", "model.layers.1."]
    for path in quantized.glob("*.safetensors"):
        once_more = load_file(folder / path.name)
        assert all(torch.equal(value, once_more[name]) for name, value in load_file(path).items())


def test_an_adapter_is_trained_over_a_quantized_model(diablo: Any, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"model: {quantized}\ntask: mawps\nmethod: {{num_blocks: 4}}\ndata: {{limit: 192}}\n"
        f"output: {tmp_path / 'run'}\n"
        "training: {max_steps: 24, batch_size: 8, learning_rate: 3.0e-2}\nprecision: fp32\n"
        "evaluation: {before: false, after: false, limit: 16}\n"
    )
    status, out, err = diablo("train", tmp_path / "recipe.yaml")
    assert status == 0, err
    assert f"diablo merge {tmp_path / 'run'} {tmp_path / 'run'}-merged --into dequantized\n" in out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    before, after = (loss for _, loss in record["training"]["held_out_loss"])
    assert after < before - 0.2
    status, out, _ = diablo("train", tmp_path / "recipe.yaml", "--dry-run", f"output={tmp_path / 'other'}")
    assert status == 0
    assert "quantization        gptq" in out
    status, _, err = diablo("train", tmp_path / "recipe.yaml", "method=full", f"output={tmp_path / 'other'}")
    assert status == 2
    assert "method: full would have to read or change weights that gptq quantizes" in err
    command = ["compare", tmp_path / "recipe.yaml", "--methods", "diablo,pissa", "--dry-run"]
    status, _, err = diablo(*command, f"output={tmp_path / 'other'}")
    assert status == 2
    assert "method: pissa would have to read or change" in err
    status, _, err = diablo("train", tmp_path / "recipe.yaml", "quantization=nf4", f"output={tmp_path / 'other'}")
    assert status == 2
    assert "is quantized already (gptq)" in err
    status, _, _ = diablo("generate", tmp_path / "run", "Problem:", "--max-new-tokens", 4)
    assert status == 0
    found = ["training.learning_rate=auto", "training.max_steps=1", f"output={tmp_path / 'found'}"]
    status, out, err = diablo("train", tmp_path / "recipe.yaml", *found)
    assert status == 0, err
    assert "found in the weights for these blocks" in out + err
    status, _, err = diablo("train", tmp_path / "recipe.yaml", "merge=true", f"output={tmp_path / 'other'}")
    assert status == 2
    assert "merge: found true, where gptq quantizes the weights" in err

    for arguments, expected in (
        ([], "--into: missing; the adapter was trained over weights that gptq quantizes"),
        (["--into", "stored"], "--into: found stored;"),
        (["--into", "both"], "--into: found 'both'; allowed: stored, dequantized, requantized"),
        (["--into", "requantized"], "--calibration: give it with --into requantized"),
        (["--into", "dequantized", "--calibration", "builtin"], "--calibration: give it with --into requantized"),
    ):
        status, _, err = diablo("merge", tmp_path / "run", tmp_path / "merged", *arguments)
        assert status == 2
        assert expected in err
        assert not (tmp_path / "merged").exists()

    status, out, _ = diablo("merge", tmp_path / "run", tmp_path / "merged", "--into", "dequantized", "--dtype", "fp32")
    assert status == 0
    adapted, same = (float(loss) for loss in re.findall(r"16 held-out rows of the run: (\S+) -> (\S+) by", out)[0])
    assert adapted == pytest.approx(after, abs=1e-3)
    assert same == pytest.approx(adapted, abs=2e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert getattr(merged.config, "quantization_config", None) is None

    again = ["--into", "requantized", "--calibration", "mawps", "--dtype", "fp32"]
    status, out, _ = diablo("merge", tmp_path / "run", tmp_path / "again", *again)
    assert status == 0
    adapted, rounded = (float(loss) for loss in re.findall(r"of the run: (\S+) -> (\S+) by", out)[0])
    assert 0 < abs(rounded - adapted) < 0.1
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["bits"] == 4
    status, _, _ = diablo("generate", tmp_path / "again", "Problem:", "--max-new-tokens", 2)
    assert status == 0


def test_an_adapter_is_trained_over_a_model_in_2_bits(
    diablo: Any, tiny_model: Path, calibration: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    quantize_model(str(tiny_model), tmp_path / "model", Scheme(2, 32), calibration, console=QUIET)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path / 'model'}\ntask: mawps\nmethod: {{num_blocks: 4}}\ndata: {{limit: 192}}\n"
        f"output: {tmp_path / 'run'}\nprecision: fp32\nevaluation: {{before: false, after: false}}\n"
        "training: {max_steps: 24, batch_size: 8, learning_rate: 3.0e-2}\n"
    )
    status, _, err = diablo("train", tmp_path / "recipe.yaml")
    assert status == 0, err
    before, after = (
        loss for _, loss in json.loads((tmp_path / "run" / "run.json").read_text())["training"]["held_out_loss"]
    )
    assert after < before - 0.2


def test_the_command(diablo: Any, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    text = tmp_path / "text.txt"
    text.write_text("Ann had 3 apples and Bob gave her 4 more.\n\n" * 30)
    command = ["quantize", tiny_model, tmp_path / "q", "--bits", 2, "--group-size", 32, "--calibration", text]
    status, out, _ = diablo(*command, "--length", 32, "--method", "gptq")
    assert status == 0
    assert "14 layers in 2 bits (gptq)" in out
    status, _, err = diablo(*command)
    assert status == 2
    assert "exists and is not empty" in err
    status, _, err = diablo("quantize", tmp_path / "q", tmp_path / "q2", "--group-size", 32)
    assert status == 2
    assert "is quantized already" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bits", 5], "--bits: found 5; allowed: 4, 3, 2."),
        (["--group-size", 48], "--group-size: found 48; allowed: 128, 64, 32, 16."),
        (["--method", "awq"], "--method: found 'awq'; allowed: magr-gptq, gptq, rtn."),
        (["--alpha", 0], "--alpha: found 0.0; give a number above 0."),
        (["--group-size", 64, "--length", 32], "--group-size: found 64, which does not divide the 32 inputs of"),
        (["--calibration", "gsm9k"], "--calibration: found 'gsm9k'; give a .txt"),
        (["--calibration", "gsm9k"], "Did you mean gsm8k?"),
        (["--calibration", "aqua"], "--calibration: found 'aqua', which has no train split"),
        (["--length", 10**7], "less than one row of 10000000"),
    ],
)
def test_a_fault_is_one_line(
    diablo: Any, tiny_model: Path, tmp_path: Path, arguments: list[Any], expected: str
) -> None:
    if "--length" in arguments:
        pytest.importorskip("gptqmodel")
    status, _, err = diablo("quantize", tiny_model, tmp_path / "q", *arguments)
    assert status == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_the_extra(
    diablo: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "gptqmodel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    status, _, err = diablo("quantize", tiny_model, tmp_path / "q", "--length", 32)
    assert status == 2
    assert "pip install 'diablo-peft[gptq]'" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="older ones are fine on a GPU")
def test_a_bitsandbytes_that_fails_in_the_backward_on_a_cpu_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "version", lambda name: {"bitsandbytes": "0.49.2"}[name])
    with pytest.raises(UserError, match=r"nf4 on a CPU needs bitsandbytes 0\.50 or newer, and 0\.49\.2 is installed"):
        load_model(str(tiny_model), torch.float32, quantization="nf4")


def test_a_checkpoint_must_hold_the_models_tensors(tiny_model: Path, calibration: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")

    def quantize(changed: dict[str, torch.Tensor], out: str) -> None:
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        quantize_model(str(folder), tmp_path / out, Scheme(4, 32, "rtn"), calibration[:1], console=QUIET)

    missing = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(UserError, match=r"stores no tensor model.layers.1.mlp.up_proj.weight"):
        quantize(missing, "missing")
    with pytest.raises(UserError, match=r"stores a tensor model.layers.0.mlp.other, for which it has no module"):
        quantize(tensors | {"model.layers.0.mlp.other": torch.ones(2)}, "other")
    # As transformers does, frequencies in old checkpoints are passed over.
    quantize(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, "old")
    assert (tmp_path / "old" / "config.json").is_file()


def test_blocks_of_several_kinds_are_an_error(tiny_model: Path, calibration: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(UserError, match=r"several kinds \(full_attention, sliding_attention\)"):
        quantize_model(str(folder), tmp_path / "q", Scheme(4, 32, "rtn"), calibration[:1], console=QUIET)


def test_training_over_gptq_after_an_evaluation_has_gradients_or_is_an_error(
    quantized: Path, calibration: torch.Tensor
) -> None:
    def loaded() -> Any:
        return AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16).eval()

    base = loaded()
    adapted = get_peft_model(base, DiabloConfig(num_blocks=4))
    with torch.no_grad():
        adapted(input_ids=calibration[:1])
    adapted.train()(input_ids=calibration[:1], labels=calibration[:1]).loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients)

    base = loaded()
    with torch.no_grad():
        base(input_ids=calibration[:1])
    if any(getattr(module, "linear_mode", None) == "inference" for module in base.modules()):
        with pytest.raises(RuntimeError, match="which gptqmodel rearranged"):
            get_peft_model(base, DiabloConfig(num_blocks=4)).train()


@not_on_oldest_peft
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_weights_are_quantized_while_they_are_loaded(
    diablo: Any, tiny_model: Path, tmp_path: Path, quantization: str
) -> None:
    pytest.importorskip("bitsandbytes")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\ntask: mawps\nmethod: {{num_blocks: 4}}\ndata: {{limit: 192}}\nprecision: fp32\n"
        f"output: {tmp_path / 'run'}\nquantization: {quantization}\n"
        "training: {max_steps: 24, batch_size: 8, learning_rate: 3.0e-2}\n"
        "evaluation: {before: false, limit: 8}\n"
    )
    status, _, err = diablo("train", tmp_path / "recipe.yaml")
    assert status == 0, err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    before, after = (loss for _, loss in record["training"]["held_out_loss"])
    assert after < before - 0.2
    # A run's folder is loaded as it was trained, so that the scores are the same.
    status, _, _ = diablo("evaluate", tmp_path / "run", "--limit", 8, "--out", tmp_path / "answers.jsonl")
    assert status == 0
    answers = [
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "answers.jsonl", tmp_path / "run" / "answers-after.jsonl")
    ]
    assert answers[0] == answers[1]
    for into, tolerance in (("dequantized", 5e-3), ("stored", 0.3)):
        status, out, _ = diablo("merge", tmp_path / "run", tmp_path / into, "--into", into)
        assert status == 0
        before, merged = (float(loss) for loss in re.findall(r"of the run: (\S+) -> (\S+) by", out)[0])
        assert merged == pytest.approx(before, abs=tolerance)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / into)
        assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    status, _, err = diablo("merge", tmp_path / "run", tmp_path / "no", "--into", "requantized")
    assert status == 2
    assert "--into: found requantized" in err
    model = load_model(str(tiny_model), torch.float32, quantization=quantization)
    kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization]
    assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
