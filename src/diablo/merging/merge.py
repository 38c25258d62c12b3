"""Merging an adapter into its base model, also an adapter that was trained over quantized weights."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftType
from peft.utils import ModulesToSaveWrapper
from rich.console import Console

from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.data.general_text import BUILTIN_TEXT, encode_general_text
from diablo.errors import UserError
from diablo.merging.shards import Changes, base_digest_of, find_changes, merge_shards
from diablo.merging.untying import untie
from diablo.models.adapters import attach_adapter, load_adapter, load_base, read_adapter_config, stored_dtype
from diablo.models.folders import base_model_of, new_folder
from diablo.models.forms import ENCODER_DECODER, form_of
from diablo.models.heads import Head, gives_vectors, has_head, said
from diablo.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    stored_quantization,
    write_processor,
)
from diablo.models.stored_weights import NoSafetensorsError, StoredWeights, write_stop_tokens
from diablo.models.vectors import load_vectors
from diablo.models.vocabulary import TrainedTokens, tokens_of_adapter
from diablo.planning.making import make_plan
from diablo.quantization import Scheme
from diablo.quantization.dense import dequantized_model
from diablo.quantization.model import quantize_model
from diablo.recipes.peft_methods import check_merges
from diablo.recipes.recipe import Recipe
from diablo.records.results import recipe_of_run
from diablo.scoring.generation import held_out_loss
from diablo.tuner.base_digest import OtherBaseWarning, digest_on_model, is_same_base

CHOICES = ("stored", "dequantized", "requantized")
_MOST_ROWS = 256


@dataclass(frozen=True)
class MergeReport:
    """The outcome of a merge.

    Attributes:
        folder: where the merged model is.
        dtype: dtype of its weights, or, if it is quantized, of its products.
        is_same_base: whether the base weights are those that the adapter was trained on; None if that cannot be told.
        logits: the largest absolute difference of a logit between the merged and the adapted model on a probe, and the
            largest absolute logit there, to compare it with; None if the model does not fit into the memory.
        verified: how many tensors were read back and equal the base's plus the blocks to the bit; None if the model was
            merged as a whole.
        losses: loss per token, in nats, of the adapted and of the merged model; None if nothing was quantized.
        measured_on: the rows that the losses are of, in words.
        untied: names of weights that are tied in the base model and not in the merged one, each with the name of the
            weight that it was tied to. They are untied because the adapter changes one of them.
        tokens: texts of the tokens whose rows the adapter has trained.
    """

    folder: Path
    dtype: torch.dtype
    is_same_base: bool | None
    logits: tuple[float, float] | None
    verified: int | None = None
    losses: tuple[float, float] | None = None
    measured_on: str = ""
    untied: Mapping[str, str] = field(default_factory=dict)
    tokens: Sequence[str] = ()

    def record(self) -> dict[str, Any]:
        """The same as values of JSON."""
        return {
            "folder": str(self.folder),
            "dtype": str(self.dtype).removeprefix("torch."),
            "is_same_base": self.is_same_base,
            "verified_tensors": self.verified,
            "logits": self.logits and dict(zip(("largest_difference", "largest"), self.logits, strict=True)),
            "losses": self.losses and dict(zip(("adapted", "merged"), self.losses, strict=True)),
            "measured_on": self.measured_on or None,
            "untied": dict(self.untied),
            "tokens": list(self.tokens),
        }


def merge_adapter(
    adapter: Path,
    folder: Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    into: str | None = None,
    calibration: Callable[[Any], torch.Tensor] | None = None,
    other_base: bool = False,
    trained_as: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> MergeReport:
    """Write the base model with an adapter merged into it, as a transformers folder.

    If the base weights are plain and the adapter has nothing but blocks, the base's files are read, merged, written and
    checked one by one. The memory of the largest file is then enough. Otherwise the model is loaded.

    Args:
        adapter: the adapter's folder.
        folder: where to write. It must not exist, or must be empty. It is never left half written.
        base: base model to use in place of the one that the adapter names.
        dtype: dtype of the merged weights; that of the stored base weights if None.
        into: what to merge into if the adapter was trained over quantized weights, one of :data:`CHOICES`. ``"stored"``
            takes the weights as they are stored, before they are quantized on the fly. ``"dequantized"`` takes the
            values that the quantized weights stand for. ``"requantized"`` takes these too, and quantizes the sum again
            as :func:`~diablo.quantization.quantize_model` did the base.
        calibration: makes the calibration rows for ``"requantized"`` from the tokenizer.
        other_base: whether to merge even if the base has other weights than those that the adapter was trained on.
        trained_as: the recipe of the run; as it is recorded with the adapter if None.
        console: where progress is written; standard error if None.

    Raises:
        UserError: the adapter does not fit, it was trained on other base weights, the folder has files, the merged
            weights would not be finite, or ``into`` does not fit the base.
    """
    name = resolve_model(base or base_model_of(adapter))
    check_merges(PeftType(read_adapter_config(adapter).peft_type).value, f"The adapter {str(adapter)!r}")
    trained_as = recipe_of_run(adapter) if trained_as is None else trained_as
    on_the_fly = trained_as.get("quantization")
    stored = stored_quantization(load_config(name))
    _check_into(name, stored, on_the_fly, into, calibration is not None)
    tokens = tokens_of_adapter(adapter, name, load_config(name))
    trained_ids, texts = ([], []) if tokens is None else (tokens.ids, list(tokens.texts.values()))
    with_head = _check_head(adapter, into)
    scheme = _scheme_of(name, stored) if into == "requantized" else None
    if into is None and (plain := _plain_changes(adapter, name, tokens)) is not None:
        source, changes = plain
        is_same = _check_base(adapter, name, base_digest_of(source, changes), other_base)
        with new_folder(folder, "merged model") as target:
            verified = merge_shards(adapter, source, changes, target, dtype, console)
            _write_ends(target, trained_as)
        dtype = dtype or stored_dtype(name)
        logits = _compare_logits(adapter, base, folder, dtype, source.bytes, trained_ids)
        return MergeReport(folder, dtype, is_same, logits, verified, untied=changes.untied, tokens=texts)
    dtype = dtype or stored_dtype(name)
    with new_folder(folder, "merged model") as target:
        adapted, tokenizer = _quietly(load_adapter, adapter, base=base, dtype=dtype, quantization=on_the_fly)
        is_same = _check_base(adapter, name, digest_on_model(adapted), other_base)
        rows, measured_on = _held_out_rows(adapter, tokenizer, name) if into and not with_head else ([], "")
        adapted_logits, loss = _measure(adapted, rows, tokenizer, trained_ids)
        if into is not None:
            del adapted
            loaded = load_base(adapter, name, dtype, quantization=None if into == "stored" else on_the_fly)
            plain = loaded if into == "stored" else dequantized_model(loaded, dtype)
            adapted = _quietly(attach_adapter, plain, adapter, name, tokens)
            if into == "stored":
                is_same = _check_base(adapter, name, digest_on_model(adapted), other_base)
        untied = untie(adapted)
        _put_whole_modules_in(adapted)
        with torch.no_grad():
            try:
                merged = adapted.merge_and_unload(safe_merge=True)
            except ValueError as error:
                raise UserError(f"The adapter {str(adapter)!r} cannot be merged: {error}") from None
        if scheme is not None:
            assert calibration is not None  # checked above
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                _save(merged, tokenizer, adapter, name, Path(scratch))
                quantize_model(scratch, target, scheme, calibration(tokenizer), console=console)
            merged = load_model(str(target), dtype)
        else:
            _save(merged, tokenizer, adapter, name, target)
        _write_ends(target, trained_as)
        merged_logits, merged_loss = _measure(merged, rows, tokenizer, trained_ids)
    return MergeReport(
        folder,
        dtype,
        is_same,
        _difference(merged_logits, adapted_logits),
        losses=(loss, merged_loss) if rows else None,
        measured_on=measured_on,
        untied=untied,
        tokens=texts,
    )


def _put_whole_modules_in(adapted: Any) -> None:
    """Put modules that were trained whole in the place of the model's own.

    PEFT does this too, but fails where a method has no own way to, and such a module has several layers.
    """
    for name, module in list(adapted.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, own = name.rpartition(".")
            setattr(adapted.get_submodule(parent), own, module.modules_to_save[module.active_adapters[0]])


def _write_ends(folder: Path, trained_as: Mapping[str, Any]) -> None:
    """Write into the merged model of a run the chat template that it was trained with, and what ends its answers."""
    if not trained_as:
        return
    tokenizer = load_tokenizer(str(folder), trained_as.get("chat_template"))
    tokenizer.save_pretrained(folder)
    if Head.of(load_config(str(folder))) is None:
        write_stop_tokens(folder, RowEncoder(tokenizer, chat=trained_as.get("chat", False)).stop_token_ids)


def _plain_changes(adapter: Path, name: str, tokens: TrainedTokens | None) -> tuple[StoredWeights, Changes] | None:
    """The base's files and what the adapter changes in them; None if the model has to be loaded."""
    try:
        stored = StoredWeights(name)
    except NoSafetensorsError:
        return None  # transformers may know how to read it, or says why not
    changes = find_changes(adapter, stored, tokens)
    return None if changes is None else (stored, changes)


