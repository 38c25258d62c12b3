"""The device that computes: nothing asks for CUDA where any accelerator is meant, and what each can do is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from house import ROOT, SOURCES

from diablo import devices
from diablo.errors import UserError
from diablo.models.liger import liger_obstacle
from diablo.planning.optimizers import choose_optimizer
from diablo.planning.speed import check_attention, check_offloading
from diablo.recipes.training import Optimizer, Training

CPU, CUDA, XPU, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "xpu", "mps"))

# What is CUDA's or ROCm's alone: Triton kernels, and CUDA graphs.
OF_CUDA = {
    "diablo/ops/backend.py": {"current_device", "get_device_capability"},
    "diablo/ops/kernels/shared.py": {"current_device", "device"},
    "diablo/ops/sweep.py": {"is_current_stream_capturing"},
}


def asked_of_cuda(path: Path) -> set[str]:
    """The names that a file takes from torch.cuda."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda"}
    imported = {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch.cuda")
    }
    return named | {str(name) for name in imported}


def test_nothing_asks_for_cuda_where_any_accelerator_is_meant():
    found = {path: asked_of_cuda(path) for folder in (SOURCES, ROOT / "examples") for path in folder.rglob("*.py")}
    assert {path.relative_to(SOURCES).as_posix(): names for path, names in found.items() if names} == OF_CUDA


@pytest.mark.parametrize("kind", ["cpu", *devices.ACCELERATORS])
def test_auto_is_bf16_where_the_device_has_it(kind):
    assert devices.dtype_for("auto", kind, has_bf16=True) == torch.bfloat16
    assert devices.dtype_for("auto", kind, has_bf16=False) == torch.float32
    assert devices.dtype_for("fp32", kind, has_bf16=True) == torch.float32


@pytest.mark.parametrize(
    ("precision", "kind", "has_bf16", "expected"),
    [
        ("fp16", "cuda", True, torch.float16),
        ("fp16", "xpu", False, torch.float16),
        ("fp16", "cpu", True, "precision: found fp16; a CPU takes auto, bf16 or fp32."),
        (
            "fp16",
            "mps",
            True,
            "precision: found fp16; MPS, which has no scaler of gradients, takes auto, bf16",
        ),
        ("bf16", "mps", True, torch.bfloat16),
        ("bf16", "mps", False, "precision: found bf16, which MPS has from macOS 14 on; take auto or fp32"),
        # Slow there, but asked for.
        ("bf16", "cpu", False, torch.bfloat16),
        ("bf16", "cuda", False, torch.bfloat16),
    ],
)
def test_a_precision_is_a_dtype_or_refused_with_the_reason(precision, kind, has_bf16, expected):
    if isinstance(expected, torch.dtype):
        assert devices.dtype_for(precision, kind, has_bf16=has_bf16) == expected
        return
    with pytest.raises(UserError) as caught:
        devices.dtype_for(precision, kind, has_bf16=has_bf16)
    assert str(caught.value).startswith(expected)


def test_the_device_is_the_one_that_torch_has():
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else CPU
    assert devices.choose_device() == found
    described = devices.describe_device(found)
    assert (described is None) == (found == CPU)
    assert devices.peak_memory_bytes() > (10**7 if found == CPU else -1)


@pytest.mark.parametrize(
    ("message", "is_out"),
    [
        ("MPS backend out of memory (MPS allocated: 8.00 GB)", True),
        ("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(message, is_out):
    assert devices.is_out_of_memory(RuntimeError(message)) == is_out
    assert devices.is_out_of_memory(torch.OutOfMemoryError("XPU out of memory."))


@pytest.mark.parametrize(
    ("attention", "device", "expected"),
    [
        ("flash_attention_2", CPU, "which trains on CUDA or ROCm or XPU alone, and this is a CPU; take eager or sdpa."),
        ("flash_attention_2", MPS, "and this is MPS"),
        ("flash_attention_3", XPU, "which trains on CUDA or ROCm alone, and this is XPU"),
        ("flash_attention_4", CPU, "which trains on CUDA or ROCm alone, and this is a CPU"),
        ("flex_attention", CPU, "which trains on CUDA or ROCm or XPU alone, and this is a CPU"),
        ("flex_attention", MPS, "and this is MPS"),
        ("kernels-community/flash-attn2", CPU, "and this is a CPU"),
        *((each, device, None) for each in ("auto", "eager", "sdpa") for device in (CPU, CUDA, XPU, MPS)),
        ("flex_attention", CUDA, None),
    ],
)
def test_an_attention_that_the_device_cannot_train_with_is_refused(attention, device, expected):
    if expected is None:
        check_attention(attention, device, torch.float32)
        return
    with pytest.raises(UserError, match=f"attention: found {attention}, .*{expected}"):
        check_attention(attention, device, torch.bfloat16)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_a_flash_attention_needs_half_precision_and_a_package(attention, monkeypatch):
    with pytest.raises(UserError, match="which computes in bf16 or fp16; set precision"):
        check_attention(attention, CUDA, torch.float32)
    monkeypatch.setattr("diablo.planning.speed.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; install it with: pip install kernels"):
        check_attention(attention, CUDA, torch.bfloat16)
    monkeypatch.setattr("diablo.planning.speed.find_spec", lambda name: name == "kernels")
    check_attention(attention, CUDA, torch.bfloat16)


@pytest.mark.parametrize("device", [CPU, MPS])
def test_activations_are_not_moved_out_of_the_memory_that_they_would_be_moved_to(device):
    with pytest.raises(UserError, match=f"{devices.title_of(device)} computes in the machine's own; leave it out"):
        check_offloading(device)
    check_offloading(CUDA)
    check_offloading(XPU)


def test_ligers_kernels_are_refused_with_the_reason(monkeypatch):
    for device in (CPU, MPS):
        assert f"and this is {devices.title_of(device)}; leave it out" in liger_obstacle("llama", device)
    monkeypatch.setattr("diablo.models.liger.find_spec", lambda name: None)
    assert "pip install 'diablo-peft[liger]'" in liger_obstacle("llama", CUDA)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_optimizers_that_bitsandbytes_has_not_on_a_device_are_refused(name):
    with pytest.raises(UserError, match=r"no optimizer in 8 bits for MPS; take 'adamw_torch_fused'\."):
        choose_optimizer(Training(optimizer=Optimizer(name=name)), MPS)
    with pytest.raises(UserError, match="no GPU with a memory of its own"):
        choose_optimizer(Training(optimizer=Optimizer(name=f"paged_{name}")), MPS)
    assert choose_optimizer(Training(optimizer=Optimizer(name=f"paged_{name}")), XPU).name == f"paged_{name}"


def test_the_device_is_chosen_in_one_place():
    asking = [
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if "torch.accelerator" in path.read_text(encoding="utf-8")
    ]
    assert asking == ["diablo/devices.py"]
