"""What makes one vector of those of a text's tokens: the modules behind a model, as sentence-transformers has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from diablo.errors import UserError, first_line, shortened
from diablo.models.heads import MODULES
from diablo.models.loading import longest_text, resolve_model
from diablo.records.results import write_json

_LENGTH, _SETTINGS = "sentence_bert_config.json", "config_sentence_transformers.json"
_BEHIND = ("Pooling", "Normalize", "Dense", "LayerNorm")
"""The modules of sentence-transformers that may stand behind the model."""


@dataclass(frozen=True)
class Vectors:
    """How texts become vectors.

    Attributes:
        modules: what stands behind the model, in order: modules of sentence-transformers, each with its folder. Their
            weights, if they have any, are not trained.
        most: the most tokens of a text; the end of a longer one is cut off.
        prompts: what is put before texts, by what they are: ``query``, ``document``, and others that the model names.
        default_prompt: the prompt of texts that are neither, by its name; None where they have none.
        is_own: whether the model itself says all this, and nothing is chosen here.
    """

    modules: tuple[tuple[str, Any], ...]
    most: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    is_own: bool = False

    @property
    def size(self) -> int:
        """The numbers of a vector."""
        return next(
            module.get_embedding_dimension()
            for _, module in reversed(self.modules)
            if hasattr(module, "get_embedding_dimension")
        )

    def prompt(self, name: str | None) -> str:
        """What is put before a text.

        Args:
            name: ``query`` or ``document``; None for a text that is neither.
        """
        own = self.prompts.get(name) if name is not None else None
        if own is None and self.default_prompt is not None:
            own = self.prompts.get(self.default_prompt)
        return own or ""

    def told(self, query: str | None, document: str | None, most: int) -> Vectors:
        """The same with what a recipe says.

        Args:
            query: what is put before anchors; the model's own where None.
            document: the same of the other texts.
            most: the most tokens of a text, where the model reads more.
        """
        given = {"query": query, "document": document}
        prompts = {**self.prompts, **{name: text for name, text in given.items() if text is not None}}
        return replace(self, prompts=prompts, most=min(self.most, most))

    def of_tokens(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The vectors of texts, of those of their tokens.

        Args:
            tokens: ``(texts, tokens, hidden)`` of fp32.
            mask: ``(texts, tokens)`` of int64: 1 on tokens, 0 on padding.

        Returns:
            ``(texts, size)`` of fp32.
        """
        features: dict[str, Any] = {"token_embeddings": tokens, "attention_mask": mask}
        for _, module in self.modules:
            features = module.to(tokens.device)(features)
        return features["sentence_embedding"]

    def describe(self) -> str:
        """How texts become vectors, in a line."""
        parts = []
        for _, module in self.modules:
            kind = type(module).__name__
            mode = getattr(module, "pooling_mode", "")
            parts.append(_words_of(mode) if kind == "Pooling" else _WORDS[kind])
        whose = "as the model says" if self.is_own else "chosen here, since the model says nothing"
        return f"{', '.join(parts)} ({whose}): {self.size:,} numbers, of up to {self.most:,} tokens of a text"

    def save(self, folder: Path) -> None:
        """Write beside a model or an adapter what sentence-transformers needs to make vectors with it.

        Args:
            folder: the folder; it is there.
        """
        listed: list[Any] = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        for index, (path, module) in enumerate(self.modules, start=1):
            kind = f"sentence_transformers.models.{type(module).__name__}"
            listed.append({"idx": index, "name": str(index), "path": path, "type": kind})
            (folder / path).mkdir(exist_ok=True)
            module.save(str(folder / path))
        (folder / MODULES).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
        write_json(folder / _LENGTH, {"max_seq_length": self.most, "do_lower_case": False})
        settings = {
            "model_type": "SentenceTransformer",
            "prompts": dict(self.prompts),
            "default_prompt_name": self.default_prompt,
            "similarity_fn_name": "cosine",
        }
        write_json(folder / _SETTINGS, settings)


