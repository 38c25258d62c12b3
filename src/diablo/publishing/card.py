"""The part of a model card that tells of a run: its data, its scores, its recipe, and how its result is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from diablo.errors import UserError
from diablo.models.builtin import LICENSE, ORIGIN, PREFIX
from diablo.models.forms import CAUSAL, ENCODER_DECODER, IMAGE_TEXT, Form
from diablo.recipes.recipe import Recipe
from diablo.records.card import CARD, HERE, Card, EditedCardError, called, hub_id
from diablo.records.results import kept_loss
from diablo.tasks import TASKS

Kind = Literal["adapter", "merged", "model"]
"""What a folder of a run holds: an adapter, the model that it was merged into, or a model trained in full."""

_WHAT = {"adapter": "adapter", "merged": "model, merged from an adapter", "model": "model, trained in full"}
# Not a setting of what was trained, or something about this machine. An adapter that was gone on from is in the intro.
_UNTOLD = ("output", "push_to_hub", "tracking", "merge", "adapter")
_OF_WORDS = ("token_classification",)
_PATHS = ("path", "folder", "train", "eval", "general", "model", "base")


def write_run_card(folder: Path, record: Mapping[str, Any], kind: Kind) -> None:
    """Write what is known of a run into the model card of one of its folders. Nothing of it names a path.

    Args:
        folder: the folder of the adapter or of the model.
        record: what ``run.json`` holds.
        kind: what the folder holds.

    Raises:
        UserError: somebody has written into the card where this belongs.
    """
    try:
        card = Card.read(folder)
        card.put("run", run_part(record, kind), run_data(record, kind), title_of(record, kind))
    except EditedCardError as error:
        raise UserError(f"{folder / CARD} is left as it is: {error}; delete it to have a new one.") from None
    (folder / CARD).write_text(card.content(), encoding="utf-8")


def base_of(model: str) -> str | None:
    """The id on the hub of a recipe's model; None where it is a folder of this machine."""
    return ORIGIN[model.removeprefix(PREFIX)] if model.startswith(PREFIX) else hub_id(model)


def title_of(record: Mapping[str, Any], kind: Kind) -> str:
    """The title of the card: the method, the base model and the data, in a line."""
    recipe = record["recipe"]
    base = base_of(recipe["model"])
    name = base.rpartition("/")[2] if base else Path(recipe["model"]).name
    rows = " and ".join(recipe["task"]) or "own data"
    return f"{name} trained on {rows} by {recipe['method']['name']}: {_WHAT[kind]}"


def run_data(record: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The YAML at the top of the card, as the hub reads it."""
    recipe = record["recipe"]
    base, pipeline = base_of(recipe["model"]), _pipeline_of(record)
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=_dataset_of(task) or task,
            dataset_name=task,
            dataset_split="test",
            dataset_args={"first_rows": score["total"]} if recipe["evaluation"]["limit"] else None,
            metric_type=score["headline"],
            metric_value=score[score["headline"]],
        )
        for task, score in record["scores"].get("after", {}).items()
    ]
    sources = [source["hub"] for source in record["data"]["train"] if "hub" in source]
    datasets = [*sources, *filter(None, map(_dataset_of, recipe["task"]))]
    data = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if kind == "adapter" else "finetune") if base else None,
        library_name="peft" if kind == "adapter" else _LIBRARY.get(pipeline, "transformers"),
        pipeline_tag=pipeline,
        tags=[recipe["method"].get("type", recipe["method"]["name"]).lower(), "diablo-peft"],
        datasets=list(dict.fromkeys(datasets)) or None,
        eval_results=results or None,
        model_name=title_of(record, kind) if results else None,
        **license_of(recipe["model"]),
    )
    return data.to_dict()


_VECTORS = "sentence-similarity"
_PIPELINES = {
    CAUSAL: "text-generation",
    ENCODER_DECODER: "text2text-generation",
    IMAGE_TEXT: "image-text-to-text",
}
"""What the hub calls the tasks of models that write."""
_LIBRARY = {_VECTORS: "sentence-transformers"}
"""The library that loads a model, by the model's task, where that is not transformers."""


def _pipeline_of(record: Mapping[str, Any]) -> str:
    """What the hub calls the task of a run's model."""
    kind = (record["training"].get("head") or {}).get("kind")
    if kind == "embedding":
        return _VECTORS
    if kind is None:
        return _PIPELINES[_form_of(record)]
    return "token-classification" if kind in _OF_WORDS else "text-classification"


def _form_of(record: Mapping[str, Any]) -> Form:
    """The form of a run's model, where it writes."""
    if record.get("sees_images"):
        return IMAGE_TEXT
    return ENCODER_DECODER if record["training"].get("encoder_decoder") else CAUSAL


def license_of(model: str) -> dict[str, Any]:
    """The licence of a recipe's model, as its own card states it; empty where no such card is on this machine."""
    if model.startswith(PREFIX):
        return {"license": LICENSE[model.removeprefix(PREFIX)]}
    path = Path(model) / CARD if Path(model).is_dir() else try_to_load_from_cache(model, CARD)
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # cards of others hold anything
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}


