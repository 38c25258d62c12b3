"""The real model: SmolLM2-135M from its wheel, and the claims of the paper on it."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import diablo
from diablo.data import RowEncoder
from diablo.data.batching import LengthGroupedSampler, collate
from diablo.merging import merge_adapter
from diablo.models.builtin import builtin_model
from diablo.models.loading import load_model, load_tokenizer
from diablo.scoring.losses import summed_completion_loss
from diablo.tasks import get_task


@pytest.fixture(scope="module")
def folder():
    return str(builtin_model("smollm2-135m"))


@pytest.fixture(scope="module")
def rows(folder):
    encoder = RowEncoder(load_tokenizer(folder))
    return [encoder.encode(problem.row) for problem in get_task("mawps").problems("train")]


@pytest.fixture(scope="module")
def batch(rows):
    return collate([row.features for row in rows[:2]], pad_token_id=2)


@pytest.fixture
def model(folder):
    return load_model(folder, torch.float32)


@pytest.fixture
def adapted(model):
    """Adapted with blocks that are not zero, scaled so that the model still makes sense."""
    adapted = get_peft_model(model, diablo.DiabloConfig(num_blocks=16, init_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "diablo_" in name:
                parameter.mul_(0.1)
    return adapted.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_a_new_adapter_changes_no_bit_of_the_logits(model, batch):
    before = logits(model.eval(), batch)
    adapted = get_peft_model(model, diablo.DiabloConfig(num_blocks=16)).eval()
    assert torch.equal(logits(adapted, batch), before)


def test_the_gradient_of_a_block_is_that_block_of_the_full_gradient(model, batch):
    """The paper's central identity, in every adapted layer of the model."""
    full = copy.deepcopy(model).requires_grad_(True)
    summed_completion_loss(full, batch).backward()
    adapted = get_peft_model(model, diablo.DiabloConfig(num_blocks=16))
    summed_completion_loss(adapted, batch).backward()
    weights = dict(full.named_parameters())
    compared = 0
    for name, layer in adapted.base_model.model.named_modules():
        if not isinstance(layer, diablo.DiabloLinear):
            continue
        dense = weights[f"{name}.weight"].grad
        (tile,) = layer.diablo_layout["default"].tiles
        expected = torch.stack(
            [
                dense[i * tile.block_out : (i + 1) * tile.block_out, i * tile.block_in : (i + 1) * tile.block_in].T
                for i in range(tile.count)
            ]
        )
        found = layer.diablo_blocks["default"].grad
        # Both sum the same products, in another order.
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name
        compared += 1
    assert compared == 150


def test_merging_keeps_the_logits_and_unmerging_the_bits(adapted, batch):
    weights = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    with adapted.disable_adapter():
        base = logits(adapted, batch)
    beside = logits(adapted, batch)
    effect = (beside - base).abs().max()
    adapted.merge_adapter(safe_merge=True)
    assert effect > 0.1
    assert (logits(adapted, batch) - beside).abs().max() < 1e-3 * effect
    adapted.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in adapted.named_parameters())


def test_a_saved_adapter_gives_the_same_logits(adapted, folder, batch, tmp_path):
    expected = logits(adapted, batch)
    adapted.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Trained further, its blocks stand in the weight, as those of the model that was saved.
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval(), batch), expected)


def test_a_merged_model_no_longer_ties_the_head_that_was_adapted(folder, batch, tmp_path):
    torch.manual_seed(0)
    base = load_model(folder, torch.float32)
    assert base.config.tie_word_embeddings
    before = logits(base.eval(), batch)
    config = diablo.DiabloConfig(num_blocks=16, target_modules=["lm_head", "q_proj"], init_weights=False)
    adapted = get_peft_model(base, config).eval()
    beside = logits(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=folder)
    assert report.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    merged = logits(load_model(str(report.folder), torch.float32).eval(), batch)
    assert (merged - beside).abs().max() < 1e-3 * (beside - before).abs().max()


def test_a_few_steps_lower_the_loss(model, rows):
    adapted = get_peft_model(model, diablo.DiabloConfig(num_blocks=16)).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3, weight_decay=0)
    short = [row for row in rows if len(row.input_ids) <= 45]
    order = LengthGroupedSampler([len(row.input_ids) for row in short], batch_size=4, seed=0).batches()
    losses = []
    for indices in order[:8]:
        batch = collate([short[index].features for index in indices], pad_token_id=2)
        loss = summed_completion_loss(adapted, batch) / sum(short[index].supervised for index in indices)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_the_builtin_model_is_read_offline_once_it_is_cached(folder):
    offline = dict(os.environ, PIP_NO_INDEX="1", PIP_FIND_LINKS="", HF_HUB_OFFLINE="1")
    code = "from diablo.models.builtin import builtin_model; print(builtin_model('builtin:smollm2-135m'))"
    result = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_solves_half_of_the_problems(tmp_path):
    command = [sys.executable, "-m", "diablo", "train", "quickstart", f"output={tmp_path / 'run'}"]
    subprocess.run(command, check=True)
    scores = json.loads((tmp_path / "run" / "run.json").read_text())["scores"]
    assert scores["after"]["mawps"]["accuracy"] >= 0.5
    assert scores["before"]["mawps"]["accuracy"] <= 0.1
