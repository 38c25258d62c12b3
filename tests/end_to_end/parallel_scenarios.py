"""What is asked of a model that several processes share, cut by transformers or sharded by torch: each runs all this.

    torchrun --nproc_per_node 2 tests/end_to_end/parallel_scenarios.py MODEL FOLDER N ...

The main process writes what it has found to ``FOLDER/found.json``, for the tests to judge. Everything is in float64, so
that a difference is a mistake and not rounding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.distributed import DistributedConfig

from diablo import DiabloConfig, convert_to_lora, hotswap_adapter
from diablo.tuner.layers.base import DiabloLayer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
STEPS = 2

FOLDER = sys.argv[1]
OUT = Path(sys.argv[2])
NUM_BLOCKS = [int(number) for number in sys.argv[3:]]


def load(*, cut: bool, dtype: torch.dtype = torch.float64) -> Any:
    """The base model, whole or cut."""
    settings = {"distributed_config": DistributedConfig(tp_size=distributed.get_world_size())} if cut else {}
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype, attn_implementation="eager", **settings)


def adapt(model: Any, num_blocks: int, **settings: Any) -> Any:
    """A model with random blocks: at zero, much would go unnoticed."""
    torch.manual_seed(0)
    settings = {"target_modules": TARGETS, "init_weights": False, **settings}
    return get_peft_model(model, DiabloConfig(num_blocks=num_blocks, **settings), autocast_adapter_dtype=False)


def tokens() -> torch.Tensor:
    """A batch."""
    return torch.randint(3, 300, (3, 10), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the input that its gradient reaches: all layers pass one on, as in the middle of a model."""
    inputs = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    return model(inputs_embeds=inputs, labels=tokens()).loss, inputs


def counted(action: Callable[[], Any]) -> tuple[int, Any]:
    """How many collectives an action has asked for, and its result."""
    with CommDebugMode() as mode:
        result = action()
    return sum(mode.get_comm_counts().values()), result


def collectives(model: Any) -> dict[str, int]:
    """Collectives of a forward, its backward, and a forward without gradients."""
    forward, (loss, _) = counted(lambda: loss_of(model))
    backward, _ = counted(loss.backward)
    with torch.no_grad():
        alone, _ = counted(lambda: model(tokens()))
    return {"forward": forward, "backward": backward, "inference": alone}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of any two values of the same name."""
    assert first.keys() == second.keys(), sorted(first.keys() ^ second.keys())
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of the whole blocks, by way of a state in which they stand in the blocks' place."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(parameter.grad)
        found = copies(get_peft_model_state_dict(model))
        for parameter, values in zip(trained, kept, strict=True):
            parameter.copy_(values)
    return found


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state that does not change with the model."""
    return {name: values.clone() for name, values in state.items()}


