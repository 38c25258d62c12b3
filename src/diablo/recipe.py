"""The recipe: everything that a training run is told, typed and checked before anything is loaded.

A recipe is a short YAML file. Settings are grouped into sections; on the command line any of them can be overridden as
``section.key=value``. Each field's description says what is allowed, and is what an error message quotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from diablo.errors import UserError, did_you_mean


def _names_or_expression(value: Any) -> Any:
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError("not names")


def _layer_indices(value: Any) -> Any:
    indices = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        return value
    raise ValueError("not indices")


# One check instead of a union of types: a fault is reported at the key, not at each type that the union offers.
ModuleNames = Annotated[Any, BeforeValidator(_names_or_expression)]
LayerIndices = Annotated[Any, BeforeValidator(_layer_indices)]


def _task_names(value: Any) -> Any:
    names = [value] if isinstance(value, str) else [] if value is None else value
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    raise ValueError("not names")


TaskNames = Annotated[Any, BeforeValidator(_task_names)]


class Section(BaseModel):
    """A group of settings; a key that it does not have is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterMethod(Section):
    """What the methods that adapt some modules have in common."""

    name: str
    target_modules: ModuleNames = Field(None, description="a list of module names, a regular expression or all-linear")
    exclude_modules: ModuleNames = Field(None, description="a list of module names or a regular expression")
    layers_to_transform: LayerIndices = Field(None, description="an integer or a list of integers")
    dropout: float = Field(0.0, ge=0, lt=1, description="a number from 0 to below 1")


class DiabloMethod(AdapterMethod):
    """DiaBlo: train the diagonal blocks of the target matrices."""

    name: Literal["diablo"] = "diablo"
    num_blocks: int = Field(64, ge=1, description="an integer from 1 to the smaller dimension of every target")
    block_pattern: dict[str, int] = Field({}, description="module names or expressions to num_blocks")


class LoraMethod(AdapterMethod):
    """LoRA and its kin, from PEFT, on the same target modules as DiaBlo where none are given.

    rsLoRA divides alpha by the root of the rank, DoRA trains the columns' norms apart from their directions, and PiSSA
    starts from the weight's largest singular values, which it takes out of the frozen weight.
    """

    name: Literal["lora", "rslora", "dora", "pissa"]
    r: int = Field(16, ge=1, description="an integer of at least 1")
    lora_alpha: int | None = Field(None, ge=1, description="an integer of at least 1")

    @property
    def alpha(self) -> int:
        """The alpha that is used: where none is given, the one that makes the method's usual scale.

        The scale is 2 for LoRA and DoRA (alpha 2r), and 1 for PiSSA, whose factors are the weight's own (alpha r, as
        in its paper, arXiv 2404.02948). rsLoRA's alpha does not depend on the rank (arXiv 2312.03732): 16.
        """
        return self.lora_alpha or {"rslora": 16, "pissa": self.r}.get(self.name, 2 * self.r)


class MissMethod(AdapterMethod):
    """MiSS, from PEFT: one trained matrix that shards of the weight share, on the same targets as DiaBlo's."""

    name: Literal["miss"]
    r: int = Field(16, ge=1, description="an integer from 1 to the smallest input of a target")


class FullMethod(Section):
    """Full fine-tuning: every weight is trained, in fp32 under autocast."""

    name: Literal["full"]


METHODS: dict[str, type[Section]] = {
    "diablo": DiabloMethod,
    "lora": LoraMethod,
    "rslora": LoraMethod,
    "dora": LoraMethod,
    "pissa": LoraMethod,
    "miss": MissMethod,
    "full": FullMethod,
}


def _method_by_name(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "diablo", **value} if isinstance(value, dict) else value


AnyMethod = DiabloMethod | LoraMethod | MissMethod | FullMethod
Method = Annotated[AnyMethod, Field(discriminator="name"), BeforeValidator(_method_by_name)]


class Data(Section):
    """The user's own files or folder of datasets, and how rows are read."""

    train: Path | None = Field(None, description="a .jsonl, .json or .parquet file")
    eval: Path | None = Field(None, description="a .jsonl, .json or .parquet file")
    folder: Path | None = Field(None, description="a folder of the tasks' datasets, read in place of the hub")
    on_malformed: Literal["error", "skip"] = Field("error", description="error or skip")
    on_long: Literal["error", "drop"] = Field("drop", description="error or drop, for rows over training.max_length")
    limit: int | None = Field(None, ge=1, description="an integer of at least 1: only so many training rows")
    validation_rows: int | None = Field(
        None, ge=1, description="an integer of at least 1: so many of the training rows are kept out of training"
    )
    validation_seed: int = Field(0, ge=0, description="an integer of at least 0: chooses the validation rows")
    held_out: Literal["test", "validation"] = Field(
        "test", description="test or validation: the rows that the held-out loss is of"
    )


Checkpointing = Literal["none", "selective", "full"]
"""What a layer keeps for its backward: all that autograd wants; what costs much to compute; or its input alone."""


