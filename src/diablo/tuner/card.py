"""The model card of an adapter: what it is, what it was trained on, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

START, END = "<!-- adapter: written on saving -->", "<!-- end -->"


def write_model_card(folder: Path, method: str, base_model: str | None, rows: Mapping[str, str]) -> None:
    """Put an adapter's facts into the ``README.md`` of its folder.

    PEFT's template, which asks for information and has none, is replaced. In a card that somebody has written, only the
    part from an earlier call is replaced.

    Args:
        folder: where the adapter is.
        method: PEFT's name of the method.
        base_model: folder or hub id of the base model; None if it is not known.
        rows: further facts, by name.
    """
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard("")
    data = card.data.to_dict() if path.exists() else {}
    data["library_name"] = "peft"
    data["tags"] = sorted({*data.get("tags", ()), method.lower()})
    data["base_model"] = data.get("base_model") or base_model or None
    part = f"{START}\n{_facts(method, {'base model': base_model or 'not recorded', **rows})}\n{END}"
    text = card.text
    if START in text and END in text:
        text = text.partition(START)[0] + part + text.partition(END)[2]
    elif not text.strip() or "[More Information Needed]" in text:
        text = f"# A {method} adapter\n\n{part}\n"
    else:
        text = f"{text.rstrip()}\n\n{part}\n"
    path.write_text(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text.lstrip()}", encoding="utf-8")


def _facts(method: str, rows: Mapping[str, str]) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    import_line = "import diablo  # registers the method with PEFT\n" if method == "DIABLO" else ""
    return f"""| | |
|---|---|
| method | {method} |
{table}

```python
{import_line}from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```"""
