"""How the weights of the supported modules are read as matrices of ``(out_features, in_features)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from diablo.layout import BlockLayout

_ADAPTED_AS_MODULES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
SUPPORTED = "nn.Linear, transformers' Conv1D, nn.Conv1d, nn.Conv2d and nn.Conv3d of one group, and nn.Embedding"


@dataclass(frozen=True)
class Weight:
    """How a weight is read as a stack of matrices.

    Attributes:
        in_features: length of the input of each matrix. For a convolution these are the channels, for an embedding the
            vocabulary.
        out_features: length of the output of each matrix.
        stack: sizes of the leading dimensions: those of a convolution's kernel, or the experts of a mixture. It is
            empty for one matrix.
        order: the weight's own dimensions, in the order that makes it ``(*stack, out_features, in_features)``.
    """

    in_features: int
    out_features: int
    stack: tuple[int, ...]
    order: tuple[int, ...]

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as ``(*stack, out_features, in_features)``. It is a view: writing to it writes to the weight."""
        return weight.permute(self.order)

    def original(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`matrix`: a view with the dimensions in the weight's own order."""
        return matrix.permute(tuple(self.order.index(dimension) for dimension in range(len(self.order))))

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        matrix = (*self.stack, self.out_features, self.in_features)
        return tuple(matrix[self.order.index(dimension)] for dimension in range(len(matrix)))

    def layout(self, num_blocks: int) -> BlockLayout:
        """The layout of ``num_blocks`` diagonal blocks in each matrix.

        Raises:
            ValueError: ``num_blocks`` does not fit.
        """
        return BlockLayout(self.in_features, self.out_features, num_blocks, self.stack)


def module_weight(module: nn.Module) -> Weight:
    """How a module's weight is read where the module is adapted as a whole.

    Raises:
        TypeError: the module cannot be adapted. The message is the reason; the caller puts the module's name before it.
    """
    if is_quantized(module):
        if isinstance(module, nn.Embedding):
            raise TypeError(f"a quantized {type(module).__name__}; of quantized layers only linear ones can be adapted")
        return Weight(int(module.in_features), int(module.out_features), (), (0, 1))  # pyrefly: ignore[bad-argument-type]
    if isinstance(module, nn.Linear):
        return Weight(module.in_features, module.out_features, (), (0, 1))
    if isinstance(module, Conv1D):
        return Weight(module.nx, module.nf, (), (1, 0))
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise TypeError("an Embedding with max_norm, which rewrites its weight in every forward")
        return Weight(module.num_embeddings, module.embedding_dim, (), (1, 0))
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups != 1:
            raise TypeError(f"a {type(module).__name__} of {module.groups} groups, whose kernel is block-diagonal")
        kernel = range(2, 2 + len(module.kernel_size))
        return Weight(module.in_channels, module.out_channels, tuple(module.kernel_size), (*kernel, 0, 1))
    raise TypeError(f"a {type(module).__name__}")


def parameter_weight(module: nn.Module, name: str) -> Weight:
    """How a parameter is read where it is adapted by itself, whatever its module does with it.

    A parameter of two dimensions is ``(out, in)``. One of three dimensions holds experts and is ``(experts, out, in)``,
    or ``(experts, in, out)`` in modules that transformers marks so. Reading inputs as outputs changes no result: the
    same entries of the weight are trained.

    Raises:
        TypeError: the parameter cannot be adapted. The message is the reason; the caller puts the parameter's name
            before it.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    if not parameter.is_floating_point() or _is_packed(parameter):
        raise TypeError("a quantized parameter")
    if parameter.dim() not in (2, 3):
        raise TypeError(f"a parameter of {parameter.dim()} dimensions, where 2 or 3 are allowed")
    if isinstance(module, _ADAPTED_AS_MODULES):
        raise TypeError(f"the {name} of a {type(module).__name__}: name the module in target_modules instead")
    if isinstance(module, parametrize.ParametrizationList):
        raise TypeError("a parameter that another one is computed from: name the module in target_modules instead")
    *stack, out_features, in_features = parameter.shape
    order = tuple(range(parameter.dim()))
    if stack and getattr(module, "is_transposed", False):
        out_features, in_features = in_features, out_features
        order = (0, 2, 1)
    return Weight(in_features, out_features, tuple(stack), order)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a linear layer, also of a quantized one; None for every other module."""
    if not isinstance(module, (nn.Linear, Conv1D)) and not is_quantized(module):
        return None
    try:
        weight = module_weight(module)
    except TypeError:
        return None
    return weight.in_features, weight.out_features


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a layer whose weight is held by a quantization library."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")) and not isinstance(
        module, nn.Embedding
    ):
        return False
    # Not read then: some parametrizations change their state when they are.
    if recomputed(module) is not None:
        return False
    weight: Any = getattr(module, "weight", None)
    # Such layers are often subclasses of nn.Linear. Their weight has integers, or a tensor class of the library, or
    # another name.
    return not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or _is_packed(weight)