def load_vectors(model: str | Path, config: PretrainedConfig, tokenizer: Any) -> Vectors:
    """How a model makes vectors of texts.

    A model of sentence-transformers says that itself. For any other, an encoder takes the mean over the tokens, and a
    decoder the last one, the only token that has seen the whole text.

    Args:
        model: a folder or the id of a model on the hub; or the folder of an adapter.
        config: the model's config.
        tokenizer: its tokenizer.

    Raises:
        UserError: it has modules that are not known here, or they cannot be read.
    """
    name = resolve_model(str(model))
    longest = longest_text(tokenizer, config)
    listed = _read(name, MODULES)
    if listed is None:
        from sentence_transformers.sentence_transformer.modules import Pooling

        mode: Any = "lasttoken" if is_decoder(config) else "mean"
        pooling = Pooling(config.get_text_config().hidden_size, mode)
        return Vectors((("1_Pooling", pooling),), longest or _NO_LIMIT)
    settings = _read(name, _SETTINGS) or {}
    length = (_read(name, _LENGTH) or {}).get("max_seq_length") or _NO_LIMIT
    return Vectors(
        tuple(_modules(name, listed)),
        min(length, longest or _NO_LIMIT),
        {str(key): str(text) for key, text in (settings.get("prompts") or {}).items()},
        settings.get("default_prompt_name"),
        is_own=True,
    )


_NO_LIMIT = 10**9
_WORDS = {"Normalize": "of length 1", "Dense": "a dense layer, not trained", "LayerNorm": "a norm, not trained"}


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether a token of such a model sees only those before it: its type writes text, and fills no gaps."""
    writing: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    filling: Any = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in writing and config.model_type not in filling


def _words_of(mode: Any) -> str:
    names = [mode] if isinstance(mode, str) else list(mode)
    told = {"mean": "the mean of the tokens", "lasttoken": "the last token", "cls": "the first token"}
    return " and ".join(told.get(name, f"{name} over the tokens") for name in names)


def _modules(name: str, listed: Any) -> list[tuple[str, Any]]:
    """The modules behind the model, in order, each with its folder."""
    import sentence_transformers.base.modules as base
    import sentence_transformers.sentence_transformer.modules as known

    try:
        entries = sorted(listed, key=lambda entry: entry["idx"])
        kinds = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"model: {MODULES} of {name!r} is {shortened(listed)}, no list of modules.") from None
    (first, path), behind = kinds[0] if kinds else ("", ""), kinds[1:]
    strange = [kind for kind, _ in behind if kind not in _BEHIND]
    if first != "Transformer" or path or strange or [kind for kind, _ in behind].count("Pooling") != 1:
        raise UserError(
            f"model: {name!r} is made of {', '.join(kind for kind, _ in kinds)}, and objective embedding takes a "
            f"Transformer in the folder itself with a Pooling behind it, and {', '.join(_BEHIND[1:])} behind that; "
            "give another model."
        )
    found = []
    for kind, path in behind:
        made: Any = getattr(known, kind, None) or getattr(base, kind)
        try:
            module = made.load(name, subfolder=path)
        except Exception as error:  # what a library makes of a file that is none of its own is open-ended
            raise UserError(f"model: {path!r} of {name!r} cannot be read: {first_line(error)}") from None
        if getattr(module, "include_prompt", True) is False:
            raise UserError(
                f"model: the pooling of {name!r} leaves out the tokens of the prompt (include_prompt: false), which "
                "objective embedding does not do; give another model."
            )
        found.append((path, module.float().requires_grad_(False).eval()))
    return found


def _read(name: str, file: str) -> Any:
    """What a JSON file of a model says; None where there is no such file."""
    options: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    path = cached_file(name, file, **options)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model: {file} of {name!r} cannot be read: {first_line(error)}.") from None
