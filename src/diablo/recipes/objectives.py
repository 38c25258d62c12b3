"""What a recipe trains for: the objectives, each with the rows that it takes and the settings that it has."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from diablo.data.rows import RowKind
from diablo.errors import UserError
from diablo.models.heads import HeadKind
from diablo.recipes.section import Section, explained


class NamedObjective(Section):
    """What all objectives have in common."""

    name: str = Field(description="the name of an objective")

    rows: ClassVar[RowKind] = "completions"
    loss_unit: ClassVar[str] = "nats per token"
    """What the loss is counted in."""
    head: ClassVar[HeadKind | None] = None
    """What the model has in place of its output layer; None where it keeps that."""
    score: ClassVar[str | None] = None
    """The figure of held-out rows that says how good the model is, by its name; None where the loss alone does."""

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with what it was before training."""
        return False

    def describe(self) -> str:
        """The objective and its settings, in a line."""
        told = {key: value for key, value in self.model_dump().items() if key not in ("name", "labels") and value}
        listed = [
            f"{key.replace('_', ' ')} {' and '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in told.items()
        ]
        return f"{self.name}: {', '.join(listed)}" if listed else self.name


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
        description=f"one of {', '.join(PairLoss.__args__)}, or a list of them",  # type: ignore[attr-defined]
    )
    loss_weights: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(
        None, description="a list of numbers of at least 0: the weight of each loss; 1 for each if not given"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="a number from 0 to below 0.5: the share of pairs that are taken to be wrong"
    )

    rows: ClassVar[RowKind] = "pairs"
    loss_unit: ClassVar[str] = "per pair"

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
    score: ClassVar[str | None] = "accuracy"


class RegressionObjective(NamedObjective):
    """Regression: a text, or a pair of texts, gets a number; the loss is the squared error."""

    name: Literal["regression"] = Field(description="regression: a text gets a number")

    rows: ClassVar[RowKind] = "numbered"
    loss_unit: ClassVar[str] = "squared error per row"
    head: ClassVar[HeadKind | None] = "regression"
    score: ClassVar[str | None] = "pearson"


class RewardObjective(NamedObjective):
    """A reward model: of two completions, the better one gets a higher score than the worse one."""

    name: Literal["reward"] = Field(description="reward: of two completions the better one gets a higher score")
    center_rewards_coefficient: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="a number above 0: how strongly scores are held around 0"
    )

    rows: ClassVar[RowKind] = "pairs"
    loss_unit: ClassVar[str] = "per pair"
    head: ClassVar[HeadKind | None] = "reward"
    score: ClassVar[str | None] = "accuracy"


class TokenObjective(LabelObjective):
    """Token classification: each word of a text gets a label, as in the recognition of names."""

    name: Literal["token_classification"] = Field(description="token_classification: each word of a text gets a label")

    rows: ClassVar[RowKind] = "tagged"
    loss_unit: ClassVar[str] = "nats per word"
    head: ClassVar[HeadKind | None] = "token_classification"
    score: ClassVar[str | None] = "accuracy"


OBJECTIVES: dict[str, type[NamedObjective]] = {
    "sft": SupervisedObjective,
    "dpo": PairObjective,
    "orpo": OddsRatioObjective,
    "kto": JudgedObjective,
    "classification": ClassificationObjective,
    "regression": RegressionObjective,
    "reward": RewardObjective,
    "token_classification": TokenObjective,
}


def _objective_by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnyObjective = (
    SupervisedObjective
    | PairObjective
    | OddsRatioObjective
    | JudgedObjective
    | ClassificationObjective
    | RegressionObjective
    | RewardObjective
    | TokenObjective
)
_Name = Annotated[str, WithJsonSchema({"enum": list(OBJECTIVES)})]
Objective = Annotated[
    AnyObjective,
    Field(discriminator="name"),
    BeforeValidator(_objective_by_name, json_schema_input_type=_Name | AnyObjective),
]
