"""Engines that shard a model over processes: they put the parts of all processes together, and cut them again."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DeepSpeedPlugin, DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from diablo.errors import UserError
from diablo.models.loading import load_config, stored_quantization
from diablo.planning.plan import Plan
from diablo.recipes.training import DEFAULT_OPTIMIZER, Training

Tensors = dict[str, torch.Tensor]
"""Tensors by the names of the model's parameters."""

_FLAT = {2: "single_partition_of_fp32_groups", 3: "fp32_partitioned_groups_flat"}
"""The attribute of DeepSpeed's optimizer that has its flat tensors, by the stage of ZeRO."""


class Engine:
    """How the processes of a run hold the model. With this engine, each process holds all of it.

    Checkpoints are the same with every engine: they have the whole trained parameters and the whole state of the
    optimizer, as a run of one process writes them. All processes call each method together.

    Attributes:
        shards: whether each process holds only a part of the model during training.
    """

    shards = False

    def check(self, distributed_type: DistributedType) -> None:
        """Check that accelerate will really shard the model, where it was launched for that.

        Args:
            distributed_type: what accelerate has set up.

        Raises:
            UserError: it would shard nothing.
        """

    def created(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember what is needed of the optimizer of the whole model, before accelerate changes it."""

    def prepared(self, model: nn.Module, optimizer: Any) -> None:
        """Check the model and the optimizer that accelerate has spread over the processes.

        Raises:
            UserError: the optimizer's state could not be put together again.
        """

    def kept(self, model: nn.Module) -> int:
        """The number of the model's values (entries of its parameters) that this process keeps."""
        return sum(parameter.numel() for parameter in model.parameters())

    def trained(self, model: nn.Module) -> Tensors | None:
        """The whole trained parameters, on the CPU; None where the model itself has them whole."""
        return None

    @torch.no_grad()
    def load_trained(self, model: nn.Module, tensors: Tensors) -> None:
        """Set the trained parameters to these values. Each tensor is a whole parameter."""
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(_part_for(parameter, tensors[name]))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The ``state_dict()`` that the optimizer of the whole model would have, on the CPU."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Load a state of the whole model's optimizer, as :meth:`optimizer_state` returns it."""
        optimizer.load_state_dict(state)


class FullyShardedDataParallel(Engine):
    """FSDP2: each parameter is a ``DTensor`` over the processes."""

    shards = True

    def __init__(self) -> None:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(
                "accelerate was launched with FSDP 1, which cannot hold frozen weights beside trained ones: set "
                "fsdp_version: 2 in its config file, or launch it with --fsdp_version 2."
            )
        if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
            raise UserError(
                "accelerate was launched with fsdp_offload_params: true, under which the checks and held-out losses "
                "here would compute on the CPU: set it to false, or launch with DeepSpeed's ZeRO-3 and "
                "offload_param_device: cpu, as examples/accelerate_offload.yaml does."
            )
        # With "true", only one process would read the model. But each process checks the model before it is sharded.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    def check(self, distributed_type: DistributedType) -> None:
        """Check that there is something to shard over."""
        if distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise UserError(
                "accelerate was launched with FSDP, with which it shards over two or more GPUs only; here it would "
                "shard nothing and not say so: launch it without FSDP."
            )

    def kept(self, model: nn.Module) -> int:
        """The number of values in this process's part of each parameter, summed up."""
        return sum(_local(parameter).numel() for parameter in model.parameters())

    def trained(self, model: nn.Module) -> Tensors:
        """The trained parameters, gathered from all processes."""
        return {name: _gather(parameter.detach()) for name, parameter in trained_parameters(model).items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state, gathered from all processes."""
        state = optimizer.state_dict()
        whole = {
            number: {name: _gather(value) for name, value in of_parameter.items()}
            for number, of_parameter in state["state"].items()
        }
        return {**state, "state": whole}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Load this process's part of each moment."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts = {
            number: {
                name: value if name == "step" else _part_for(parameters[number], value)
                for name, value in of_parameter.items()
            }
            for number, of_parameter in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": parts})


class DeepSpeed(Engine):
    """DeepSpeed's ZeRO: each process optimizes its part of the trained parameters, and holds it in flat fp32 tensors.

    DeepSpeed has public functions for such parts. Where they do not suffice, this class uses attributes under the names
    that DeepSpeed 0.19 gives them.
    """

    shards = True

    def __init__(self) -> None:
        if find_spec("deepspeed") is None:
            raise UserError(
                "accelerate was launched with DeepSpeed, which is not installed; install it with: pip install "
                "'diablo-peft[deepspeed]'."
            )
        # The recipe sets these two values, so that accelerate must not.
        for setting in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"):
            os.environ[setting] = "auto"
        # As with FSDP, each process reads the whole model.
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
        self._numbers: list[list[int]] = []
        self._parameters: list[nn.Parameter] = []

    def created(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the parameters: DeepSpeed replaces them in the optimizer by flat tensors."""
        self._numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def prepared(self, model: nn.Module, optimizer: Any) -> None:
        """Check that the optimizer is torch's AdamW over flat tensors, and have adapters gathered in every forward."""
        from deepspeed import zero

        # DeepSpeed gathers a module's parameters when that module's own forward is called. A dictionary of parameters
        # has no forward, so its parameters are registered with the layer that uses them.
        for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
            for held in [module for module in layer.modules() if isinstance(module, nn.ParameterDict)]:
                for parameter in held.values():
                    zero.register_external_parameter(layer, parameter)
        if not (hasattr(optimizer.optimizer, _FLAT[2]) or hasattr(optimizer.optimizer, _FLAT[3])):
            raise UserError(
                f"DeepSpeed has made the optimizer a {type(optimizer.optimizer).__name__}, which is none of ZeRO-2 or "
                "ZeRO-3: set zero_stage to 2 or 3, or launch without DeepSpeed."
            )
        inner = optimizer.optimizer.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            raise UserError(
                f"DeepSpeed has put {type(inner).__name__} in the place of AdamW, as it does where the optimizer is to "
                "lie on the CPU: set offload_optimizer_device to none; an adapter's takes little memory."
            )

    def kept(self, model: nn.Module) -> int:
        """The number of all values. With stage 3 it is that of this process's parts."""
        return sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters())

    def trained(self, model: nn.Module) -> Tensors:
        """The fp32 values that the optimizer holds, gathered from all processes."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in trained_parameters(model).items()
        }

    @torch.no_grad()
    def load_trained(self, model: nn.Module, tensors: Tensors) -> None:
        """Set this process's part of the fp32 values, and the values that the model computes with."""
        from deepspeed import zero

        for name, parameter in trained_parameters(model).items():
            _keep_part(parameter, tensors[name])
            with zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensors[name])

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state, gathered parameter by parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = optimizer.optimizer.optimizer
        flat = next(iter(inner.state.values()))
        state = {
            number: {
                # Each parameter gets its own tensor of the step, since an optimizer counts steps in place.
                name: value.clone().cpu() if name == "step" else safe_get_full_optimizer_state(parameter, name).cpu()
                for name, value in flat.items()
            }
            for number, parameter in enumerate(self._parameters)
        }
        groups = [{**live, "params": numbers} for live, numbers in zip(inner.param_groups, self._numbers, strict=True)]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Make the flat tensors of the state, as the first step would, and fill in this process's part."""
        sharded = optimizer.optimizer
        inner = sharded.optimizer
        is_stage_3 = hasattr(sharded, _FLAT[3])
        first = next(iter(state["state"].values()))
        for flat in getattr(sharded, _FLAT[3] if is_stage_3 else _FLAT[2]):
            inner.state[flat] = {
                name: value.clone() if name == "step" else torch.zeros_like(flat) for name, value in first.items()
            }
        if not is_stage_3:
            sharded._lazy_init_hp_params_optimizer_state()
        for number, of_parameter in state["state"].items():
            for name in of_parameter.keys() - {"step"}:
                _keep_part(self._parameters[number], of_parameter[name], name)
        for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def trained_parameters(model: nn.Module) -> Tensors:
    """The parameters that are trained, by name, as this process has them."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def launched_engine() -> Engine:
    """The engine that ``accelerate launch`` was told to use.

    Raises:
        UserError: the engine is not installed, or is FSDP 1.
    """
    for variable, engine in (
        ("ACCELERATE_USE_FSDP", FullyShardedDataParallel),
        ("ACCELERATE_USE_DEEPSPEED", DeepSpeed),
    ):
        if os.environ.get(variable, "false").lower() == "true":
            return engine()
    return Engine()


def check_shardable(plan: Plan) -> None:
    """Check that a plan can be trained on a sharded model, and that its result can be saved from there.

    Raises:
        UserError: it cannot be.
    """
    without = "train without FSDP and DeepSpeed"
    if (objective := plan.recipe.objective.name) != "sft":
        raise UserError(
            f"objective: found {objective}, which is not trained on a sharded model; {without}: several processes can "
            "train copies of it, under torchrun."
        )
    if plan.encoder.images is not None:
        raise UserError(f"data: the rows have images, which are not trained on with a sharded model; {without}.")
    method, quantization = plan.recipe.method.name, plan.recipe.quantization
    if method in ("full", "pissa"):
        raise UserError(
            f"method.name: found {method}, which changes the weights themselves, and of a sharded model only adapters "
            f"are saved: choose another method, or {without}."
        )
    if method == "peft":
        raise UserError(
            f"method.name: found peft, and it is not known which tensors of {plan.recipe.method.title} a sharded model "
            f"has whole: choose a method that has a name of its own, or {without}."
        )
    if plan.trained_tokens is not None:
        raise UserError(
            f"new_tokens: found rows of tokens to train, which PEFT does not train in a sharded embedding: {without}."
        )
    if quantization is not None or stored_quantization(load_config(plan.model_name)):
        raise UserError(
            f"model, quantization: found quantized weights, which cannot be sharded: take a plain model, or {without}."
        )
    if plan.recipe.training.gradient_checkpointing == "selective" and _is_zero_3():
        raise UserError(
            "training.gradient_checkpointing: found selective under ZeRO-3, which shards the weights again between a "
            "forward and its recomputation, and allows full alone: set full, or launch with zero_stage 2."
        )
    if plan.validated:
        raise UserError(
            f"training.best_by: found score, and nothing is generated by a sharded model: set loss, or {without}."
        )
    _check_optimization(plan.recipe.training, without)
    for key, given in plan.recipe.speed.model_dump().items():
        if given:
            raise UserError(
                f"speed.{key}: found true, which is for a model that each process holds whole: leave it out, or "
                f"{without}."
            )
    if plan.device.type == "cpu" and plan.dtype != torch.float32:
        raise UserError(
            "precision: found bf16 or fp16, and on CPUs a sharded model is trained in fp32: set precision=fp32, or "
            f"{without}."
        )


def _check_optimization(training: Training, without: str) -> None:
    optimizer = training.optimizer
    if optimizer.name not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(
            f"training.optimizer: found {optimizer.name!r}, and the state of a sharded model is put together for AdamW "
            f"alone: take {DEFAULT_OPTIMIZER}, or {without}."
        )
    for key, given in (("options", optimizer.options), ("groups", optimizer.groups)):
        if given:
            raise UserError(
                f"training.optimizer.{key}: the parameters of a sharded model have the same state and settings: leave "
                f"it out, or {without}."
            )
    if training.ema is not None:
        raise UserError(f"training.ema: a sharded model has no average of its parts: leave it out, or {without}.")


def _is_zero_3() -> bool:
    return isinstance(launched_engine(), DeepSpeed) and DeepSpeedPlugin().zero_stage == 3


def _gather(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _part_for(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor of the parameter's shape, spread over the processes as the parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    moved = whole.to(parameter.device, parameter.dtype)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements)


def _keep_part(parameter: Any, whole: torch.Tensor, moment: str | None = None) -> None:
    """Write this process's part of a parameter's fp32 values, or of one of its moments, to where ZeRO keeps it.

    Args:
        parameter: the parameter.
        whole: the whole values, of the parameter's shape.
        moment: name of the moment; None for the fp32 values of the parameter itself.
    """
    from deepspeed import utils

    whole = whole.to(parameter.device, torch.float32)
    if not hasattr(parameter, "ds_id"):
        if moment is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, moment)
        return
    # All parts have one length, so that the last one is padded. DeepSpeed's functions for whole values do not pad.
    length = int(parameter.ds_tensor.ds_numel)
    padded = F.pad(whole.flatten(), (0, length * distributed.get_world_size() - whole.numel()))
    part = padded.narrow(0, length * distributed.get_rank(), length)
    if moment is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, moment)
