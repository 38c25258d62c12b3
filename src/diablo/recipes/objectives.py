"""What a recipe trains for: the objectives, each with the rows that it takes and the settings that it has."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from diablo.data.rows import RowKind
from diablo.errors import UserError
from diablo.models.heads import HeadKind
from diablo.recipes.embedding import EmbeddingObjective
from diablo.recipes.named_objective import NamedObjective
from diablo.recipes.section import Section, explained
from diablo.scoring.rewards import BY_TASK, NAMES, check_reward_name


class SupervisedObjective(NamedObjective):
    """Supervised fine-tuning: the completions are learned."""

    name: Literal["sft"] = Field("sft", description="sft: completions are learned")


# The losses of TRL's trainer that learn from pairs and a fixed reference.
PairLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class PairObjective(NamedObjective):
    """DPO and the losses of its kind: of two completions, the better one becomes likelier than the worse one."""

    name: Literal["dpo"] = Field(description="dpo: of two completions the better one is preferred")
    beta: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="a number above 0: how strongly the model is held to its start"
    )
    loss: Annotated[
        list[PairLoss], BeforeValidator(_several, json_schema_input_type=PairLoss | list[PairLoss]), Field(min_length=1)
    ] = Field(
        ["sigmoid"],
        description=f"one of {', '.join(PairLoss.__args__)}, or a list of them",  # pyrefly: ignore[missing-attribute]
    )
    loss_weights: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(
        None, description="a list of numbers of at least 0: the weight of each loss; 1 for each if not given"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="a number from 0 to below 0.5: the share of pairs that are taken to be wrong"
    )

    rows: ClassVar[RowKind] = "pairs"
    loss_unit: ClassVar[str] = "per pair"
    rate_share: ClassVar[float] = 0.1

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with what it was before training: all but the supervised loss do."""
        return True

    @model_validator(mode="after")
    @explained()
    def _fits(self) -> PairObjective:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            raise UserError(
                f"objective.loss_weights: found {len(self.loss_weights)} for {len(self.loss)} losses; give one for "
                "each."
            )
        if "exo_pair" in self.loss and not self.label_smoothing:
            raise UserError("objective.label_smoothing: found 0, and exo_pair needs some; its authors take 0.001.")
        return self


class OddsRatioObjective(NamedObjective):
    """ORPO: the better completion is learned, and its odds become larger than those of the worse one."""

    name: Literal["orpo"] = Field(description="orpo: the better completion is learned, and preferred to the worse one")
    beta: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="a number above 0: the weight of the odds' ratio in the loss"
    )

    rows: ClassVar[RowKind] = "pairs"
    loss_unit: ClassVar[str] = "per pair"