def logits(model: Any) -> torch.Tensor:
    """What the model says without gradients, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(tokens()).logits


def train(model: Any) -> float:
    """A few steps with clipped gradients; the last gradient norm."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    norm: Any = None
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model.train())[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def shape_of_blocks(num_blocks: int) -> dict[str, Any]:
    """One number of blocks, in place and beside: against one process, and in collectives against the frozen model."""
    found: dict[str, Any] = {}
    for in_place in (False, True):
        one, cut = adapt(load(cut=False), num_blocks), adapt(load(cut=True), num_blocks, in_place=in_place)
        counts = collectives(cut.train())
        cut.zero_grad()
        losses, inputs = zip(*(loss_of(model.train()) for model in (one, cut)), strict=True)
        for loss in losses:
            loss.backward()
        cut_layers = [layer for layer in cut.modules() if isinstance(layer, DiabloLayer)]
        held = cut_layers[0].passes.plan(cut_layers).held
        state = copies(get_peft_model_state_dict(one))
        # Entries of the last block that lie outside of the matrix have no effect, and are not kept.
        inside = {name: (values != 0) for name, values in get_peft_model_state_dict(cut).items()}
        own = {
            "collectives": counts,
            "loss": abs(float(losses[0] - losses[1])),
            "gradient of the input": float((inputs[0].grad - inputs[1].grad).abs().max()),
            "gradients of the blocks": difference(gradients(one), gradients(cut)),
            "saved": difference({n: v * inside[n] for n, v in state.items()}, get_peft_model_state_dict(cut)),
            "logits": float((logits(one) - logits(cut)).abs().max()),
            "gradient norm": abs(train(one) - train(cut)),
            "trained": difference(
                *({n: v * inside[n] for n, v in get_peft_model_state_dict(model).items()} for model in (one, cut))
            ),
            "layers with blocks in their weights": len(held),
        }
        set_peft_model_state_dict(cut, copies(state))
        set_peft_model_state_dict(one, copies(state))
        own["logits of what is loaded"] = float((logits(one) - logits(cut)).abs().max())
        own["gradient norm of what is loaded"] = abs(train(one) - train(cut))
        found["in place" if in_place else "beside"] = own
    return found


def saving_and_merging() -> dict[str, Any]:
    """An adapter's life in a cut model: saved, loaded, merged, combined, switched off, mixed in one batch."""
    cut = adapt(load(cut=True), 3)
    expected, plain = logits(cut), logits(load(cut=True))
    folder = OUT / "adapter"
    cut.save_pretrained(folder, is_main_process=distributed.get_rank() == 0)
    distributed.barrier()
    found: dict[str, Any] = loaded(folder, expected)

    weights = {n: p.to_local().clone() for n, p in cut.named_parameters() if n.endswith("base_layer.weight")}
    with cut.disable_adapter():
        found["disabled"] = float((logits(cut) - plain).abs().max())
    cut.merge_adapter()
    found["merged"] = float((logits(cut) - expected).abs().max())
    cut.unmerge_adapter()
    found["unmerged"] = max(
        float((p.to_local() - weights[n]).abs().max()) for n, p in cut.named_parameters() if n in weights
    )
    found["safe_merge"] = refused_merges(cut)
    found |= several(cut, expected, plain)
    found |= refused(cut, folder)
    torch.manual_seed(5)
    dropped = loss_of(adapt(load(cut=True), 3, diablo_dropout=0.3).train())[0]
    torch.manual_seed(5)
    found["dropout"] = float((dropped - loss_of(adapt(load(cut=False), 3, diablo_dropout=0.3).train())[0]).abs())
    found["moved"] = float((logits(adapt(load(cut=True), 3).to(torch.float32)) - expected).abs().max())
    found["merged and unloaded"] = float((logits(adapt(load(cut=True), 3).merge_and_unload()) - expected).abs().max())
    return found


def refused_merges(cut: Any) -> list[bool]:
    """Whether each process refuses to merge blocks of which one process has a NaN, and all stay as they were."""
    blocks = cut.base_model.model.model.layers[1].mlp.up_proj.diablo_blocks["default"].to_local()
    kept = blocks.detach().clone()
    if distributed.get_rank() == 0:
        blocks.detach()[0, 0, 0] = float("nan")
    try:
        cut.merge_adapter(safe_merge=True)
        refused = False
    except ValueError:
        refused = True
    cut.unmerge_adapter()
    blocks.detach().copy_(kept)
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, refused)
    return every


def loaded(folder: Path, expected: torch.Tensor) -> dict[str, float]:
    """What was saved, in one process and in a cut model."""
    one = PeftModel.from_pretrained(load(cut=False), folder, autocast_adapter_dtype=False)
    found = {"loaded into one process": float((logits(one) - expected).abs().max())}
    for low in (False, True):
        model = PeftModel.from_pretrained(
            load(cut=True), folder, low_cpu_mem_usage=low, autocast_adapter_dtype=False, is_trainable=True
        )
        found[f"loaded again, low_cpu_mem_usage={low}"] = float((logits(model) - expected).abs().max())
        found[f"trained on, low_cpu_mem_usage={low}"] = train(model)
    return found


def several(cut: Any, expected: torch.Tensor, plain: torch.Tensor) -> dict[str, float]:
    """Two adapters more, one of them a sum: by name, and mixed in one batch."""
    torch.manual_seed(7)
    cut.add_adapter("other", DiabloConfig(num_blocks=3, target_modules=TARGETS, init_weights=False))
    cut.add_weighted_adapter(["default", "other"], [1.0, 0.0], "sum")
    with torch.no_grad():
        rows = cut.eval()(tokens(), adapter_names=["default", "__base__", "other"]).logits
    found = {
        "a row of the first adapter": float((rows[0] - expected[0]).abs().max()),
        "a row of the base": float((rows[1] - plain[1]).abs().max()),
    }
    cut.set_adapter("other")
    found["a row of the second adapter"] = float((rows[2] - logits(cut)[2]).abs().max())
    cut.base_model.set_adapter(["default", "other"])
    both = logits(cut)
    cut.merge_adapter(["other"])
    found["one of two merged"] = float((logits(cut) - both).abs().max())
    cut.unmerge_adapter()
    cut.set_adapter("sum")
    found["a weighted sum"] = float((logits(cut) - expected).abs().max())
    cut.set_adapter("default")
    return found


def refused(cut: Any, folder: Path) -> dict[str, str]:
    """What a cut model does not do."""
    found = {}
    for name, action in (
        ("convert_to_lora", lambda: convert_to_lora(cut, 4)),
        ("hotswap_adapter", lambda: hotswap_adapter(cut, folder)),
    ):
        try:
            action()
        except ValueError as error:
            found[name] = str(error)
    cut.base_model.model.model.layers[0].mlp.down_proj.base_layer.register_forward_hook(lambda *_: None)
    try:
        cut(tokens())
    except RuntimeError as error:
        found["hooks"] = str(error)
    return found


