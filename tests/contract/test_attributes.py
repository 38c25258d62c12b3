"""What the base layer has, the adapted layer shows: models read the sizes of their layers, and some set them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from tiny_models import ConvNet, assert_same_bits, base_weights, fill, mlp, output, seeded, tuner_layers
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from diablo import DiabloConfig, DiabloLayer, DiabloLinear


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=32,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=10,
        max_target_positions=12,
        init_std=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config).eval()


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            head_dim=4,
        )
    ).eval()


class ScaledEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = Gemma3TextScaledWordEmbedding(12, 8, padding_idx=0, embed_scale=3.0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tokens(tokens)


KINDS = {
    "linear": (mlp, {"target_modules": ["up"]}, ("in_features", "out_features", "weight", "bias")),
    "conv1d": (lambda: mlp(conv1d=True), {"target_modules": ["up"]}, ("nx", "nf", "weight", "bias")),
    "conv": (
        lambda: seeded(lambda: ConvNet(1)),
        {"target_modules": ["first"]},
        ("stride", "padding", "dilation", "groups", "kernel_size", "in_channels", "out_channels", "padding_mode"),
    ),
    "embedding": (
        lambda: seeded(ScaledEmbeddings),
        {"target_modules": ["tokens"]},
        ("num_embeddings", "embedding_dim", "padding_idx", "embed_scale", "scalar_embed_scale"),
    ),
    "experts": (
        gpt_oss,
        {"target_parameters": ["experts.down_proj"]},
        ("num_experts", "hidden_size", "gate_up_proj_bias", "down_proj_bias", "is_transposed"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_layer_shows_what_the_base_layer_has(kind):
    build, settings, names = KINDS[kind]
    model = get_peft_model(build(), DiabloConfig(num_blocks=2, **settings))
    (layer,) = tuner_layers(model).values()
    base_layer = layer.get_base_layer()
    for name in names:
        assert getattr(layer, name) is getattr(base_layer, name), name
    assert not hasattr(layer, "no_such_name")
    with pytest.raises(AttributeError, match=rf"'{type(layer).__name__}' object has no attribute 'strid'"):
        layer.strid  # noqa: B018


@pytest.mark.parametrize("kind", KINDS)
def test_what_libraries_keep_on_a_base_layer_for_themselves_is_not_shown(kind):
    build, settings, _ = KINDS[kind]
    base = build()
    for module in base.modules():
        module._hf_hook = "of this module alone"
    model = get_peft_model(base, DiabloConfig(num_blocks=2, **settings))
    (layer,) = tuner_layers(model).values()
    for name in ("_hf_hook", "ds_grads_remaining", "lora_A", "qweight"):
        assert not hasattr(layer, name)
    # A counter of each module's calls: of the base layer's, and not of the adapted one's.
    layer.get_base_layer().calls = 3
    assert not hasattr(layer, "calls")
    layer.calls = 5
    assert layer.get_base_layer().calls == 3


def test_what_is_set_on_an_adapted_layer_acts():
    expected = seeded(lambda: ConvNet(1)).double()
    model = get_peft_model(seeded(lambda: ConvNet(1)).double(), DiabloConfig(num_blocks=2, target_modules=["first"]))
    before = output(model)
    model.base_model.model.first.stride = expected.first.stride = (1,)
    assert model.base_model.model.first.get_base_layer().stride == (1,)
    assert torch.equal(output(model), output(expected))
    assert output(model).shape != before.shape


def test_a_layer_that_is_not_made_yet_and_copies_of_one_have_attributes_of_their_own():
    for name in ("base_layer", "stride"):
        assert not hasattr(DiabloLinear.__new__(DiabloLinear), name)
    config = DiabloConfig(num_blocks=2, target_modules=["first"])
    model = fill(get_peft_model(seeded(lambda: ConvNet(2)).double(), config))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        layer = other.base_model.model.first
        assert isinstance(layer, DiabloLayer)
        assert layer.stride == (2, 2)
        assert torch.equal(output(other), output(model))
        assert_same_bits(base_weights(other), base_weights(model))


def test_whisper_with_an_adapted_convolution_runs_trains_and_generates():
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))
    targets = ["encoder.conv1", "encoder.conv2", "q_proj", "decoder.embed_tokens"]
    model = get_peft_model(whisper(), DiabloConfig(num_blocks=2, target_modules=targets)).eval()
    plain = whisper().generate(input_features=features, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(model.generate(input_features=features, max_new_tokens=5, min_new_tokens=5), plain)
    model.train()
    model(input_features=features, labels=torch.tensor([[4, 5, 2], [6, 7, 2]])).loss.backward()
    layer = model.base_model.model.model.encoder.conv1
    assert layer.stride == (1,)
    assert layer.diablo_blocks["default"].grad.abs().sum() > 0


class Reader(nn.Module):
    """Its forward reads what its layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 6, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[..., :: self.layer.stride[0]] * self.layer.out_channels


def test_the_compiler_reads_attributes_without_a_break():
    base = seeded(Reader)
    model = fill(get_peft_model(copy.deepcopy(base), DiabloConfig(num_blocks=2, target_modules=["layer"]))).eval()
    x = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(model(x), base(x))