@dataclass(frozen=True)
class Recomputed:
    """What computes a module's weight anew in each forward, from tensors that the module has in its place.

    Attributes:
        by: name of the function's class.
        undo: the call that makes the weight a plain one, given the module as ``layer.base_layer``.
    """

    by: str
    undo: str


_UNDOING_HOOKS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer.base_layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer.base_layer)",
}


def recomputed(module: nn.Module, name: str = "weight") -> Recomputed | None:
    """What computes a tensor of a module anew in each forward: torch's parametrizations, norms and pruning.

    Returns:
        None where it is a parameter like any other.
    """
    if parametrize.is_parametrized(module, name):
        by = ", ".join(type(function).__name__.lstrip("_") for function in module.parametrizations[name])  # pyrefly: ignore[bad-index]
        return Recomputed(by, f"torch.nn.utils.parametrize.remove_parametrizations(layer.base_layer, {name!r})")
    if not isinstance(vars(module).get(name), torch.Tensor):
        return None
    for hook in module._forward_pre_hooks.values():
        # Norms before parametrizations, and pruning.
        if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            by = type(hook).__name__
            return Recomputed(by, _UNDOING_HOOKS.get(by, f"torch.nn.utils.prune.remove(layer.base_layer, {name!r})"))
    return None


def is_distributed(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is torch's ``DTensor``, which several processes hold together."""
    return hasattr(tensor, "device_mesh")


class Owners:
    """Which modules of a model share a weight. A module that has several places in the model counts once for each.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        modules: dict[str, nn.Module] = {}
        places: set[tuple[int, str]] = set()
        for name, module in model.named_modules(remove_duplicate=False):
            modules[name] = module
            parent, _, own = name.rpartition(".")
            # A module can have several names because its parent has. It still has only one place in that parent.
            place = (id(modules[parent]), own)
            if place not in places:
                places.add(place)
                for weight in module._parameters.values():
                    if weight is not None:
                        self._names.setdefault(_identity(weight), []).append(name.removesuffix(".base_layer"))

    def of(self, weight: torch.Tensor | None) -> list[str]:
        """The names of all modules that have this weight; an empty list for None."""
        return [] if weight is None else self._names.get(_identity(weight), [])


def _identity(weight: torch.Tensor) -> int:
    """A number that two parameters have in common where they share their values."""
    # A plain parameter is identified by its memory. Tensor classes of quantization libraries and tensors on the meta
    # device have no memory of their own.
    return weight.data_ptr() if type(weight) is nn.Parameter and not weight.is_meta else id(weight)


def _is_packed(weight: torch.Tensor) -> bool:
    """Whether a quantization library defines the weight's class. Its values are then not laid out as its shape says."""
    if type(weight) is torch.Tensor:
        return False
    return not type(weight).__module__.startswith(("torch.", "diablo")) or type(weight).__module__.startswith(
        "torch.ao"
    )