def run_part(record: Mapping[str, Any], kind: Kind) -> str:
    """The part of the card in Markdown."""
    recipe = record["recipe"]
    parts = [_intro(record, kind), _data(record), _results(record), _use(record, kind)]
    settings = yaml.safe_dump(shareable_recipe(recipe), sort_keys=False, allow_unicode=True).strip()
    parts.append(f"## Recipe\n\n```yaml\n{settings}\n```")
    parts.append(_machine(record))
    text = "\n\n".join(parts)
    for place, word in ((os.getcwd(), "."), (str(Path.home()), "~")):
        if len(place) > 1:
            text = text.replace(place, word)
    return text


def shareable_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recipe for others: what differs from the defaults, with the names of files in place of their paths."""
    told = {}
    for key, value in recipe.items():
        field = Recipe.model_fields.get(key)
        default = None if field is None or field.default is PydanticUndefined else field.default
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json")
        if key not in _UNTOLD and (kept := _changed(value, default)) not in (None, {}, []):
            told[key] = kept
    if "chat_template" in told:
        told["chat_template"] = f"(Jinja of {len(told['chat_template'])} characters)"
    return _nameless(told)


def _changed(value: Any, default: Any) -> Any:
    if isinstance(value, dict):
        inner = default if isinstance(default, dict) else {}
        kept = {key: _changed(each, inner.get(key)) for key, each in value.items()}
        kept = {key: each for key, each in kept.items() if each not in (None, {}, [])}
        # The kind of a section is needed to read its other settings.
        return {"name": value["name"], **kept} if kept and "name" in value else kept
    return None if value == default else value


def _nameless(value: Any, key: str = "") -> Any:
    """Settings without the folders that files are in."""
    if isinstance(value, dict):
        return {name: _nameless(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_nameless(each, key) for each in value]
    if not isinstance(value, str):
        return value
    is_local = os.path.isabs(value) or value.startswith(("~", "./", "../")) or (key in _PATHS and Path(value).exists())
    return Path(value).name if is_local else value


def _dataset_of(task: str) -> str | None:
    source = TASKS[task].source if task in TASKS else None
    return source.hub if source else None


def _intro(record: Mapping[str, Any], kind: Kind) -> str:
    recipe, parameters, training = record["recipe"], record["parameters"], record["training"]
    base = base_of(recipe["model"])
    named = f"[{base}](https://huggingface.co/{base})" if base else called(recipe["model"])
    text = (
        f"Trained on {named} by `{recipe['method']['name']}`: {parameters['trainable']:,} of {parameters['total']:,} "
        f"parameters ({parameters['share']:.2%}), in {training['steps']:,} steps."
    )
    if training["kept_step"] != training["steps"]:
        text += f" The parameters are those of step {training['kept_step']:,}, the best one."
    if recipe.get("adapter"):
        text += (
            "\n\nTraining went on from an adapter that had been trained before. The data, the steps and the recipe are "
            "those of the last stage alone, and what stands under before was measured with that adapter."
        )
    if recipe["model"].startswith(PREFIX):
        text += (
            "\n\nThe base weights were those of a 4-bit GGUF file of that model, which differ from the model's own by "
            "rounding. On the model's own weights the results differ a little, and loading says so."
        )
    if recipe["quantization"]:
        text += f"\n\nThe base weights were quantized to {recipe['quantization']} while it was trained."
    return (
        f"{text}\n\n"
        + {
            "adapter": "It is an adapter: its base model is needed beside it.",
            "merged": "It is a plain transformers model: transformers, vLLM and others load it without diablo.",
            "model": "It is a plain transformers model: transformers, vLLM and others load it without diablo.",
        }[kind]
    )


def _data(record: Mapping[str, Any]) -> str:
    data, recipe = record["data"], record["recipe"]
    lines = ["| trained on | format | rows |", "|---|---|---|"]
    for source in data["train"]:
        if "hub" in source:
            details = [source[key] for key in ("name", "split", "revision") if source.get(key)]
            where = f"[{source['hub']}](https://huggingface.co/datasets/{source['hub']}) {', '.join(details)}".strip()
        else:
            where = Path(source["path"]).name
        weight = "" if source["weight"] == 1 else f", weight {source['weight']:g}"
        lines.append(f"| {where}{weight} | {', '.join(source['format'])} | {source['rows']:,} |")
    for task in recipe["task"]:
        hub = _dataset_of(task)
        where = f"[{hub}](https://huggingface.co/datasets/{hub})" if hub else "in the package diablo"
        lines.append(f"| the task {task} ({where}) | prompt/completion | its train split |")
    left_out = {
        "malformed": len(data["malformed_rows_skipped"]),
        "too long": len(data["long_rows_dropped"]),
        "in the test split as well": data["tested_rows_left_out"],
    }
    told = [f"{count:,} {why}" for why, count in left_out.items() if count]
    carrying = "" if record["training"]["head"] else f", {data['supervised_tokens']:,} of which carry loss"
    text = f"{data['rows']:,} rows with {data['tokens']:,} tokens{carrying}; {data['held_out_rows']:,} rows held out."
    if told:
        text += f" Left out: {', '.join(told)}."
    if data.get("long_rows_cut"):
        text += f" The end of {data['long_rows_cut']:,} was cut off."
    near_copies = data.get("near_copies")
    if near_copies and near_copies["found"]:
        text += (
            f" {near_copies['found']:,} of the {near_copies['problems']:,} test problems have the words of a training "
            "row, with other numbers or punctuation."
        )
    if data.get("labels"):
        text += f"\n\nLabels: {', '.join(f'{label} ({count:,})' for label, count in data['labels'].items())}."
    return "\n".join(["## Data", "", *lines, "", text])


def into_quantized(record: Mapping[str, Any]) -> str:
    """What ``diablo merge`` is to be told beside its folders, with a space before it: nothing over plain weights."""
    if not record.get("quantized_base"):
        return ""
    # A head in place of the output layer stays with the weights as bitsandbytes holds them.
    has_head = record["training"]["head"] and record["recipe"]["quantization"]
    return " --into stored" if has_head else " --into dequantized"


def _results(record: Mapping[str, Any]) -> str:
    training, scores = record["training"], record["scores"]
    lines = ["| measure | before | after |", "|---|---|---|"]
    for task in scores.get("after") or scores.get("before") or {}:
        cells = []
        for when in ("before", "after"):
            score = scores.get(when, {}).get(task)
            cells.append(
                f"{score[score['headline']]:.1%} ({score['right']:,} of {score['total']:,})" if score else "not scored"
            )
        any_score = (scores.get("after") or scores["before"])[task]
        lines.append(f"| {task}, {any_score['headline']} ({any_score['protocol']}) | {' | '.join(cells)} |")
    if training["held_out_loss"]:
        before, after = training["held_out_loss"][0][1], kept_loss(training)
        unit = training["loss_unit"].replace(" per ", " a ").replace("per ", "a ")
        lines.append(f"| loss on held-out rows, {unit} | {before:.4f} | {after:.4f} |")
    for name, values in training["held_out_figures"].items():
        before, after = values[0][1], dict(values)[training["kept_step"]]
        lines.append(f"| {name} on held-out rows | {before:.4f} | {after:.4f} |")
    if general := record["general_loss"]:
        lines.append(f"| loss on general text, nats a token | {general['before']:.4f} | {general['after']:.4f} |")
    if len(lines) == 2:
        lines = ["Nothing was held out or scored."]
    if training["reward"]:
        (first, start), (last, end) = training["reward"][0], training["reward"][-1]
        lines += ["", f"Mean reward of completions: {start:.4f} at step {first:,}, {end:.4f} at step {last:,}."]
    if training["loss"]:
        (first, start), (last, end) = training["loss"][0], training["loss"][-1]
        lines += ["", f"Training loss: {start:.4f} at step {first:,}, {end:.4f} at step {last:,}."]
    return "\n".join(["## Results", "", *lines])


def _tokens(record: Mapping[str, Any], kind: Kind) -> list[str]:
    """What has to be known of tokens whose rows were trained; nothing where there are none."""
    trained = record.get("trained_tokens")
    if not trained:
        return []
    texts = ", ".join(f"`{token['text']}`" for token in trained["tokens"])
    told = f"These tokens were added, or their rows trained: {texts}. Take the tokenizer of these files."
    if kind == "adapter" and trained["rows"] > trained["rows_before"]:
        told += (
            " `AutoPeftModelForCausalLM` gives the base model the rows that they need. Before "
            f"`PeftModel.from_pretrained`, call `model.resize_token_embeddings({trained['rows']})`."
        )
    return [told, ""]


def _use(record: Mapping[str, Any], kind: Kind) -> str:
    recipe, head = record["recipe"], record["training"]["head"]
    if head:
        return _use_of_head(record, head, kind)
    chat = " --chat" if recipe["chat"] else ""
    form = "through the tokenizer's chat template" if recipe["chat"] else "as plain text, without a chat template"
    lines = ["## Use", "", f"It was trained on prompts that are given {form}.", "", *_tokens(record, kind)]
    if kind == "adapter":
        picture = " --image photo.jpg" if record["data"].get("images") else ""
        lines += [
            "```console",
            "$ pip install 'diablo-peft[cli]'",
            f'$ diablo generate .{chat} "..."{picture}    # in the folder of these files',
            f"$ diablo merge . merged{into_quantized(record)}    # a plain transformers model",
            "```",
        ]
    else:
        model = _form_of(record)
        loader, reader = model.auto_class, "AutoProcessor" if model is IMAGE_TEXT else "AutoTokenizer"
        lines += [
            "```python",
            f"from transformers import {loader}, {reader}",
            "",
            f'model = {loader}.from_pretrained("{HERE}")',
            f'{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained("{HERE}")',
            "```",
        ]
    return "\n".join(lines)


def _use_of_vectors(kind: Kind) -> str:
    lines = ["## Use", "", "It gives vectors of texts. Those of texts that belong together are near.", ""]
    if kind == "adapter":
        lines += [
            "```console",
            "$ pip install 'diablo-peft[cli,embeddings]'",
            '$ diablo embed . "..."    # in the folder of these files',
            "$ diablo merge . merged    # a plain model of sentence-transformers",
            "```",
        ]
    else:
        lines += [
            "```python",
            "from sentence_transformers import SentenceTransformer",
            "",
            f'model = SentenceTransformer("{HERE}")',
            'vectors = model.encode(["..."])',
            "```",
        ]
    return "\n".join(lines)


def _use_of_head(record: Mapping[str, Any], head: Mapping[str, Any], kind: Kind) -> str:
    if head["kind"] == "embedding":
        return _use_of_vectors(kind)
    form = "TokenClassification" if head["kind"] in _OF_WORDS else "SequenceClassification"
    what = {"reward": "scores a prompt with its completion", "regression": "gives a text a number"}
    text = what.get(head["kind"], "labels the words of a text" if form.startswith("Token") else "labels a text")
    asked = '{"prompt": "...", "completion": "..."}' if head["kind"] == "reward" else "..."
    lines = ["## Use", "", f"It {text}.", ""]
    if kind == "adapter":
        quoted = f"'{asked}'" if head["kind"] == "reward" else f'"{asked}"'
        lines += [
            "```console",
            "$ pip install 'diablo-peft[cli]'",
            f"$ diablo classify . {quoted}    # in the folder of these files",
            f"$ diablo merge . merged{into_quantized(record)}    # a plain transformers model",
            "```",
        ]
    else:
        lines += [
            "```python",
            f"from transformers import AutoModelFor{form}, AutoTokenizer",
            "",
            f'model = AutoModelFor{form}.from_pretrained("{HERE}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")',
            "```",
        ]
    return "\n".join(lines)


def _machine(record: Mapping[str, Any]) -> str:
    machine, training, versions = record["machine"], record["training"], record["versions"]
    device = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    processes = f" in {training['processes']} processes" if training["processes"] > 1 else ""
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"## Machine and versions\n\n{device}{processes}, {record['precision']}, "
        f"{record['timings']['train_seconds']:,.0f} s of training at {training['tokens_per_second']:,.0f} tokens/s. "
        f"{found}."
    )
