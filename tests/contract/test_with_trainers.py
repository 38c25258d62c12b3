"""Adapters in the training loops that people use: transformers' Trainer, TRL's trainers, accelerate, two processes."""

from __future__ import annotations

import gc
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import Dataset
from launching import run_python
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import assert_same_bits, base_weights, fill, mlp
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from diablo import DiabloConfig

IDS = torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(0))


def config() -> DiabloConfig:
    return DiabloConfig(num_blocks=4, task_type="CAUSAL_LM")


def base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def blocks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters() if ".diablo_blocks." in name}
    assert found
    return found


def settings(folder: Path, **more) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 1,
        **more,
    }


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_only_blocks_moved(model: torch.nn.Module, folder: Path) -> None:
    assert_same_bits(base_weights(model), base_weights(base(folder)))
    assert all((block != 0).any() for block in blocks(model).values())


def trainer(tiny_model: Path, folder: Path, model=None, **more) -> Trainer:
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    model = model or get_peft_model(base(tiny_model), config())
    return Trainer(model, TrainingArguments(**settings(folder, **more)), train_dataset=rows)


def test_transformers_trainer_saves_and_resumes_to_the_bit(tiny_model, tmp_path):
    whole = trainer(tiny_model, tmp_path / "whole", save_steps=3)
    whole.train()
    assert_only_blocks_moved(whole.model, tiny_model)
    assert losses(whole)[-1] < losses(whole)[0]
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "adapter_model.safetensors")
    assert all(key.endswith(".diablo_blocks") for key in saved)
    resumed = trainer(tiny_model, tmp_path / "whole", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(losses(resumed)) == 6
    assert_same_bits(blocks(resumed.model), blocks(whole.model))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_in_the_trainer_gives_the_same_blocks(tiny_model, tmp_path, use_reentrant):
    plain = trainer(tiny_model, tmp_path / "plain", max_steps=3)
    plain.train()
    checkpointed = trainer(
        tiny_model,
        tmp_path / "checkpointed",
        max_steps=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    checkpointed.train()
    for name, expected in blocks(plain.model).items():
        torch.testing.assert_close(blocks(checkpointed.model)[name], expected, rtol=1e-4, atol=1e-5)


def test_training_a_second_adapter_leaves_the_first_as_it_was(tiny_model, tmp_path):
    model = fill(get_peft_model(base(tiny_model), config()))
    model.add_adapter("second", config())
    model.set_adapter("second")
    before = blocks(model)
    trainer(tiny_model, tmp_path, model, max_steps=2).train()
    for name, block in blocks(model).items():
        assert torch.equal(block, before[name]) == name.endswith(".default"), name


def test_sft(tiny_model, tmp_path):
    rows = [{"text": "The quick brown fox jumps over the lazy dog."}, {"text": "Equation: x = 3 + 4"}] * 4
    sft = SFTTrainer(
        base(tiny_model),
        SFTConfig(**settings(tmp_path, max_length=32)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=config(),
    )
    sft.train()
    assert_only_blocks_moved(sft.model, tiny_model)
    assert losses(sft)[-1] < losses(sft)[0]
    sft.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base(tiny_model), tmp_path / "adapter")
    assert_same_bits(blocks(loaded), blocks(sft.model))
    torch.testing.assert_close(loaded(input_ids=IDS).logits, sft.model.eval()(input_ids=IDS).logits)


def test_dpo_takes_the_disabled_adapter_for_the_reference(tiny_model, tmp_path):
    rows = [{"prompt": "How many?", "chosen": " x = 3 + 4", "rejected": " The dog sleeps on."}] * 8
    dpo = DPOTrainer(
        base(tiny_model),
        args=DPOConfig(**settings(tmp_path, beta=0.5)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=config(),
    )
    dpo.train()
    # At zero the policy is the reference, and the logistic loss of a margin of zero is ln 2.
    assert losses(dpo)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(dpo)[-1] < 0.6
    assert_only_blocks_moved(dpo.model, tiny_model)


def test_grpo(tiny_model, tmp_path):
    def reward(completions: list[str], **_) -> list[float]:
        return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

    grpo = GRPOTrainer(
        base(tiny_model),
        reward,
        args=GRPOConfig(**settings(tmp_path, max_steps=2, num_generations=4, max_completion_length=8)),
        train_dataset=Dataset.from_list([{"prompt": "How many apples?"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=config(),
    )
    grpo.train()
    assert_only_blocks_moved(grpo.model, tiny_model)


def test_accelerate_with_gradient_accumulation(tiny_model, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = get_peft_model(base(tiny_model), config())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(IDS, batch_size=4))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    assert_only_blocks_moved(plain, tiny_model)
    plain.save_pretrained(tmp_path)
    assert_same_bits(blocks(PeftModel.from_pretrained(base(tiny_model), tmp_path)), blocks(plain))


def rows_of_mlp() -> torch.Tensor:
    return torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def adapted_mlp(in_place: bool) -> torch.nn.Module:
    config = DiabloConfig(num_blocks=5, target_modules=["up", "down"], in_place=in_place)
    return fill(get_peft_model(mlp().double(), config)).train()


def three_steps(model: torch.nn.Module, rows: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Losses and gradients of three steps, and the blocks after them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    seen: dict[str, list[torch.Tensor]] = {"losses": [], "gradients": []}
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(rows).square().mean()
        loss.backward()
        optimizer.step()
        seen["losses"].append(loss.detach())
        seen["gradients"] += [p.grad.clone() for p in trained]
    return seen | {"blocks": [p.detach() for p in trained]}


def one_of_two(rank: int, folder: str) -> None:
    """What each of two processes does: three steps on its half of the batch, in place, and the outcome into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(adapted_mlp(in_place=True))
    torch.save(three_steps(model, rows_of_mlp()[rank * 4 : rank * 4 + 4]), f"{folder}/{rank}.pt")
    # Where DDP holds the last reference to the group, freeing it waits for gloo's thread with the GIL held, which that
    # thread may need: a deadlock, now and then.
    del model
    gc.collect()
    dist.destroy_process_group()


def test_two_processes_in_place_walk_as_one_does_beside_on_the_whole_batch(tmp_path):
    code = f"""
import os, sys
sys.path = {sys.path!r}
from test_with_trainers import one_of_two
one_of_two(int(os.environ["RANK"]), {str(tmp_path)!r})
"""
    done = run_python("-c", code, processes=2)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = three_steps(adapted_mlp(in_place=False), rows_of_mlp())
    assert len(expected["gradients"]) == 6
    for got in (first, second):
        for one, want in zip(got["gradients"] + got["blocks"], expected["gradients"] + expected["blocks"], strict=True):
            torch.testing.assert_close(one, want, rtol=1e-12, atol=1e-12)
    for one, other, want in zip(first["losses"], second["losses"], expected["losses"], strict=True):
        torch.testing.assert_close((one + other) / 2, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(first["blocks"], second["blocks"], strict=True):
        assert torch.equal(one, other)
