"""Models of a few hundred weights, and the definition of the update written a second time, without the library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from diablo import DiabloConfig


class Mlp(nn.Module):
    """Two layers to adapt and a head that is left alone, so that "the rest stays as it was" can be seen."""

    def __init__(self, sizes: tuple[int, int, int], conv1d: bool = False) -> None:
        super().__init__()
        first, hidden, last = sizes
        self.up = Conv1D(hidden, first) if conv1d else nn.Linear(first, hidden)
        self.down = Conv1D(last, hidden) if conv1d else nn.Linear(hidden, last)
        self.head = nn.Linear(last, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


class ConvNet(nn.Module):
    """Convolutions with every setting that changes what a kernel meets: stride, padding, its mode, dilation."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.first = kind(6, 8, 3, stride=2, padding=1)
        self.second = kind(8, 7, 2, padding="same", dilation=2)
        self.third = kind(7, 5, 3, padding=1, padding_mode="circular", bias=False)
        self.head = nn.Linear(5, 4)
        self.dimensions = dimensions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))))
        # torch rounds the product with a strided input differently where the weight is frozen.
        return self.head(x.flatten(2).transpose(1, 2).contiguous())


class EmbeddingNet(nn.Module):
    """An embedding with a padding index, and a table whose width the blocks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.places = nn.Embedding(7, 6)
        self.head = nn.Linear(14, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        return self.head(torch.cat([self.tokens(tokens), self.places(places)], -1))


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=5,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config).eval()


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    # The default standard deviation of 0.02 would make such a small network nearly constant, and tests insensitive.
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        # GPT-2's own dropout would hide what the adapter's dropout does.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def t5(gated: bool = False) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        # T5's own dropout would hide what the adapter's dropout does.
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        # Queries start so small, and embeddings so large, that blocks would hardly show in the output.
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=32,
        max_position_embeddings=32,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        dropout=0.0,
        init_std=0.3,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


def mlp(sizes: tuple[int, int, int] = (16, 24, 8), conv1d: bool = False) -> Mlp:
    torch.manual_seed(0)
    model = Mlp(sizes, conv1d).eval()
    if conv1d:
        # Conv1D starts with a standard deviation of 0.02, with which the network would be nearly constant.
        for layer in (model.up, model.down):
            nn.init.normal_(layer.weight, std=0.3)
            nn.init.normal_(layer.bias, std=0.3)
    return model


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    # Of float64 outputs. Llama's norm computes in float32 whatever the model's dtype.
    tolerance: float = 1e-10
    num_blocks: int = 4
    other_num_blocks: int = 3
    in_place: bool | str = "auto"

    def config(self, **settings) -> DiabloConfig:
        own = {"num_blocks": self.num_blocks, "target_modules": list(self.targets), "in_place": self.in_place}
        return DiabloConfig(**{**own, **settings})

    def base(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return self.build().to(dtype)

    def adapted(self, dtype: torch.dtype = torch.float64, **settings) -> PeftModel:
        """An adapted model in evaluation mode, with blocks that are not zero."""
        # PEFT leaves the layers that it makes in training mode, whatever the base's mode.
        return fill(get_peft_model(self.base(dtype), self.config(**settings))).eval()

    def other_config(self) -> DiabloConfig:
        """Other blocks on fewer modules."""
        return self.config(num_blocks=self.other_num_blocks, target_modules=[self.targets[0]])


CASES = [
    Case("mlp", mlp, ("up", "down")),
    # 10 -> 14 -> 7 with 4 blocks: both edges cut through blocks.
    Case("ragged", lambda: mlp((10, 14, 7)), ("up", "down")),
    # 5 blocks of 11 -> 6: rounding up covers the outputs with 3 blocks and leaves two blocks outside the matrix.
    Case("overhang", lambda: mlp((11, 6, 9)), ("up", "down"), num_blocks=5),
    Case("conv1d", lambda: mlp((16, 10, 8), conv1d=True), ("up", "down")),
    Case("llama", llama, ("q_proj", "v_proj", "up_proj", "down_proj"), tolerance=1e-5),
    # While they are trained, the blocks of the linear layers above stand in the weight; here, beside it.
    Case("ragged_beside", lambda: mlp((10, 14, 7)), ("up", "down"), in_place=False),
    Case("llama_beside", llama, ("q_proj", "v_proj", "up_proj", "down_proj"), tolerance=1e-5, in_place=False),
    Case("gpt2", gpt2, ("c_attn", "c_fc")),
    Case("t5", t5, ("q", "v", "wi", "wo"), tolerance=1e-5),
    Case("bart", bart, ("q_proj", "v_proj", "fc1", "fc2"), tolerance=1e-5),
    Case("vit", vit, ("projection", "q_proj", "fc2"), num_blocks=3, other_num_blocks=2),
    Case("conv_1d", lambda: seeded(lambda: ConvNet(1)), ("first", "second", "third")),
    Case("conv_2d", lambda: seeded(lambda: ConvNet(2)), ("first", "second", "third")),
    Case("conv_3d", lambda: seeded(lambda: ConvNet(3)), ("first", "second")),
    Case("embedding", lambda: seeded(EmbeddingNet), ("tokens", "places")),
]


LINEAR_CASES = [case for case in CASES if not case.name.startswith(("conv_", "embedding", "vit"))]


def run(model: nn.Module) -> torch.Tensor:
    """The model's output on a fixed input that suits it."""
    generator = torch.Generator().manual_seed(1)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner, Mlp):
        up = inner.up.get_base_layer() if isinstance(inner.up, BaseTunerLayer) else inner.up
        width = up.nx if isinstance(up, Conv1D) else up.in_features
        return model(torch.randn(2, 3, width, generator=generator, dtype=torch.float64).to(up.weight.dtype))
    if isinstance(inner, ConvNet):
        size = (2, 6, *[5] * inner.dimensions)
        return model(torch.randn(size, generator=generator, dtype=torch.float64).to(inner.head.weight.dtype))
    if isinstance(inner, EmbeddingNet):
        return model(torch.tensor([[3, 0, 10, 9, 1, 3, 8], [7, 2, 0, 4, 5, 6, 1]]))
    if isinstance(inner, ViTForImageClassification):
        images = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        return model(pixel_values=images.to(inner.dtype)).logits
    ids = torch.randint(32, (2, 7), generator=generator)
    written = {"decoder_input_ids": ids.flip(1)[:, :5]} if inner.config.is_encoder_decoder else {}
    return model(input_ids=ids, **written).logits


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return run(model).clone()


