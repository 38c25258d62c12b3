"""The settings of a DiaBlo adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftType

from diablo.records.card import write_adapter_facts
from diablo.records.formats import ADAPTER_FORMAT, FORMAT_KEY, format_fault

_LISTS = (
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
)


@dataclass
class DiabloConfig(PeftConfig):
    """Settings of a DiaBlo adapter: which matrices it adapts and into how many blocks each is cut.

    A matrix of ``m1 x m2`` with N blocks has ``m1 * m2 / N`` trainable parameters, which start at zero. There is no
    rank, no scale and no initialisation to choose (arXiv 2506.03230). An empty list means None. The exception is
    ``target_modules``, where it asks for no module.

    Args:
        num_blocks: N, the number of diagonal blocks of each matrix: 1/N of it is trained. N is at most the smaller
            dimension of every target. The paper uses 64, and 32 to 128 in its ablations.
        block_pattern: another N for some modules. Keys are names or regular expressions, matched against the end of the
            module's name as in LoRA's ``rank_pattern``. Example: ``{"v_proj": 32}``.
        target_modules: names (or ends of names) of the modules to adapt, one regular expression, or ``"all-linear"``.
            None picks the query, key, value, up and down projections (the paper's choice) where the model has them,
            and otherwise what PEFT picks for the architecture.
        target_parameters: names (or ends of names) of parameters that are adapted by themselves, such as the fused
            experts of a mixture: ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``. If they are given without
            ``target_modules``, nothing else is adapted.
        exclude_modules: names or one regular expression of modules that are left alone.
        diablo_dropout: probability of dropping an input of the blocks in training, from 0 to below 1.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers, where it is not a common one (``layers``, ``h``, ...).
        layer_replication: ranges of layers, first to below last. The model is rebuilt from them and shares the base
            weights: ``[(0, 4), (2, 5)]`` makes layers 0, 1, 2, 3, 2, 3, 4, each with blocks of its own.
        bias: ``"none"``, ``"all"`` or ``"diablo_only"``: which biases are trained. Needs PEFT 0.21.
        modules_to_save: names of modules that are trained and saved whole, such as a new classification head.
        trainable_token_indices: ids of tokens whose rows of the input embedding are trained and saved beside the
            blocks, such as tokens that were added to the tokenizer. A mapping gives the ids by the names (or ends of
            names) of embeddings and output layers. Where the model ties its output layer to the embedding, both change.
        init_weights: True starts from zero, which leaves the model's output as it was. False draws small random blocks,
            for tests that would be vacuous with zeros.
        in_place: whether the blocks stand in the weight while training. This costs what the frozen layer costs and 1/N
            of a product. Beside the weight they cost 3/N and more. ``"auto"`` writes them into the weight wherever that
            is possible: in linear layers with a plain weight of their own, without ``diablo_dropout``. True is an error
            where it is not possible. False never writes them.
        base_digest: digest of the base weights that a saved adapter was made for. ``save_pretrained`` writes it and
            loading compares it. Do not give it.
        format_version: the format that a saved adapter is written in. ``save_pretrained`` writes it. Loading reads
            older formats and refuses newer ones. Do not give it.

    Raises:
        TypeError: ``block_pattern`` is no mapping.
        ValueError: another setting is not allowed, or two contradict each other. The message names them.
    """

    num_blocks: int = field(default=64, metadata={"help": "Number of diagonal blocks: 1/N of each matrix is trained."})
    block_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name or regular expression to num_blocks, where they differ."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a regular expression, or 'all-linear'."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt by themselves, such as fused experts: their names."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: names or a regular expression."}
    )
    diablo_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the blocks."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; all where None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that layers_to_transform counts in."}
    )
    layer_replication: list[tuple[int, int]] | None = field(
        default=None, metadata={"help": "Ranges of layers that the model is made of, sharing the base weights."}
    )
    bias: Literal["none", "all", "diablo_only"] = field(
        default="none", metadata={"help": "Biases to train: 'none', 'all' or 'diablo_only'."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved whole beside the blocks."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose rows of the embedding are trained: ids, or ids by layer."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: blocks start at zero. False: small random blocks, for tests."}
    )
    in_place: Literal["auto"] | bool = field(
        default="auto", metadata={"help": "Write the blocks into the weight while training, where possible."}
    )
    base_digest: str | None = field(
        default=None,
        metadata={"help": "Digest of the base weights that a saved adapter was made for; written by saving."},
    )
    format_version: int | None = field(
        default=None, metadata={"help": "The format that a saved adapter is written in; written by saving."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # First: what is wrong with other settings of a newer format is wrong for that reason.
        if fault := format_fault(self.format_version, ADAPTER_FORMAT):
            raise ValueError(f"{fault}.")
        # How many parameters the blocks and the base model have, once the adapter is on a model. It is no setting, and
        # so no field.
        self._trained_of_all: tuple[int, int] | None = None
        self._sees_images = False
        # Digest of the weights that the adapter is on. One configuration may serve several models, so it is no field
        # either.
        self._made_for: str | None = None
        self.peft_type = PeftType("DIABLO")
        self._read_empty_as_not_given()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        self._check_target_parameters()
        self._check_token_indices()
        _check_num_blocks("num_blocks", self.num_blocks)
        if not isinstance(self.block_pattern, dict):
            raise TypeError(f"block_pattern must map module names to num_blocks, got {self.block_pattern!r}.")
        for pattern, value in self.block_pattern.items():
            _check_num_blocks(f"block_pattern[{pattern!r}]", value)
        if not isinstance(self.diablo_dropout, (int, float)) or not 0 <= self.diablo_dropout < 1:
            raise ValueError(f"diablo_dropout must be from 0 to below 1, got {self.diablo_dropout!r}.")
        if self.bias not in ("none", "all", "diablo_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'diablo_only', got {self.bias!r}.")
        if self.in_place != "auto" and not isinstance(self.in_place, bool):
            raise ValueError(f"in_place must be 'auto', True or False, got {self.in_place!r}.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} cannot be combined with the regular expression "
                        f"target_modules={self.target_modules!r}: put the layers into the expression, or list names."
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: give the indices."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are saved."""
        written = {"base_digest": self._made_for or self.base_digest, FORMAT_KEY: ADAPTER_FORMAT}
        return {**super().to_dict(), **written}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the settings. For an adapter that is on a model, also write its facts into the folder's model card.

        Args:
            save_directory: the folder. It is made if it does not exist.
            kwargs: what ``PeftConfig.save_pretrained`` takes.
        """
        super().save_pretrained(save_directory, **kwargs)
        counts: tuple[int, int] | None = self._trained_of_all
        if counts is None:
            return
        trained, of_base = counts
        # PEFT counts the blocks among all parameters too.
        total = of_base and of_base + trained
        targets = {
            "target modules": self.target_modules,
            "target parameters": self.target_parameters,
            "modules trained whole": self.modules_to_save,
        }
        tokens = sorted(self.ids_of_tokens)
        named = {
            name: value if isinstance(value, str) else ", ".join(sorted(value))
            for name, value in targets.items()
            if value
        }
        other = f", {json.dumps(self.block_pattern)}" if self.block_pattern else ""
        rows = {
            "num_blocks": f"{self.num_blocks}{other}",
            **named,
            **({"tokens with trained rows": ", ".join(map(str, tokens))} if tokens else {}),
            "trained in blocks": f"{trained:,} parameters" + (f", {trained / total:.2%} of {total:,}" if total else ""),
        }
        base, task = self.base_model_name_or_path, self.task_type
        write_adapter_facts(Path(save_directory), "DIABLO", base, rows, task, sees_images=self._sees_images)

    @property
    def ids_of_tokens(self) -> set[int]:
        """The tokens whose rows are trained, in whichever layer."""
        given = self.trainable_token_indices or []
        return {token for ids in (given.values() if isinstance(given, dict) else [given]) for token in ids}

    def _read_empty_as_not_given(self) -> None:
        # Files have empty lists for None, and PEFT reads them so. target_modules is left out: there an empty list asks
        # for no module, and None for the default ones.
        for name in _LISTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, int) and len(value) == 0:
                setattr(self, name, None)
        if self.block_pattern is None:
            self.block_pattern = {}  # pyrefly: ignore[attribute-assign-on-never]
        if self.layer_replication is not None:
            # JSON has no tuples.
            ranges: list[Any] = self.layer_replication
            self.layer_replication = [tuple(bounds) if isinstance(bounds, list) else bounds for bounds in ranges]

    def _check_target_parameters(self) -> None:
        if isinstance(self.target_parameters, str):
            raise ValueError(
                f"target_parameters={self.target_parameters!r} must be a list of names, not an expression: put it into "
                "a list."
            )
        if self.target_parameters:
            if self.target_modules is None:
                self.target_modules = set()
            if self.diablo_dropout:
                raise ValueError(
                    f"diablo_dropout={self.diablo_dropout!r} cannot be combined with target_parameters: it acts on the "
                    "input of the blocks, which adapted parameters do not see; set it to 0."
                )

    def _check_token_indices(self) -> None:
        given: Any = self.trainable_token_indices
        if given is None:
            return
        for ids in given.values() if isinstance(given, dict) else [given]:
            is_list = isinstance(ids, (list, tuple))
            if not (is_list and all(isinstance(token, int) and token >= 0 for token in ids) and len(ids) > 0):
                raise ValueError(
                    f"trainable_token_indices={given!r} must be a list of token ids from 0 on, or a mapping of layer "
                    "names to such lists."
                )
            if len(set(ids)) < len(ids):
                raise ValueError(f"trainable_token_indices={given!r} has a token twice: name each once.")


def config_obstacle(config: DiabloConfig) -> str | None:
    """Why an adapter of these settings has to stand beside the weight; None if it need not."""
    if config.in_place is False:
        return "in_place=False"
    if config.diablo_dropout:
        return f"diablo_dropout={config.diablo_dropout}, which acts on the input of the blocks alone"
    return None


def _check_num_blocks(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{name}={value!r}: the number of blocks must be an integer from 1 to the smaller dimension of the module."
        )
