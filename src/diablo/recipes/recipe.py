"""The recipe: everything that a training run is told, typed and checked before anything is loaded.

A recipe is a short YAML file. Settings are grouped into sections; on the command line any of them can be overridden as
``section.key=value``. Each field's description says what is allowed, and is what an error message quotes.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from diablo.errors import UserError, shortened
from diablo.models.names import check_name
from diablo.recipes.data import Data
from diablo.recipes.methods import METHODS, DiabloMethod, Method, PeftMethod
from diablo.recipes.new_tokens import NewTokens, check_new_tokens, check_trains_tokens
from diablo.recipes.objectives import OBJECTIVES, Objective, SupervisedObjective
from diablo.recipes.publishing import OptionalPush
from diablo.recipes.rewarding import check_group_method, check_group_training, check_rewards
from diablo.recipes.section import ChatTemplateText, Names, Section, explained
from diablo.recipes.speed import ATTENTIONS, Attention, Speed
from diablo.recipes.starting import check_adapter, method_of
from diablo.recipes.tracking import Tracking
from diablo.recipes.training import Training

_MAX_NEW_TOKENS = 256


class Evaluation(Section):
    """Scoring of tasks before and after training, by generation or by likelihood."""

    tasks: list[str] | None = Field(
        None, min_length=1, description="a list of task names, scored in place of the one that is trained on"
    )
    protocol: Literal["strict", "paper"] = Field("strict", description="strict or paper: how answers are read")
    likelihood: bool = Field(
        False, description="true or false: score choices by their likelihood, and generate nothing"
    )
    samples: int | None = Field(None, ge=1, description="an integer of at least 1: completions of each problem")
    temperature: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="a number of at least 0: the temperature of the sampling; 0 takes the likeliest token",
    )
    allow_code_execution: bool = Field(
        False, description="true or false: whether tasks may run code that the model wrote"
    )

    before: bool = Field(True, description="true or false: score the model before training")
    after: bool = Field(True, description="true or false: score the model after training")
    batch_size: int = Field(48, ge=1, description="an integer of at least 1: prompts generated together")
    limit: int | None = Field(None, ge=1, description="an integer of at least 1: only so many test problems")
    examples: int = Field(3, ge=0, description="an integer of at least 0: answers printed before and after")
    general: str | None = Field(
        None, description="builtin, or a .txt or .jsonl file of general text whose loss before and after is recorded"
    )


class Recipe(Section):
    """A training run. See docs/recipes.md for every key."""

    model: str = Field(min_length=1, description="builtin:smollm2-135m, a folder, or the id of a model on the hub")
    adapter: Path | None = Field(
        None, description="a run, an adapter's folder or a checkpoint that training goes on from"
    )
    objective: Objective = Field(
        default=SupervisedObjective(),
        description=f"one of {', '.join(OBJECTIVES)}, or a section with that as its name: what is trained for",
    )
    task: Names = Field([], description="the name of a task, or a list of names; leave it out to train on data.train")
    data: Data = Field(default=Data(), description="a section: your own files, and how rows are read")
    chat: bool = Field(False, description="true or false: use the tokenizer's chat template")
    chat_template: ChatTemplateText = Field(
        None, description="a file of Jinja or the Jinja itself, in place of the tokenizer's chat template"
    )
    new_tokens: NewTokens = Field(
        None, description="a list of texts that become tokens of their own, or of sections with text and special"
    )
    method: Method = Field(
        default=DiabloMethod(),
        description=f"one of {', '.join(METHODS)}, or a section with that as its name; peft means any method of PEFT",
    )
    training: Training = Field(default=Training(), description="a section: how the model is trained")
    tracking: Tracking = Field(default=Tracking(), description="a section: the trackers that are told of the run")
    evaluation: Evaluation = Field(default=Evaluation(), description="a section: what is scored, and how")
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="nf4 or int8: how bitsandbytes quantizes the frozen weights while they are loaded"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto, bf16, fp16 or fp32: what is computed in; auto is bf16 where the hardware has it"
    )
    attention: Attention = Field(
        "auto",
        description=(
            f"{', '.join(ATTENTIONS[:-1])} or {ATTENTIONS[-1]}, or a kernel of the hub, such as "
            "kernels-community/flash-attn2: what computes the attention"
        ),
    )
    speed: Speed = Field(default=Speed(), description="a section: what makes a step faster or smaller")
    seed: int = Field(0, ge=0, description="an integer of at least 0: the same seed makes the same run")
    output: Path = Field(description="a folder to write to: a new one, an empty one, or a run's")
    merge: bool = Field(False, description="true or false: also write the merged model")
    push_to_hub: OptionalPush = Field(
        None, description="OWNER/NAME, or a section with that as its repo: where the result is uploaded to on the hub"
    )

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

    @model_validator(mode="before")
    @classmethod
    def _method_of_adapter(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or not isinstance(settings.get("adapter"), str | Path):
            return settings
        with explained():
            check_adapter(settings["adapter"])
            own = method_of(settings["adapter"])
        return {"method": own, **settings}

    @model_validator(mode="before")
    @classmethod
    def _long_texts(cls, settings: Any) -> Any:
        # Who uses such a model has it cut texts, and so does training where nothing else is said.
        if not isinstance(settings, dict) or not isinstance(data := settings.get("data"), dict):
            return settings
        objective = settings.get("objective")
        name = objective.get("name") if isinstance(objective, dict) else objective
        return {**settings, "data": {"on_long": "truncate", **data}} if name == "embedding" else settings

    @model_validator(mode="after")
    def _goes_on_from_adapter(self) -> Recipe:
        if self.adapter is None:
            return self
        # The recipe of a run that has gone on from one names both.
        if self.method != TypeAdapter(Method).validate_python(method_of(self.adapter)):
            raise ValueError(
                f"method: found {self.method.title} with settings of its own, and adapter {str(self.adapter)!r} is "
                "trained as it is; leave method out."
            )
        return self

    @model_validator(mode="after")
    @explained()
    def _tokens_fit(self) -> Recipe:
        if self.new_tokens is None:
            return self
        if self.adapter is not None:
            raise UserError(
                f"new_tokens: found beside adapter {str(self.adapter)!r}, which is trained as it is, with the tokens "
                "that it has; leave new_tokens out, or merge the adapter and give the merged model as model."
            )
        check_new_tokens(self.new_tokens)
        check_trains_tokens([self.method])
        return self

    @model_validator(mode="after")
    def _name_of_model(self) -> Recipe:
        try:
            check_name(self.model)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _source_of_rows(self) -> Recipe:
        if not self.task and self.data.train is None:
            raise ValueError("task: nothing to train on; give task (such as mawps) or data.train (a file).")
        if self.task and self.objective.rows not in ("completions", "prompts"):
            makes = "" if self.objective.head else " diablo pairs makes some from a model's own answers."
            raise ValueError(
                f"task: found {', '.join(self.task)}, whose rows have one completion each, and objective "
                f"{self.objective.name} needs others; give them with data.train.{makes}"
            )
        if self.task and (self.data.train or self.data.eval or self.data.columns):
            name = ", ".join(self.task)
            raise ValueError(f"data: task {name!r} brings its own rows; give either task or data.train, not both.")
        try:
            self.data.check(self.objective.rows)
        except UserError as error:
            raise ValueError(str(error)) from None
        general = self.evaluation.general
        if general not in (None, "builtin") and not (Path(general).is_file() and general.endswith((".txt", ".jsonl"))):
            raise ValueError(f"evaluation.general: there is no file {general!r} that ends in .txt or .jsonl.")
        if self.chat_template is not None and not self.chat:
            raise ValueError("chat_template: found one with chat: false, which has no use for it; set chat to true.")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output: {str(self.output)!r} is a file; give a folder.")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Recipe:
        if self.objective.name == "sft":
            return self
        default = Training()
        for key in ("packing", "label_smoothing"):
            if (found := getattr(self.training, key)) != getattr(default, key):
                raise ValueError(
                    f"training.{key}: found {str(found).lower()}, which is for objective: sft; leave it out with "
                    f"{self.objective.name}."
                )
        dropout = getattr(self.method, "dropout", 0.0)
        # An adapter that was trained with some goes on without.
        if self.objective.has_reference and dropout and self.adapter is None:
            raise ValueError(
                f"method.dropout: found {dropout:g}, and {self.objective.name} compares the model with what it was "
                "before training, which has no dropout; leave it out."
            )
        if self.objective.name == "kto" and self.objective.loss == "kto" and self.training.batch_size == 1:
            raise ValueError(
                "training.batch_size: found 1, and kto compares the rows of a batch; take 2 or more, or "
                "objective.loss: apo_zero_unpaired."
            )
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> Recipe:
        name, is_labelled = self.objective.name, self.objective.rows in ("labelled", "numbered", "tagged")
        is_compared = self.objective.rows == "texts"
        if self.data.on_long == "truncate" and not (is_labelled or is_compared):
            raise ValueError(
                f"data.on_long: found truncate, and with objective {name} the end of a row is what is learned; set "
                "drop or error."
            )
        if self.objective.head is None:
            return self
        generating = {
            "new_tokens": self.new_tokens,
            "evaluation.tasks": self.evaluation.tasks,
            "evaluation.general": self.evaluation.general,
            "speed.liger": self.speed.liger,
            "speed.activation_offloading": self.speed.activation_offloading,
            "chat": self.chat and (is_labelled or is_compared),
        }
        if given := [key for key, value in generating.items() if value]:
            raise ValueError(
                f"{given[0]}: found {shortened(generating[given[0]])}, which objective {name} has no use for; leave it "
                "out."
            )
        if is_compared and find_spec("sentence_transformers") is None:
            raise ValueError(
                "objective: found embedding, which needs sentence-transformers; install it with: pip install "
                "'diablo-peft[embeddings]'."
            )
        if isinstance(self.method, PeftMethod):
            from diablo.recipes.peft_methods import check_head

            check_head(self.method.type, name)
        return self

    @model_validator(mode="after")
    def _output_holds_nothing_that_is_read(self) -> Recipe:
        # A run deletes what an earlier run has left in its folder.
        data, output = self.data, self.output.resolve()
        read: dict[str, list[str | Path | None]] = {
            "model": [self.model],
            "adapter": [self.adapter],
            "data.train": [source.path for source in data.train or ()],
            "data.eval": [source.path for source in data.eval_sources],
            "data.folder": [data.folder],
            "evaluation.general": [self.evaluation.general],
        }
        for key, paths in read.items():
            for path in (Path(path) for path in paths if path is not None):
                if path.exists() and output in (path.resolve(), *path.resolve().parents):
                    raise ValueError(
                        f"output: {str(self.output)!r} holds {str(path)!r}, which {key} names, and a run clears its "
                        "folder; give another folder."
                    )
        return self

    @model_validator(mode="after")
    def _rate_is_known(self) -> Recipe:
        if self.training.learning_rate == "auto" and not isinstance(self.method, DiabloMethod):
            raise ValueError(
                f"training.learning_rate: found auto, which is known for DiaBlo, and the method is "
                f"{self.method.title}; give a number, such as 2e-4."
            )
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
            for name in self._run_for_scores:
                check_code_execution(name, settings.allow_code_execution)
            if self.data.folder is not None:
                check_folder("data.folder", self.data.folder, [*self.task, *self.scored])
        except UserError as error:
            raise ValueError(str(error)) from None
        for key, names in (("task", self.task), ("evaluation.tasks", tasks)):
            if len(set(names)) < len(names):
                raise ValueError(f"{key}: found {shortened(names)}; name each task once.")
        if settings.likelihood and (settings.samples is not None or settings.temperature is not None):
            raise ValueError(
                "evaluation.likelihood: found true, where nothing is generated; leave out evaluation.samples and "
                "evaluation.temperature."
            )
        if self.data.held_out == "validation" and self.data.validation_rows is None:
            raise ValueError("data.held_out: found validation; say how many rows with data.validation_rows.")
        if self.training.eval_steps and not self.has_held_out:
            raise ValueError("training.eval_steps: there are no held-out rows; give data.eval, or leave it out.")
        self.training.check()
        has_score = bool(self.objective.scores) or (self.task and self.data.held_out == "validation")
        if self.training.best_by == "score" and not has_score:
            raise ValueError(
                "training.best_by: found score, which is that of a task on rows that are kept out of training; give a "
                "task, data.validation_rows and data.held_out: validation, or leave it out."
            )
        self.tracking.check()
        if self.push_to_hub is not None:
            self.push_to_hub.check(self.model, is_adapter=self.method.name != "full")
        return self

    @model_validator(mode="after")
    @explained()
    def _rewards_fit(self) -> Recipe:
        if self.objective.name == "grpo":
            check_rewards(self.objective, self.task, self.max_new_tokens)
            check_group_training(self.objective, self.training, self.speed, self.max_new_tokens)
            check_group_method(self.objective, self.method, goes_on=self.adapter is not None)
        return self

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of a completion that is generated in training; 0 where none is."""
        from diablo.tasks import TASKS

        if self.objective.name != "grpo":
            return 0
        own = max((TASKS[name].max_new_tokens for name in self.task), default=_MAX_NEW_TOKENS)
        return self.objective.max_new_tokens or own

    @property
    def _run_for_scores(self) -> list[str]:
        """Names of the tasks whose answers are read in the course of a run."""
        judged = self.training.best_by == "score" or (self.objective.name == "grpo" and self.objective.by_task)
        in_training = self.task if judged else []
        return [*in_training, *(self.scored if self.evaluation.before or self.evaluation.after else [])]
