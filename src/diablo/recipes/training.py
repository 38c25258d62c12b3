"""The optimisation, as a recipe says it: the optimizer, the schedule of the learning rate, and when training ends.

Names are looked up in tables, without transformers. What an optimizer or a schedule takes is asked of the libraries, in
:mod:`diablo.planning.optimizers` and :mod:`diablo.planning.schedules`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from diablo.errors import did_you_mean, shortened
from diablo.models.choices import Checkpointing
from diablo.recipes.section import Section

DEFAULT_OPTIMIZER = "adamw_torch_fused"
DEFAULT_SCHEDULE = "linear"

OUR_OPTIMIZERS = ("muon",)
"""Names of optimizers that transformers does not have."""

OPTIMIZERS = (
    DEFAULT_OPTIMIZER,
    "adamw_torch",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "grokadamw",
    "stable_adamw",
    *OUR_OPTIMIZERS,
)
"""Names of optimizers that a recipe may give; some need a package that may not be installed."""

_LOW_RANK = "projects the gradients of whole linear layers to a low rank, and an adapter has none"
_IN_BACKWARD = "changes the weights within the backward, where gradients can be neither clipped nor accumulated"
_TWO_SETS = "trains one set of weights and is measured with another; take schedule: constant with ema in its place"

REFUSED_OPTIMIZERS = {
    **dict.fromkeys(
        (
            "galore_adamw",
            "galore_adamw_8bit",
            "galore_adafactor",
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw",
            "apollo_adamw_layerwise",
        ),
        _LOW_RANK,
    ),
    **dict.fromkeys(("lomo", "adalomo"), _IN_BACKWARD),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _TWO_SETS),
    "adamw_torch_xla": "is for TPUs, on which diablo does not run",
    "adamw_torch_npu_fused": "is for NPUs, on which diablo does not run",
    "adamw_anyprecision": "is for parameters in bf16, and what is trained here is in fp32",
}
"""Transformers' other optimizers, and why a recipe may not give them."""

SCHEDULES = (
    DEFAULT_SCHEDULE,
    "cosine",
    "cosine_with_restarts",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "constant",
    "warmup_stable_decay",
)
"""Names of transformers' schedules that a recipe may give."""

_BY_MEASUREMENT = "lowers the rate by measurements of its own; take early_stopping_patience and keep: best"

REFUSED_SCHEDULES = {
    "constant_with_warmup": "is another name of constant with training.warmup_steps; write that",
    "cosine_with_min_lr": "is another name of cosine with training.min_learning_rate; write that",
    "reduce_lr_on_plateau": _BY_MEASUREMENT,
    "greedy": _BY_MEASUREMENT,
}
"""Transformers' other schedules, and why a recipe may not give them."""