class Training(Section):
    """The optimisation."""

    learning_rate: float = Field(5e-4, gt=0, allow_inf_nan=False, description="a number above 0")
    epochs: float = Field(1, gt=0, allow_inf_nan=False, description="a number above 0")
    max_steps: int | None = Field(None, ge=1, description="an integer of at least 1; it overrides epochs")
    batch_size: int = Field(16, ge=1, description="an integer of at least 1: rows per device and step")
    gradient_accumulation: int = Field(1, ge=1, description="an integer of at least 1")
    max_length: int = Field(1024, ge=2, description="an integer of at least 2: tokens per row")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="linear, cosine or constant")
    warmup_steps: int = Field(0, ge=0, description="an integer of at least 0")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="a number of at least 0")
    max_grad_norm: float = Field(1.0, gt=0, description="a number above 0")
    gradient_checkpointing: Checkpointing = Field(
        "none", description="none, selective or full: what is computed again in the backward in place of being kept"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="an integer of at least 1: held-out loss every so many steps"
    )
    save_steps: int | None = Field(None, ge=1, description="an integer of at least 1: a checkpoint every so many steps")
    save_total_limit: int = Field(2, ge=1, description="an integer of at least 1: how many checkpoints are kept")
    logging_steps: int = Field(5, ge=1, description="an integer of at least 1")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="stop or skip: what a NaN or infinite loss does to the run, or to its step"
    )


class Evaluation(Section):
    """Scoring of tasks before and after training, by generation or by likelihood."""

    tasks: list[str] | None = Field(
        None, min_length=1, description="a list of task names, scored in place of the one that is trained on"
    )
    protocol: Literal["strict", "paper"] = Field("strict", description="strict or paper: how answers are read")
    likelihood: bool = Field(
        False, description="true or false: whether the likeliest choice is the answer, and nothing is generated"
    )
    samples: int | None = Field(None, ge=1, description="an integer of at least 1: completions of each problem")
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False, description="a number of at least 0")
    allow_code_execution: bool = Field(
        False, description="true or false: whether tasks may run code that the model wrote"
    )

    before: bool = Field(True, description="true or false")
    after: bool = Field(True, description="true or false")
    batch_size: int = Field(48, ge=1, description="an integer of at least 1")
    limit: int | None = Field(None, ge=1, description="an integer of at least 1: only so many test problems")
    examples: int = Field(3, ge=0, description="an integer of at least 0: answers printed before and after")
    general: str | None = Field(
        None, description="builtin, or a .txt or .jsonl file of general text whose loss before and after is recorded"
    )


