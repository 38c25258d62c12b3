"""The methods that a recipe can name, and their settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from diablo.recipes.section import LayerIndices, ModuleNames, Section, explained

_WRITTEN = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "pissa": "PiSSA"}


class NamedMethod(Section):
    """What all methods have in common."""

    name: str = Field(description="the name of a method")

    @property
    def title(self) -> str:
        """What the method is called in messages and tables."""
        return self.name

    @property
    def with_size(self) -> str:
        """The method with its size, as tables of memory have it."""
        return self.title

    @property
    def needs_plain_weights(self) -> bool:
        """Whether the method has no use for weights that are quantized."""
        return self.name in ("full", "pissa")

    @property
    def trains_tokens(self) -> bool:
        """Whether the method can train the rows of tokens by themselves, or trains all rows anyway."""
        return self.name not in ("pissa", "miss")


class AdapterMethod(NamedMethod):
    """What the methods that adapt some modules have in common."""

    target_modules: ModuleNames = Field(
        None, description="a list of module names, a regular expression or all-linear: what is adapted"
    )
    exclude_modules: ModuleNames = Field(
        None, description="a list of module names or a regular expression: what is left alone"
    )
    layers_to_transform: LayerIndices = Field(
        None, description="an integer or a list of integers: the only layers that are adapted, counted from 0"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="a number from 0 to below 1: share of the adapter's inputs that training drops"
    )


class DiabloMethod(AdapterMethod):
    """DiaBlo: train the diagonal blocks of the target matrices."""

    name: Literal["diablo"] = Field("diablo", description="diablo: the blocks on the diagonal are trained")
    num_blocks: int = Field(
        64, ge=1, description="an integer from 1 to the smaller dimension of every target: N; 1/N of each is trained"
    )
    block_pattern: dict[str, int] = Field(
        {}, description="module names or expressions to num_blocks, where they differ from the others"
    )

    @property
    def with_size(self) -> str:
        """The method with its size, as tables of memory have it."""
        return f"DiaBlo, N = {self.num_blocks}"


class LoraMethod(AdapterMethod):
    """LoRA and its kin, from PEFT, on the same target modules as DiaBlo where none are given.

    rsLoRA divides alpha by the root of the rank, DoRA trains the columns' norms apart from their directions, and PiSSA
    starts from the weight's largest singular values, which it takes out of the frozen weight.
    """

    name: Literal["lora", "rslora", "dora", "pissa"] = Field(description="lora, rslora, dora or pissa")
    r: int = Field(16, ge=1, description="an integer of at least 1: the rank")
    lora_alpha: int | None = Field(
        None,
        ge=1,
        description="an integer of at least 1: the update is scaled by alpha / r, of rslora by alpha / root of r",
    )

    @property
    def with_size(self) -> str:
        """The method with its size, as tables of memory have it."""
        return f"{_WRITTEN[self.name]}, r = {self.r}"

    @property
    def alpha(self) -> int:
        """The alpha that is used: where none is given, the one that makes the method's usual scale.

        The scale is 2 for LoRA and DoRA (alpha 2r), and 1 for PiSSA, whose factors are the weight's own (alpha r, as
        in its paper, arXiv 2404.02948). rsLoRA's alpha does not depend on the rank (arXiv 2312.03732): 16.
        """
        return self.lora_alpha or {"rslora": 16, "pissa": self.r}.get(self.name, 2 * self.r)


class MissMethod(AdapterMethod):
    """MiSS, from PEFT: one trained matrix that shards of the weight share, on the same targets as DiaBlo's."""

    name: Literal["miss"] = Field(description="miss")
    r: int = Field(16, ge=1, description="an integer from 1 to the smallest input of a target: the rank")

    @property
    def with_size(self) -> str:
        """The method with its size, as tables of memory have it."""
        return f"MiSS, r = {self.r}"


def _known_type(value: str) -> str:
    # PEFT takes seconds to import; only recipes that name one of its types wait for it.
    from diablo.recipes.peft_methods import peft_type

    with explained():
        return peft_type(value)


class PeftMethod(NamedMethod):
    """Any method that PEFT has, by its type; all other keys are those of the method's own config."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Literal["peft"] = Field(description="peft: the type says which of PEFT's methods")
    type: Annotated[str, AfterValidator(_known_type)] = Field(description="a type of PEFT, such as GRALORA")

    @property
    def title(self) -> str:
        """What the method is called in messages and tables."""
        return self.type

    @property
    def needs_plain_weights(self) -> bool:
        """Whether the method has no use for weights that are quantized."""
        from diablo.recipes.peft_methods import takes_quantized

        return not takes_quantized(self.type)

    @property
    def trains_tokens(self) -> bool:
        """Whether the method's own config has a field for tokens whose rows are trained."""
        from diablo.recipes.peft_methods import config_keys

        return "trainable_token_indices" in config_keys(self.type)

    @property
    def options(self) -> dict[str, Any]:
        """The config's keys, as the recipe has them."""
        return dict(self.model_extra or {})

    @property
    def target_modules(self) -> Any:
        """The target modules; None where none are given or the method takes none."""
        return self.options.get("target_modules")

    @model_validator(mode="after")
    def _takes_options(self) -> PeftMethod:
        from diablo.recipes.peft_methods import build_config

        with explained():
            build_config(self.type, self.options)
        return self


class FullMethod(NamedMethod):
    """Full fine-tuning: every weight is trained, in fp32 under autocast."""

    name: Literal["full"] = Field(description="full: every weight is trained")

    @property
    def with_size(self) -> str:
        """The method with its size, as tables of memory have it."""
        return "full fine-tuning"


METHODS: dict[str, type[Section]] = {
    "diablo": DiabloMethod,
    "lora": LoraMethod,
    "rslora": LoraMethod,
    "dora": LoraMethod,
    "pissa": LoraMethod,
    "miss": MissMethod,
    "full": FullMethod,
    "peft": PeftMethod,
}


def _method_by_name(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "diablo", **value} if isinstance(value, dict) else value


AnyMethod = DiabloMethod | LoraMethod | MissMethod | PeftMethod | FullMethod
# `peft` alone does not say which type.
_Name = Annotated[str, WithJsonSchema({"enum": [name for name in METHODS if name != "peft"]})]
Method = Annotated[
    AnyMethod,
    Field(discriminator="name"),
    BeforeValidator(_method_by_name, json_schema_input_type=_Name | AnyMethod),
]