def backward(model: nn.Module) -> None:
    """Back-propagate a weighted sum of the outputs, whose gradient differs from output to output."""
    y = run(model)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    (y * weights).sum().backward()


def fill(model: nn.Module, adapter_name: str = "default", seed: int = 3, std: float = 0.2) -> nn.Module:
    """Draw the blocks of an adapter: zeros would make nearly every test vacuous."""
    generator = torch.Generator().manual_seed(seed)
    for layer in tuner_layers(model).values():
        if adapter_name in layer.diablo_blocks:
            blocks = layer.diablo_blocks[adapter_name]
            blocks.data.copy_(torch.randn(blocks.shape, generator=generator, dtype=torch.float64) * std)
    return model


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers, by the names that they have in the base model."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base model's parameters, by the names that they have without an adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "diablo_" not in name
    }


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # torch.equal takes -0.0 for 0.0, which are different bits.
        assert torch.equal(got[name].view(torch.uint8), value.view(torch.uint8)), name


def block_entries(shape: torch.Size, in_features: int, out_features: int):
    """Each entry of the parameter that lies inside the matrix: its index, its input and its output."""
    count, rows, columns = shape
    for block in range(count):
        for row in range(rows):
            for column in range(columns):
                i, o = block * rows + row, block * columns + column
                if i < in_features and o < out_features:
                    yield (block, row, column), i, o


def in_and_out_first(weight: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A weight of the module, or its gradient, as ``(in, out, *kernel)``."""
    return weight if isinstance(module, (Conv1D, nn.Embedding)) else weight.transpose(0, 1)


def dense_delta(blocks: torch.Tensor, like: nn.Module) -> torch.Tensor:
    """The update as a tensor of the shape of ``like.weight``, entry by entry from the paper's definition."""
    delta = torch.zeros_like(like.weight, dtype=blocks.dtype)
    view = in_and_out_first(delta, like)
    for index, i, o in block_entries(blocks.shape[-3:], *view.shape[:2]):
        # A convolution has a matrix for each position of its kernel.
        view[i, o] = blocks.detach()[(..., *index)]
    return delta


def with_dense_delta(base: nn.Module, model: nn.Module, adapter_names: tuple[str, ...] = ("default",)) -> nn.Module:
    """A copy of an unadapted model whose weights have the updates of ``model``'s adapters added."""
    dense = copy.deepcopy(base)
    for name, layer in tuner_layers(model).items():
        plain = dense.get_submodule(name)
        for adapter_name in adapter_names:
            if adapter_name in layer.diablo_blocks:
                plain.weight.data += dense_delta(layer.diablo_blocks[adapter_name], plain).to(plain.weight.dtype)
    return dense


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_same_output(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: a loaded adapter stands beside the weight, one that is trained stands in it."""
    assert_close(got, expected, 1e-12 if expected.dtype == torch.float64 else 1e-5)


class LargestAllocation(TorchDispatchMode):
    """The number of entries of the largest tensor that was made, views not counted."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage().data_ptr()
            for tensor in [*args, *(kwargs or {}).values()]
            if isinstance(tensor, torch.Tensor)
        }
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, result.numel())
        return result
