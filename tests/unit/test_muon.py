"""Muon on blocks, beside torch's Muon on matrices and torch's AdamW on the rest."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diablo.muon import Muon, orthogonalized
from diablo.recipes.reading import load_recipe
from diablo.training import train

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "nesterov": False, "ns_steps": 4}


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 5, seed: int = 0) -> None:
    """Steps with gradients that are the same for all parameters of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def parameter_of(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("settings", [{"lr": 1e-2}, SETTINGS])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16), (1, 7)])
def test_on_a_matrix_it_is_torchs_muon(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    ours, theirs = parameter_of(*shape), parameter_of(*shape)
    stepped(Muon([ours], **settings), [ours])
    stepped(torch.optim.Muon([theirs], **{"weight_decay": 0.0, **settings}, adjust_lr_fn="match_rms_adamw"), [theirs])
    # Five steps move a value by about 0.01, and bf16 rounds by less than a hundredth.
    assert not torch.equal(ours, parameter_of(*shape))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 2, 40, 24)])
def test_on_a_stack_it_is_torchs_muon_on_each_block_alone(shape: tuple[int, ...]) -> None:
    stack = parameter_of(*shape)
    blocks = [nn.Parameter(block.clone()) for block in stack.detach().flatten(0, -3)]
    theirs = torch.optim.Muon(blocks, **SETTINGS, adjust_lr_fn="match_rms_adamw")
    ours = Muon([stack], **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        # One block's gradient is a hundred times another's: a common norm would show.
        stack.grad = torch.randn(shape, generator=generator) * 10.0 ** torch.arange(shape[0]).reshape(
            -1, *[1] * (len(shape) - 1)
        )
        for block, gradient in zip(blocks, stack.grad.flatten(0, -3), strict=True):
            block.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(stack.detach().flatten(0, -3), torch.stack([*blocks]).detach(), rtol=0, atol=2e-4)


def test_the_singular_values_of_every_block_come_close_to_one() -> None:
    blocks = (
        torch.randn(4, 12, 36, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-6, 1.0, 1e3, 1.0])[:, None, None]
    )
    blocks[3] = 0
    values = torch.linalg.svdvals(orthogonalized(blocks, 5).float())
    assert 0.6 < values[:3].min() <= values[:3].max() < 1.3
    assert not values[3].any()
    kept = blocks.clone()
    orthogonalized(blocks.mT, 5)
    assert torch.equal(blocks, kept)


def test_parameters_without_a_matrix_are_adamws() -> None:
    ours, theirs = ([parameter_of(5), nn.Parameter(torch.tensor(2.0))] for _ in range(2))
    stepped(Muon([*ours, parameter_of(2, 4, 4)], lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6), ours)
    stepped(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6), theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_groups_have_rates_of_their_own_and_what_has_no_gradient_stays() -> None:
    still, moved, frozen = parameter_of(2, 8, 8), parameter_of(2, 8, 8), parameter_of(2, 8, 8)
    optimizer = Muon([{"params": [still], "lr": 0.0}, {"params": [moved, frozen]}], lr=1e-2)
    stepped(optimizer, [still, moved])
    assert torch.equal(still, frozen)
    assert not torch.equal(moved, frozen)
    assert frozen not in optimizer.state


def test_a_state_that_was_saved_goes_on_to_the_bit(tmp_path: Path) -> None:
    parameters = [parameter_of(3, 8, 12), parameter_of(6, 4), parameter_of(5)]
    optimizer = Muon(parameters, lr=1e-2)
    stepped(optimizer, parameters)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = copy.deepcopy(parameters)
    resumed = Muon(again, lr=1e-2)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    stepped(optimizer, parameters, seed=1)
    stepped(resumed, again, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(parameters, again, strict=True))


@pytest.mark.parametrize(
    "settings", [{"lr": -1}, {"momentum": 1.0}, {"betas": (0.9, 1.0)}, {"ns_steps": 0}, {"ns_steps": 5.0}]
)
def test_an_argument_out_of_its_range_is_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Muon([parameter_of(2, 2)], **settings)


def test_a_run_with_muon_that_was_resumed_ends_with_the_same_adapter_to_the_bit(
    tiny_model: Path, tmp_path: Path
) -> None:
    # DoRA has matrices, and magnitudes that are vectors.
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{n} and {n}?", "completion": f" x = {n}"}) for n in range(16)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\ndata: {{train: {rows}}}\nmethod: {{name: dora, r: 2}}\n"
        "training: {learning_rate: 1.0e-2, batch_size: 4, save_steps: 2, save_total_limit: 9,\n"
        "  optimizer: {name: muon, options: {momentum: 0.9}}}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    record = train(load_recipe(str(recipe), [])).record["training"]["optimizer"]
    assert (record["name"], record["class"], record["momentum"]) == ("muon", "diablo.muon.Muon", 0.9)
    undisturbed = load_file(adapter)
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(adapter.parent)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    train(load_recipe(str(recipe), []), resume=True)
    resumed = load_file(adapter)
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)