def _plain(value: Any) -> Any:
    """A value of an option; text that reads as a number is one, as YAML has 1e-3 as text."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError("not plain")


UNTIL_LOADED = 1e-3
"""What stands for a learning rate that is found in the weights, until they are loaded."""

Options = dict[str, Annotated[Any, BeforeValidator(_plain)]]


class ParameterGroup(Section):
    """Trained parameters with a learning rate or a weight decay of their own."""

    modules: list[str] = Field(min_length=1, description="a list of module names")
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False, description="a number above 0")
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False, description="a number of at least 0")

    @model_validator(mode="after")
    def _differs(self) -> ParameterGroup:
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("nothing of its own")
        return self


class Optimizer(Section):
    """The optimizer and what it is told."""

    name: str = Field(
        DEFAULT_OPTIMIZER, description="muon, or the name of an optimizer of transformers, such as adamw_8bit"
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] | None = Field(
        None, min_length=2, max_length=3, description="a list of numbers from 0 to below 1"
    )
    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False, description="a number above 0")
    options: Options = Field(
        {}, description="a section of what else the optimizer takes; values are numbers, true or false, text or lists"
    )
    groups: list[ParameterGroup] = Field(
        [], description="a list of sections with modules (a list of names) and learning_rate, weight_decay or both"
    )


def _optimizer_by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Training(Section):
    """The optimisation."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        5e-4,
        description="a number above 0: the highest of the schedule; or auto, which finds one for DiaBlo in the weights",
    )
    epochs: float = Field(
        1, gt=0, allow_inf_nan=False, description="a number above 0: how often all rows are trained on"
    )
    max_steps: int | None = Field(None, ge=1, description="an integer of at least 1: steps in all; it overrides epochs")
    batch_size: int = Field(
        16, ge=1, description="an integer of at least 1: rows, or packed sequences, that a device takes at a time"
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="an integer of at least 1: batches whose gradients are added up for a step"
    )
    max_length: int = Field(
        1024, ge=2, description="an integer of at least 2: the most tokens of a row, or of a packed sequence"
    )
    packing: bool = Field(
        False, description="true or false: put several rows into one sequence, where none of them sees another"
    )
    optimizer: Annotated[Optimizer, BeforeValidator(_optimizer_by_name, json_schema_input_type=str | Optimizer)] = (
        Field(
            Optimizer(),
            description="muon, or the name of an optimizer of transformers, or a section with that as its name",
        )
    )
    schedule: str = Field(DEFAULT_SCHEDULE, description=f"one of {', '.join(SCHEDULES)}: how the learning rate moves")
    schedule_options: Options = Field(
        {}, description="a section of what else the schedule takes; values are numbers or text"
    )
    min_learning_rate: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="a number above 0: the rate at which the schedule ends"
    )
    warmup_steps: int = Field(
        0, ge=0, description="an integer of at least 0: first steps, in which the learning rate rises from 0"
    )
    weight_decay: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="a number of at least 0: how strongly weights are pulled to 0"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="a number above 0: gradients with a larger norm are clipped")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="a number from 0 to below 1: share of the target that is spread over all tokens"
    )
    neftune_noise_alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="a number above 0: the size of the noise on the embeddings"
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="a number between 0 and 1: the decay of an average of the steps, which becomes the result",
    )
    gradient_checkpointing: Checkpointing = Field(
        "none", description="none, selective or full: what the backward computes again, to save memory"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="an integer of at least 1: the held-out loss is measured every so many steps"
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="an integer of at least 1: training ends after so many measurements without a better one",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="last or best: whose parameters become the result, the last step's or the best one's",
    )
    best_by: Literal["loss", "score"] = Field(
        "loss",
        description="loss or score: whether the held-out loss or the validation score says which step is best",
    )
    save_steps: int | None = Field(None, ge=1, description="an integer of at least 1: a checkpoint every so many steps")
    save_total_limit: int = Field(2, ge=1, description="an integer of at least 1: how many checkpoints are kept")
    logging_steps: int = Field(5, ge=1, description="an integer of at least 1: the loss is logged every so many steps")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="stop or skip: whether a NaN or infinite loss stops the run, or its step is left out"
    )

    @property
    def rate(self) -> float:
        """The highest learning rate. Where it is still to be found in the weights, one to try other settings with."""
        return UNTIL_LOADED if self.learning_rate == "auto" else self.learning_rate

    @property
    def moves_by_the_rate(self) -> bool:
        """Whether a step of the optimizer moves every entry by about the learning rate, as Adam's does."""
        return any(kind in self.optimizer.name for kind in ("adam", "lion", "adafactor"))

    @property
    def depends_on_held_out(self) -> bool:
        """Whether held-out losses decide what the run ends with."""
        return self.early_stopping_patience is not None or self.keep == "best"

    def check(self) -> None:
        """Check names, and settings that do not fit together.

        Raises:
            ValueError: with the message for the user.
        """
        check_optimizer_name("training.optimizer", self.optimizer.name)
        _check_name("training.schedule", self.schedule, SCHEDULES, REFUSED_SCHEDULES)
        if self.learning_rate == "auto":
            self._check_auto()
        elif self.min_learning_rate is not None and self.min_learning_rate >= self.learning_rate:
            raise ValueError(
                f"training.min_learning_rate: found {self.min_learning_rate:g}; it must be below "
                f"training.learning_rate, which is {self.learning_rate:g}."
            )
        if self.depends_on_held_out and self.eval_steps is None:
            key = "keep: found best" if self.keep == "best" else "early_stopping_patience: found a number"
            raise ValueError(f"training.{key}, without a held-out loss to go by; set training.eval_steps.")
        if self.best_by == "score" and not self.depends_on_held_out:
            raise ValueError(
                "training.best_by: found score, and nothing goes by it; set training.keep to best, or "
                "training.early_stopping_patience, or leave it out."
            )

    def _check_auto(self) -> None:
        if not self.moves_by_the_rate:
            raise ValueError(
                f"training.learning_rate: found auto, which is known for AdamW, Lion and Adafactor, and the optimizer "
                f"is {self.optimizer.name}; give a number."
            )
        if self.min_learning_rate is not None:
            raise ValueError(
                "training.learning_rate: found auto, which is known when the weights are loaded, and "
                "training.min_learning_rate has to be below it; give numbers for both."
            )


def check_optimizer_name(key: str, name: str) -> None:
    """Check that a recipe may give an optimizer's name.

    Args:
        key: where the name stands, as the message is to call it.
        name: the name.

    Raises:
        ValueError: with the message for the user.
    """
    _check_name(key, name, OPTIMIZERS, REFUSED_OPTIMIZERS)


def _check_name(key: str, name: str, allowed: Collection[str], refused: Mapping[str, str]) -> None:
    if name in refused:
        raise ValueError(f"{key}: found {name!r}, which {refused[name]}.")
    if name not in allowed:
        raise ValueError(f"{key}: found {shortened(name)}; allowed: {', '.join(allowed)}.{did_you_mean(name, allowed)}")