class Recipe(Section):
    """A training run. See docs/recipes.md for every key."""

    model: str = Field(min_length=1, description="builtin:smollm2-135m, a folder, or the id of a model on the hub")
    task: TaskNames = Field(
        [], description="the name of a task, or a list of names; leave it out to train on data.train"
    )
    data: Data = Field(default=Data(), description="a section")
    chat: bool = Field(False, description="true or false: use the tokenizer's chat template")
    method: Method = Field(
        default=DiabloMethod(), description=f"one of {', '.join(METHODS)}, or a section with that as its name"
    )
    training: Training = Field(default=Training(), description="a section")
    evaluation: Evaluation = Field(default=Evaluation(), description="a section")
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="nf4 or int8: how bitsandbytes quantizes the frozen weights while they are loaded"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="auto, bf16, fp16 or fp32")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="auto, eager, sdpa, flash_attention_2 or flex_attention"
    )
    seed: int = Field(0, ge=0, description="an integer of at least 0")
    output: Path = Field(description="a folder to write to")
    merge: bool = Field(False, description="true or false: also write the merged model")

    @property
    def scored(self) -> list[str]:
        """Names of the tasks that are scored: those that are asked for, or else those that are trained on."""
        from diablo.tasks import TASKS

        if self.evaluation.tasks is not None:
            return self.evaluation.tasks
        return [name for name in self.task if "test" in TASKS[name].splits]

    @property
    def has_held_out(self) -> bool:
        """Whether there are rows that the held-out loss can be of."""
        from diablo.tasks import TASKS

        if self.data.held_out == "validation":
            return True
        return self.data.eval is not None or any("test" in TASKS[name].splits for name in self.task)

    @model_validator(mode="after")
    def _source_of_rows(self) -> Recipe:
        if not self.task and self.data.train is None:
            raise ValueError("task: nothing to train on; give task (such as mawps) or data.train (a file).")
        if self.task and (self.data.train or self.data.eval):
            name = ", ".join(self.task)
            raise ValueError(f"data: task {name!r} brings its own rows; give either task or data.train, not both.")
        for key in ("train", "eval"):
            path: Path | None = getattr(self.data, key)
            if path is not None and not path.is_file():
                raise ValueError(f"data.{key}: there is no file {str(path)!r}; paths count from the current folder.")
        general = self.evaluation.general
        if general not in (None, "builtin") and not (Path(general).is_file() and general.endswith((".txt", ".jsonl"))):
            raise ValueError(f"evaluation.general: there is no file {general!r} that ends in .txt or .jsonl.")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output: {str(self.output)!r} is a file; give a folder.")
        return self

    @model_validator(mode="after")
    def _tasks(self) -> Recipe:
        from diablo.tasks import check_code_execution, check_folder, check_split

        tasks, settings = self.evaluation.tasks or [], self.evaluation
        try:
            for name in self.task:
                check_split("task", name, "train")
            for name in tasks:
                check_split("evaluation.tasks", name, "test")
            for name in self.scored if settings.before or settings.after else []:
                check_code_execution(name, settings.allow_code_execution)
            if self.data.folder is not None:
                check_folder("data.folder", self.data.folder, [*self.task, *self.scored])
        except UserError as error:
            raise ValueError(str(error)) from None
        for key, names in (("task", self.task), ("evaluation.tasks", tasks)):
            if len(set(names)) < len(names):
                raise ValueError(f"{key}: found {_shortened(names)}; name each task once.")
        if settings.likelihood and (settings.samples is not None or settings.temperature is not None):
            raise ValueError(
                "evaluation.likelihood: found true, where nothing is generated; leave out evaluation.samples and "
                "evaluation.temperature."
            )
        if self.data.held_out == "validation" and self.data.validation_rows is None:
            raise ValueError("data.held_out: found validation; say how many rows with data.validation_rows.")
        if self.training.eval_steps and not self.has_held_out:
            raise ValueError("training.eval_steps: there are no held-out rows; give data.eval, or leave it out.")
        return self


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, or the name of a recipe that diablo ships, such as ``quickstart``.
        overrides: ``section.key=value`` strings, applied in order; values are YAML.

    Raises:
        UserError: with one line for each fault, naming the key, what was found and what is allowed.
    """
    settings = _read_yaml(source)
    for override in overrides:
        _apply_override(settings, override)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_explain(fault) for fault in error.errors()))) from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name; those of the paper's tables are called ``paper/...``."""
    folder = Path(str(resources.files("diablo") / "recipes"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


# A date with a month of 13 or a number of 5000 digits is a bare ValueError, deep nesting a RecursionError.
_YAML_FAULTS = (yaml.YAMLError, ValueError, RecursionError)


def _read_yaml(source: str | Path) -> dict[str, Any]:
    shipped = shipped_recipes()
    path = shipped.get(str(source), Path(source))
    if not path.is_file():
        general = ", ".join(name for name in shipped if "/" not in name)
        raise UserError(
            f"There is no recipe file {str(source)!r}; give a YAML file, {general}, or one of the paper's, which "
            f"docs/paper-recipes.md lists."
            f"{did_you_mean(str(source), shipped)}"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 (byte {error.start} cannot be read).") from None
    except _YAML_FAULTS as error:
        where = f" in line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise UserError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold settings as 'key: value' lines, found {type(settings).__name__}.")
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.lstrip("-")
    if not equals or not key:
        raise UserError(f"The override {override!r} must look like section.key=value, for example training.epochs=2.")
    try:
        value = yaml.safe_load(text)
    except _YAML_FAULTS:
        raise UserError(f"{key}: {_shortened(text)} is not a valid YAML value; quote it.") from None
    *sections, last = key.split(".")
    for name in sections:
        # `method: lora` is short for `method: {name: lora}`.
        inner = settings.get(name)
        if not (inner is None or isinstance(inner, (str, dict))):
            raise UserError(f"{name}: found {_shortened(inner)}; it is no section that {key} could be set in.")
        settings[name] = inner = {"name": inner} if isinstance(inner, str) else dict(inner or {})
        settings = inner
    if last == "method" and isinstance(settings.get(last), dict) and isinstance(value, str):
        # The options of the method that is replaced mean nothing to another one.
        value = settings[last] if settings[last].get("name", "diablo") == value else value
    settings[last] = value


_SECTIONS: dict[int | str, type[Section]] = {"data": Data, "training": Training, "evaluation": Evaluation}


def _explain(fault: Any) -> str:
    """One line about one of pydantic's findings."""
    if not fault["loc"]:
        return str(fault["msg"]).removeprefix("Value error, ")
    owner, path = _locate(fault["loc"])
    key, last = ".".join(path), path[-1]
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        allowed = list(owner.model_fields)
        return f"{key}: unknown key; allowed: {', '.join(allowed)}.{did_you_mean(last, allowed)}"
    description = owner.model_fields[last].description
    if fault["type"] == "missing":
        return f"{key}: missing; give {description}."
    return f"{key}: found {_shortened(fault['input'])}; allowed: {description}."


def _locate(location: tuple[int | str, ...]) -> tuple[type[Section], list[str]]:
    """The section that a finding is about, and its key as the user wrote it."""
    owner: type[Section] = Recipe
    inner: type[Section] | None = Recipe
    path: list[str] = []
    parts = iter(location)
    for part in parts:
        if inner is None:
            break  # inside a value, such as the second name of a list
        owner = inner
        path.append(str(part))
        inner = _SECTIONS.get(part)
        if part == "method":
            # pydantic names the kind of method next, which is no key.
            inner = METHODS.get(str(next(parts, None)))
    return owner, path


def _shortened(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
