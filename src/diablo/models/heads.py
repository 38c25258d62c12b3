"""Heads: what a model has in place of its output layer, where it labels or scores a text, or gives its vector."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diablo.errors import UserError
from diablo.models import forms

HeadKind = Literal["classification", "regression", "reward", "token_classification", "embedding"]

_PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}
_SEVERAL = "multi_label_classification"
_APART = ("token_classification", "embedding")
"""Kinds of which a model has nothing that others could go on with."""
MODULES = "modules.json"
"""The file by which sentence-transformers knows its models."""
HEADS = ("score", "classifier", "pooler", "head", "pre_classifier", "classification_head", "dense", "summary")
"""Names of modules that are a head, or a part of one, in models of transformers."""


@dataclass(frozen=True)
class Head:
    """The head of a model.

    Attributes:
        kind: what it says of a text: a label, a number, a score, a label for each word, or a vector. A vector is made
            of those of the tokens, and the model itself has no module for that.
        labels: the labels in their order; none where it says a number.
        several: whether a text may have several labels, or none.
    """

    kind: HeadKind
    labels: tuple[str, ...] = ()
    several: bool = False

    @property
    def size(self) -> int:
        """The numbers that it gives for a text, or for each of its tokens."""
        return len(self.labels) or 1

    @classmethod
    def of(cls, config: Any) -> Head | None:
        """The head that a model's config names; None where it is that of a language model, or of another kind."""
        form = forms.form_of(config)
        if form == forms.VECTORS:
            return cls("embedding")
        if not form.has_head:
            return None
        names: dict[int, str] = {int(index): str(name) for index, name in config.id2label.items()}
        labels = tuple(names[index] for index in sorted(names))
        problem = getattr(config, "problem_type", None)
        if form == forms.LABELS_WORDS:
            return cls("token_classification", labels)
        if problem == "regression" or len(labels) == 1:
            return cls("regression" if problem == "regression" else "reward")
        return cls("classification", labels, problem == _SEVERAL)

    def is_as(self, other: Head | None) -> bool:
        """Whether another head says the same, so that its weights can be gone on with."""
        if other is None or any((self.kind == kind) != (other.kind == kind) for kind in _APART):
            return False
        return self.several == other.several and self.labels == other.labels

    def put_into(self, config: Any, pad_token_id: int | None) -> None:
        """Write the head into the config of a model that is to have it.

        Args:
            config: the config; it is changed.
            pad_token_id: the padding token, by which a decoder finds the last token of a text.

        Raises:
            UserError: models of this type have no such head.
        """
        from transformers.models.auto import modeling_auto

        if self.kind == "embedding":
            name = forms.body_class(config.model_type)
            if name is None or getattr(config, "is_encoder_decoder", False):
                raise UserError(
                    f"model: objective embedding takes an encoder or a decoder, and a {config.model_type!r} model is "
                    "neither; give another model."
                )
            config.architectures = [name]
            config.get_text_config().pad_token_id = pad_token_id
            return
        of_words = self.kind == "token_classification"
        table: Any = (
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
            if of_words
            else modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        )
        if config.model_type not in table:
            what = "words" if of_words else "texts"
            raise UserError(
                f"model: transformers has no {config.model_type!r} model that labels {what}, which objective "
                f"{self.kind} needs; give another model."
            )
        config.architectures = [table[config.model_type]]
        labels = self.labels or ("LABEL_0",)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = _SEVERAL if self.several else _PROBLEMS.get(self.kind)
        config.get_text_config().pad_token_id = pad_token_id


def said(outputs: Any) -> Any:
    """What a model has made of tokens, of its outputs: logits, or, where it has none, a vector for each token."""
    logits = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits


def head_modules(model: Any) -> list[str]:
    """The modules of a model with a head that are trained whole, by the last part of their names.

    They are all modules outside the body, and the body's pooler, which most checkpoints have no weights of.
    """
    if forms.form_of(model.config) == forms.VECTORS:
        return []
    body = getattr(model, model.base_model_prefix, None)
    outside = [
        name for name, part in model.named_children() if part is not body and any(True for _ in part.parameters())
    ]
    has_pooler = body is not None and getattr(body, "pooler", None) is not None
    return [*outside, *(["pooler"] if has_pooler else [])]


def head_paths(model: Any) -> list[str]:
    """The same modules by their whole names in the model."""
    prefix = model.base_model_prefix
    return [f"{prefix}.{name}" if name == "pooler" else name for name in head_modules(model)]


def head_size(model: Any) -> int:
    """How many parameters the modules of a head have that are trained whole."""
    return sum(parameter.numel() for path in head_paths(model) for parameter in model.get_submodule(path).parameters())


def initialize(model: Any, names: Collection[str], seed: int) -> None:
    """Give parameters of a head their first values, which depend on the seed alone.

    Matrices are normally distributed, as widely as the config says; biases are 0 and norms 1.

    Args:
        model: the model, with its weights.
        names: the names of the parameters.
        seed: the run's seed.
    """
    import torch

    deviation = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(names):
            parameter = parameters[name]
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def output_parameters(model: Any, head: Head) -> list[str]:
    """The names of the parameters that give the numbers of a head, a row for each label; none of vectors."""
    if head.kind == "embedding":
        return []
    body = f"{model.base_model_prefix}."
    return [
        name
        for name, parameter in model.named_parameters()
        if not name.startswith(body) and parameter.shape[0] == head.size
    ]


def has_head(path: str | Path) -> bool:
    """Whether a folder holds a model, an adapter or a run that writes no text. No library is imported."""
    if gives_vectors(path):
        return True
    for folder in _folders(path):
        if _read(folder / "adapter_config.json").get("task_type") in forms.TASKS_OF_HEADS:
            return True
        if forms.form_of_class(forms.named_class(_read(folder / "config.json").get("architectures"))) is not None:
            return True
    return False


def gives_vectors(path: str | Path) -> bool:
    """Whether a folder holds a model, an adapter or a run that gives vectors of texts. No library is imported."""
    return any((folder / MODULES).is_file() for folder in _folders(path))


def check_writes(path: str | Path, verb: str) -> None:
    """Check that a model writes text.

    Raises:
        UserError: it labels or scores texts, or gives vectors of them.
    """
    if gives_vectors(path):
        raise UserError(
            f"model: {str(path)!r} gives vectors of texts and writes none, so that diablo {verb} has no use for it; "
            f"ask it with: diablo embed {path} TEXT"
        )
    if has_head(path):
        raise UserError(
            f"model: {str(path)!r} labels or scores texts and writes none, so that diablo {verb} has no use for it; "
            f"ask it with: diablo classify {path} TEXT"
        )


def labels_of(adapter: Path) -> tuple[str, ...]:
    """The labels of an adapter with a head, as its folder's config names them; none where it does not."""
    names = _read(adapter / "config.json").get("id2label")
    if not isinstance(names, dict) or not all(key.isdecimal() for key in names):
        return ()
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _folders(path: str | Path) -> tuple[Path, ...]:
    """Where the files of a model, of an adapter or of a run may lie."""
    return Path(path), Path(path) / "adapter", Path(path) / "model"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