def _check_base(adapter: Path, name: str, found: str | None, other_base: bool) -> bool | None:
    """Refuse a base model with other weights than the adapter was trained on, unless the user asked for it."""
    config = read_adapter_config(adapter)
    is_same = is_same_base(getattr(config, "base_digest", None), found)
    if is_same is False and not other_base:
        raise UserError(
            f"The adapter {str(adapter)!r} was trained on {config.base_model_name_or_path}, whose weights differ "
            f"at its targets from those of {name!r}: the merged model would not compute what was trained. Give the "
            "model that it was trained on with --base, or --other-base to merge all the same."
        )
    return is_same


def _quietly(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Load without the warnings of another base. The merge compares the bases itself, and reports the result."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=OtherBaseWarning)
        return load(*args, **kwargs)


def _compare_logits(
    adapter: Path, base: str | None, folder: Path, dtype: torch.dtype, size: int, trained_ids: Sequence[int]
) -> tuple[float, float] | None:
    """Compare the logits of the adapted and the written model, loaded one after the other; None if they do not fit."""
    stored = stored_dtype(resolve_model(base or base_model_of(adapter)))
    if 1.5 * size * dtype.itemsize / stored.itemsize > _free_memory():
        return None
    adapted, tokenizer = _quietly(load_adapter, adapter, base=base, dtype=dtype)
    logits, _ = _measure(adapted, [], tokenizer, trained_ids)
    del adapted
    merged, _ = _measure(load_model(str(folder), dtype), [], tokenizer, trained_ids)
    return _difference(merged, logits)


def _free_memory() -> int:
    """Free bytes of memory: of the machine, or of the part of it that a container or a job may use."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        return min(free, most - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free  # there is no limit


def _difference(merged: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    return float((merged - logits).abs().max()), float(logits.abs().max())


def _check_into(
    name: str, stored: dict[str, Any], on_the_fly: str | None, into: str | None, has_calibration: bool
) -> None:
    library = stored.get("quant_method") or on_the_fly
    if into is not None and into not in CHOICES:
        raise UserError(f"--into: found {into!r}; allowed: {', '.join(CHOICES)}.")
    if library is None:
        if into is not None:
            raise UserError(f"--into: found {into}, but nothing is quantized in {name!r}; leave it out.")
    else:
        possible = ["dequantized", "requantized"] if stored else ["stored", "dequantized"]
        if into not in possible:
            found = "missing" if into is None else f"found {into}"
            raise UserError(
                f"--into: {found}; the adapter was trained over weights that {library} quantizes, so that merging "
                f"changes what it computes; allowed: {', '.join(possible)}, or keep the adapter beside the model and "
                "merge nothing."
            )
    if has_calibration != (into == "requantized"):
        raise UserError("--calibration: give it with --into requantized, and with nothing else.")


def _check_head(adapter: Path, into: str | None) -> bool:
    """Whether the adapter has a head, which is not merged into weights that are quantized or were."""
    with_head = has_head(adapter)
    if with_head and into in ("dequantized", "requantized"):
        raise UserError(
            f"--into: found {into}, and the adapter has a head in place of the output layer; merge into stored, or "
            "keep the adapter beside the model."
        )
    return with_head


def _scheme_of(name: str, stored: dict[str, Any]) -> Scheme:
    meta = stored.get("meta") or {}
    if stored.get("quant_method") != "gptq" or "diablo" not in meta.get("quantizer", []):
        raise UserError(
            f"--into: found requantized, but {name!r} was not quantized by diablo quantize; merge into dequantized, "
            "and quantize the result with the tool of your choice."
        )
    return Scheme(meta["bits"], meta["group_size"], meta["method"], meta["alpha"])


def _held_out_rows(adapter: Path, tokenizer: Any, name: str) -> tuple[list[EncodedRow], str]:
    """Rows on which to measure what merging changes, and what they are: a run's held-out rows, or general text.

    An encoder-decoder goes on with no text, so that there are none where the run has none.
    """
    trained_as = recipe_of_run(adapter)
    if trained_as:
        try:
            plan = make_plan(Recipe.model_validate(trained_as))
            rows = [row for row in plan.held_out if not row.images][:_MOST_ROWS]
            which = " without images" if plan.encoder.images else ""
        except (UserError, ValueError):
            rows, which = [], ""  # its data is no longer where it was
        if rows:
            return rows, f"{len(rows)} held-out rows of the run{which}"
    if form_of(load_config(name)) == ENCODER_DECODER:
        return [], ""
    return encode_general_text(BUILTIN_TEXT, tokenizer, 512), "general text"


@torch.no_grad()
def _measure(
    model: Any, rows: list[EncodedRow], tokenizer: Any, trained_ids: Sequence[int]
) -> tuple[torch.Tensor, float]:
    """The logits of a probe, which has the tokens whose rows are trained; and the loss of the rows, 0 without any."""
    first = (token % model.config.get_text_config().vocab_size for token in range(32))
    probe = torch.tensor([[*first, *trained_ids]], device=model.device)
    loss = held_out_loss(model, rows, tokenizer.pad_token_id) if rows else 0.0
    written = {"decoder_input_ids": probe} if form_of(model.config) == ENCODER_DECODER else {}
    return said(model.eval()(input_ids=probe, **written)).float().cpu(), loss


def _save(model: Any, tokenizer: Any, adapter: Path, name: str, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_processor(name, folder)
    if gives_vectors(adapter):
        load_vectors(adapter, model.config, tokenizer).save(folder)