def refusals() -> dict[str, str]:
    """What cannot be adapted, found before anything is changed."""
    found = {}
    sharded = load(cut=False)
    shard(sharded, sharded.model.layers)
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "embedding": (load(cut=True), {"target_modules": ["embed_tokens"]}),
        "sharded": (sharded, {"target_modules": ["q_proj"]}),
        "experts": (mixture(), {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
        "saved": (load(cut=True), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    }
    for name, (model, settings) in cases.items():
        try:
            adapt(model, 2, **settings)
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found


def mixture() -> Any:
    """A mixture of experts, cut."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
    )
    if distributed.get_rank() == 0:
        MixtralForCausalLM(config).save_pretrained(OUT / "mixture")
    distributed.barrier()
    spread = DistributedConfig(tp_size=distributed.get_world_size())
    return AutoModelForCausalLM.from_pretrained(OUT / "mixture", distributed_config=spread)


def shard(model: Any, layers: Any) -> None:
    """Shard a model as FSDP2 does, layer by layer."""
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharding() -> dict[str, Any]:
    """Data in parallel over sharded weights and blocks, a row of the batch to each process; then a whole adapter."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    rows = torch.randint(3, 300, (count, 10), generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {}
    for how in ("auto", False):
        one, sharded = adapt(load(cut=False), 3, in_place=False), adapt(load(cut=False), 3, in_place=how)
        shard(sharded, sharded.base_model.model.model.layers)
        norms = {}
        for model, own in ((one, rows), (sharded, rows[rank : rank + 1])):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(STEPS):
                optimizer.zero_grad()
                model.train()(own, labels=own).loss.backward()
                norms[model] = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        state = get_model_state_dict(sharded, options=options)
        if rank == 0:
            folder = OUT / f"sharded-{how}"
            sharded.save_pretrained(folder, state_dict=state)
            again = PeftModel.from_pretrained(load(cut=False), folder, autocast_adapter_dtype=False)
            found[f"in_place={how}"] = {
                "gradient norm": abs(float(norms[one] - norms[sharded].full_tensor())),
                "saved": difference(get_peft_model_state_dict(one), get_peft_model_state_dict(again)),
            }
        else:
            norms[sharded].full_tensor()
    inside = adapt(load(cut=False), 3, in_place=True)
    shard(inside, inside.base_model.model.model.layers)
    try:
        inside(rows)
    except RuntimeError as error:
        found["in_place=True"] = str(error)
    early = adapt(load(cut=False), 3)
    before = early.train()(rows).logits
    shard(early, early.base_model.model.model.layers)
    found["after a forward"] = float((early(rows).logits - before).abs().max())
    try:
        sharded.merge_adapter()
    except RuntimeError as error:
        found["merging"] = str(error)
    return found


def bdlora(a: list[str] | None = None, b: list[str] | None = None) -> dict[str, Any]:
    """PEFT's LoRA with block-diagonal factors: collectives of a forward alone, and the error of a training step."""
    try:
        from peft.tuners.lora.config import BdLoraConfig
    except ImportError:
        return {}
    blocks = BdLoraConfig(target_modules_bd_a=a, target_modules_bd_b=b, nblocks=distributed.get_world_size())
    model = get_peft_model(load(cut=True), LoraConfig(r=4, target_modules=[*(a or []), *(b or [])], use_bdlora=blocks))
    found: dict[str, Any] = {}
    for name, step in (("inference", lambda: logits(model)), ("training", lambda: collectives(model))):
        try:
            found[name] = counted(step)[0]
        except RuntimeError as error:
            found[name] = type(error).__name__
    return found


def main() -> None:
    distributed.init_process_group("gloo")
    frozen = load(cut=True).requires_grad_(False)
    found: dict[str, Any] = {"frozen": collectives(frozen)}
    column_parallel = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    found["lora"] = collectives(get_peft_model(load(cut=True), LoraConfig(r=4, target_modules=column_parallel)))
    # The MLP's features are not divisible, which its blocks have to be.
    found["bdlora"] = {
        "column-parallel": bdlora(b=["q_proj", "k_proj", "v_proj"]),
        "row-parallel": bdlora(a=["o_proj"]),
    }
    for num_blocks in NUM_BLOCKS:
        found[f"N = {num_blocks}"] = shape_of_blocks(num_blocks)
    found["sharding"] = sharding()
    if distributed.get_world_size() == 2:
        # These take as long again, and have nothing to do with how many processes there are.
        found["saving and merging"] = saving_and_merging()
        found["refusals"] = refusals()
        low = adapt(load(cut=True, dtype=torch.bfloat16), 3)
        loss_of(low.train())[0].backward()
        found["bf16"] = bool(torch.isfinite(logits(low)).all())
    if distributed.get_rank() == 0:
        (OUT / "found.json").write_text(json.dumps(found, indent=1))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