class JudgedObjective(NamedObjective):
    """KTO: completions that are good become likelier, and bad ones less likely."""

    name: Literal["kto"] = Field(description="kto: good completions become likelier, and bad ones less likely")
    beta: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="a number above 0: how strongly the model is held to its start"
    )
    loss: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="kto or apo_zero_unpaired")
    desirable_weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="a number above 0: the weight of good completions"
    )
    undesirable_weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="a number above 0: the weight of bad completions"
    )

    rows: ClassVar[RowKind] = "judged"
    loss_unit: ClassVar[str] = "per completion"
    rate_share: ClassVar[float] = 0.1

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with what it was before training."""
        return True


def _label_names(value: Any) -> Any:
    """Labels as text: YAML has 0 as a number, and true and no as truth values."""
    if isinstance(value, list) and all(isinstance(each, (str, int)) and str(each).strip() for each in value):
        return [str(each).lower() if isinstance(each, bool) else str(each).strip() for each in value]
    return value


Labels = Annotated[
    list[str], BeforeValidator(_label_names, json_schema_input_type=list[str | int | bool]), Field(min_length=2)
]


class LabelObjective(NamedObjective):
    """What the objectives with labels have in common."""

    labels: Labels | None = Field(
        None, description="a list of two labels or more, in their order; those of the rows, sorted, if not given"
    )

    @model_validator(mode="after")
    @explained()
    def _distinct(self) -> LabelObjective:
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise UserError(f"objective.labels: found {', '.join(self.labels)}; name each label once.")
        return self


class ClassificationObjective(LabelObjective):
    """Classification: a text, or a pair of texts, gets a label."""

    name: Literal["classification"] = Field(description="classification: a text gets a label")
    multi_label: bool = Field(False, description="true or false: a text may have several labels, or none")

    rows: ClassVar[RowKind] = "labelled"
    loss_unit: ClassVar[str] = "nats per row"
    head: ClassVar[HeadKind | None] = "classification"
    scores: ClassVar[tuple[str, ...]] = ("accuracy",)


class RegressionObjective(NamedObjective):
    """Regression: a text, or a pair of texts, gets a number; the loss is the squared error."""

    name: Literal["regression"] = Field(description="regression: a text gets a number")

    rows: ClassVar[RowKind] = "numbered"
    loss_unit: ClassVar[str] = "squared error per row"
    head: ClassVar[HeadKind | None] = "regression"
    scores: ClassVar[tuple[str, ...]] = ("pearson",)


class RewardObjective(NamedObjective):
    """A reward model: of two completions, the better one gets a higher score than the worse one."""

    name: Literal["reward"] = Field(description="reward: of two completions the better one gets a higher score")
    center_rewards_coefficient: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="a number above 0: how strongly scores are held around 0"
    )

    rows: ClassVar[RowKind] = "pairs"
    loss_unit: ClassVar[str] = "per pair"
    head: ClassVar[HeadKind | None] = "reward"
    scores: ClassVar[tuple[str, ...]] = ("accuracy",)


class TokenObjective(LabelObjective):
    """Token classification: each word of a text gets a label, as in the recognition of names."""

    name: Literal["token_classification"] = Field(description="token_classification: each word of a text gets a label")

    rows: ClassVar[RowKind] = "tagged"
    loss_unit: ClassVar[str] = "nats per word"
    head: ClassVar[HeadKind | None] = "token_classification"
    scores: ClassVar[tuple[str, ...]] = ("accuracy",)


class RewardChoice(Section):
    """One of the rewards of completions."""

    name: str = Field(description=f"{', '.join(NAMES)}, or FILE.py:FUNCTION, a function of a file of yours")
    weight: float = Field(
        1.0, allow_inf_nan=False, description="a number: what the reward's values are multiplied by in the sum"
    )
    tokens: int | None = Field(
        None, ge=1, description="an integer of at least 1, of length alone: how many tokens cost nothing"
    )

    @model_validator(mode="after")
    @explained()
    def _fits(self) -> RewardChoice:
        check_reward_name(self.name)
        if (self.name == "length") != (self.tokens is not None):
            raise UserError(
                "objective.rewards: length needs tokens, the number that costs nothing, such as {name: length, tokens: "
                "100}, and other rewards have none."
            )
        if self.weight == 0:
            raise UserError(f"objective.rewards: {self.name} has weight 0, which changes nothing; leave it out.")
        return self

    @property
    def title(self) -> str:
        """What logs call it."""
        return self.name.rpartition(":")[2]


def _as_rewards(value: Any) -> Any:
    several = value if isinstance(value, list) else [value]
    return [{"name": each} if isinstance(each, str) else each for each in several]


class Vllm(Section):
    """vLLM, which generates completions in the place of transformers."""

    server: str | None = Field(
        None,
        description="text: the address of a server that serves the model, such as http://localhost:8000; without it, "
        "vLLM runs in this process",
    )
    gpu_memory: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="a number above 0 and below 1, without server: the share of the GPU's memory that vLLM takes; 0.3 "
        "if not given",
    )

    @model_validator(mode="after")
    @explained()
    def _fits(self) -> Vllm:
        if self.server is not None and not self.server.startswith(("http://", "https://")):
            raise UserError(
                f"objective.vllm.server: found {self.server!r}; give the whole address, such as http://localhost:8000."
            )
        if self.server and self.gpu_memory:
            raise UserError(
                f"objective.vllm.gpu_memory: found {self.gpu_memory:g} with a server, which was told its share when it "
                "was started; leave it out."
            )
        return self


class GroupObjective(NamedObjective):
    """GRPO: of several completions of a prompt that the model writes, the better ones become likelier."""

    name: Literal["grpo"] = Field(description="grpo: the model's own completions get rewards, and better ones likelier")
    generations: int = Field(8, ge=2, description="an integer of at least 2: how many completions each prompt gets")
    rewards: Annotated[
        list[RewardChoice],
        BeforeValidator(_as_rewards, json_schema_input_type=str | RewardChoice | list[str | RewardChoice]),
        Field(min_length=1),
    ] = Field(
        [RewardChoice(name="right_answer")],
        description=f"{', '.join(NAMES)} or FILE.py:FUNCTION, a section with one of these as its name, or a list",
    )
    beta: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="a number of at least 0: how strongly the model is held to its start",
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="an integer of at least 1: the most tokens of a completion; the task's own if not given"
    )
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="a number above 0: the temperature of the sampling"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="a number above 0 up to 1: the likeliest tokens of this sum are sampled from"
    )
    top_k: int = Field(
        0, ge=0, description="an integer of at least 0: so many of the likeliest tokens are sampled from; 0 is all"
    )
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] = Field(
        "dapo", description="dapo, grpo, bnpo, dr_grpo or cispo: how the tokens' losses are weighted"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="group, batch or none: whose standard deviation a reward's advantage is divided by"
    )
    iterations: int = Field(1, ge=1, description="an integer of at least 1: steps on the same completions")
    epsilon: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a number above 0, with iterations: how far a token's likelihood may move; 0.2 if not given",
    )
    epsilon_high: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a number above 0, with iterations: how far it may move upwards; epsilon if not given",
    )
    vllm: Vllm | None = Field(None, description="vLLM generates: a section, {} where it runs in this process")

    rows: ClassVar[RowKind] = "prompts"
    loss_unit: ClassVar[str] = "per token"
    rate_share: ClassVar[float] = 0.1

    @property
    def by_task(self) -> list[str]:
        """The names of those rewards that a task gives."""
        return [reward.name for reward in self.rewards if reward.name in BY_TASK]

    def describe(self) -> str:
        """The objective and its settings, in a line."""
        rewards = [each.name if each.weight == 1 else f"{each.weight:g} {each.name}" for each in self.rewards]
        told = {"beta": self.beta, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        default = {name: type(self).model_fields[name].default for name in told}
        told = {name: value for name, value in told.items() if value != default[name]}
        parts = [
            f"{self.generations} completions of each prompt",
            f"rewards {' + '.join(rewards)}",
            *(f"{name.replace('_', ' ')} {value:g}" for name, value in told.items()),
            f"loss {self.loss}, scaled by {self.scale_rewards}",
            *([f"{self.iterations} steps on the same completions"] if self.iterations > 1 else []),
            *([f"generated by vLLM {self.vllm.server or 'in this process'}"] if self.vllm is not None else []),
        ]
        return f"{self.name}: {', '.join(parts)}"

    @model_validator(mode="after")
    @explained()
    def _fits(self) -> GroupObjective:
        titles = [reward.title for reward in self.rewards]
        if len(set(titles)) < len(titles):
            raise UserError(f"objective.rewards: found {', '.join(titles)}; name each once.")
        for key in ("epsilon", "epsilon_high"):
            if (found := getattr(self, key)) is not None and self.iterations == 1:
                raise UserError(
                    f"objective.{key}: found {found:g} with iterations: 1, where every step has completions of its own "
                    "and nothing is clipped; leave it out, or set objective.iterations."
                )
        return self


OBJECTIVES: dict[str, type[NamedObjective]] = {
    "sft": SupervisedObjective,
    "dpo": PairObjective,
    "orpo": OddsRatioObjective,
    "kto": JudgedObjective,
    "grpo": GroupObjective,
    "classification": ClassificationObjective,
    "regression": RegressionObjective,
    "reward": RewardObjective,
    "token_classification": TokenObjective,
    "embedding": EmbeddingObjective,
}


def _objective_by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnyObjective = (
    SupervisedObjective
    | PairObjective
    | OddsRatioObjective
    | JudgedObjective
    | GroupObjective
    | ClassificationObjective
    | RegressionObjective
    | RewardObjective
    | TokenObjective
    | EmbeddingObjective
)
_Name = Annotated[str, WithJsonSchema({"enum": list(OBJECTIVES)})]
Objective = Annotated[
    AnyObjective,
    Field(discriminator="name"),
    BeforeValidator(_objective_by_name, json_schema_input_type=_Name | AnyObjective),
]
