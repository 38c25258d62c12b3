"""The form of a model: what it reads and gives, by which transformers makes it and PEFT adapts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diablo.errors import UserError


@dataclass(frozen=True)
class Form:
    """A form that models have.

    Attributes:
        auto_class: the class of transformers that makes such models from their configs.
        task_type: what PEFT calls the task of such a model.
        ending: how the names of their own classes end, where that tells them apart; empty where it does not.
    """

    auto_class: str
    task_type: str
    ending: str = ""

    @property
    def has_head(self) -> bool:
        """Whether it labels or scores texts, or gives vectors of them, and writes none."""
        return self in HEADS


CAUSAL = Form("AutoModelForCausalLM", "CAUSAL_LM")
"""It goes on with a text."""
ENCODER_DECODER = Form("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")
"""It reads a prompt with an encoder, and writes an answer with a decoder."""
IMAGE_TEXT = Form("AutoModelForImageTextToText", "CAUSAL_LM")
"""It goes on with a text that has images in it."""
LABELS_TEXTS = Form("AutoModelForSequenceClassification", "SEQ_CLS", "ForSequenceClassification")
"""It says something of a whole text."""
LABELS_WORDS = Form("AutoModelForTokenClassification", "TOKEN_CLS", "ForTokenClassification")
"""It says something of each word."""
VECTORS = Form("AutoModel", "FEATURE_EXTRACTION")
"""It gives a vector for each token of a text."""

HEADS = (LABELS_TEXTS, LABELS_WORDS, VECTORS)
TASKS_OF_HEADS = tuple(form.task_type for form in HEADS)
"""What PEFT calls the tasks of models that write nothing."""


def form_of_class(name: str) -> Form | None:
    """The form with a head that the name of a model's class tells by itself; None for a class of any other form."""
    return next((form for form in HEADS if form.ending and name.endswith(form.ending)), None)


def body_class(model_type: str | None) -> str | None:
    """The name of the class of models without any head of a type; None where transformers has none."""
    from transformers.models.auto import modeling_auto

    table: Any = modeling_auto.MODEL_MAPPING_NAMES
    name = table.get(model_type)
    return name[0] if isinstance(name, (list, tuple)) else name


def form_of(config: Any) -> Form:
    """The form of the model of a config, by the class that the config names first.

    A config that names no class is taken for that of a causal language model.
    """
    from transformers.models.auto import modeling_auto

    name = named_class(getattr(config, "architectures", None))
    if (head := form_of_class(name)) is not None:
        return head
    kind = getattr(config, "model_type", None)
    has_decoder = getattr(config, "is_encoder_decoder", False)
    if name and name == body_class(kind) and not has_decoder:
        return VECTORS
    rewriting: Any = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    # Checkpoints such as facebook/bart-base name the body, and old ones of T5 a class that is no more. A body that is
    # an encoder alone has no decoder to write with.
    if has_decoder and kind in rewriting and not name.endswith("EncoderModel"):
        return ENCODER_DECODER
    seeing: Any = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return IMAGE_TEXT if name and seeing.get(kind) == name else CAUSAL


def check_form(config: Any) -> None:
    """Check that a model has one form: an encoder-decoder that sees images has two, and is neither trained nor asked.

    Raises:
        UserError: it is such a model.
    """
    from transformers.models.auto import modeling_auto

    seeing: Any = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False) and kind in seeing and not form_of(config).has_head:
        raise UserError(
            f"model: a {kind!r} model is an encoder-decoder that sees images, and models of both kinds at once are not "
            "supported; give an encoder-decoder that reads text alone, or a causal language model that sees images."
        )


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the model of a config."""
    import transformers

    return getattr(transformers, form_of(config).auto_class)


def named_class(architectures: Any) -> str:
    """The first class that a config's ``architectures`` name; empty where they name none, and for what is no list."""
    return str(architectures[0]) if isinstance(architectures, (list, tuple)) and architectures else ""
