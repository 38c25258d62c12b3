"""The model card of a folder: parts that diablo writes into its ``README.md``, beside what people write there."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

CARD = "README.md"
_FORMS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
HERE = "this folder"
"""What a card calls the folder that it lies in, until it is published under an id."""

_PART = "<!-- {name}: diablo wrote this part, {seal} -->\n{content}\n<!-- {name} ends here -->"
_FOUND = re.compile(
    r"<!-- (?P<name>\w+): diablo wrote this part, (?P<seal>\w+) -->\n(?P<content>.*?)\n<!-- (?P=name) ends here -->",
    re.DOTALL,
)
_WHOLE = "<!-- diablo wrote all of this, {seal} -->"
_WHOLE_FOUND = re.compile(r"\s*<!-- diablo wrote all of this, (\w+) -->\s*\Z")
# PEFT's template asks for information and has none. Into another card, PEFT writes its version each time it saves.
_PEFT_TEMPLATE = "[More Information Needed]"
_PEFT_VERSION = re.compile(r"\n*### Framework versions\n\n(- PEFT \S+\n*)+")


class EditedCardError(Exception):
    """Somebody has written into the part of a card that is to be written anew."""


@dataclass
class Card:
    """A card in memory.

    Attributes:
        data: the YAML at its top.
        text: what follows, in Markdown.
        edited: whether somebody else than diablo has written into the text.
    """

    data: dict[str, Any]
    text: str
    edited: bool

    @classmethod
    def parse(cls, content: str) -> Card:
        """Read a card. One that PEFT's template made counts as empty.

        Raises:
            EditedCardError: its YAML cannot be read.
        """
        if not content.strip():
            return cls({}, "", edited=False)
        try:
            card = ModelCard(content, ignore_metadata_errors=True)
        except Exception as error:  # what people write between the dashes is open-ended
            raise EditedCardError(f"its YAML cannot be read ({str(error).splitlines()[0]})") from None
        data, text = card.data.to_dict(), _PEFT_VERSION.sub("", card.text).strip()
        if not text or _PEFT_TEMPLATE in text:
            return cls(data, "", edited=False)
        found = _WHOLE_FOUND.search(text)
        text = text[: found.start()] if found else text
        return cls(data, text, edited=found is None or found[1] != _seal(text))

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a folder, empty where there is none; see :meth:`parse`."""
        path = folder / CARD
        return cls.parse(path.read_text(encoding="utf-8") if path.exists() else "")

    def put(self, name: str, content: str, data: Mapping[str, Any], title: str) -> None:
        """Write a part, in the place of the one of that name, or at the end.

        Args:
            name: what the part is called in the text.
            content: the part, in Markdown.
            data: what it adds to the YAML. Tags are added to those that there are. A licence and a base model that are
                an id on the hub stay as somebody has set them.
            title: the card's title, where diablo wrote the text.

        Raises:
            EditedCardError: somebody has written into the part of that name.
        """
        part = _PART.format(name=name, seal=_seal(content), content=content)
        found = next((found for found in _FOUND.finditer(self.text) if found["name"] == name), None)
        if found is None:
            self.text = f"{self.text.strip() or f'# {title}'}\n\n{part}"
        elif found["seal"] != _seal(found["content"]):
            raise EditedCardError(f"somebody has written into its part {name!r}")
        else:
            self.text = self.text[: found.start()] + part + self.text[found.end() :]
        if not self.edited:
            self.text = re.sub(r"\A# .*", lambda _: f"# {title}", self.text)
        self.data = joined(self.data, data)

    def rename(self, names: Mapping[str, str]) -> None:
        """Put other names in the place of some, in the parts that nobody has written into."""

        def renamed(found: re.Match[str]) -> str:
            content = found["content"]
            if found["seal"] != _seal(content):
                return found[0]
            for old, new in names.items():
                content = content.replace(old, new)
            return _PART.format(name=found["name"], seal=_seal(content), content=content)

        self.text = _FOUND.sub(renamed, self.text)

    def content(self) -> str:
        """The whole file."""
        seal = "" if self.edited else f"\n\n{_WHOLE.format(seal=_seal(self.text))}"
        return f"---\n{ModelCardData(**self.data).to_yaml()}\n---\n\n{self.text.strip()}{seal}\n"


def joined(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML of a card with what diablo adds to it; see :meth:`Card.put`."""
    result = {**theirs, **{key: value for key, value in ours.items() if value is not None}}
    if theirs.get("license"):
        result |= {key: theirs.get(key) for key in ("license", "license_name", "license_link")}
    given = theirs.get("base_model")
    if not isinstance(given, str) or hub_id(given):
        result["base_model"] = given or result.get("base_model")
    elif ours.get("base_model") is None:
        result["base_model"] = None
    if result.get("base_model") is None:
        result["base_model_relation"] = None
    # PEFT has a tag with the base model's name, which may be a folder of this machine.
    tags = {tag for tag in (*theirs.get("tags", ()), *ours.get("tags", ())) if not tag.startswith("base_model:")}
    result["tags"] = sorted(tags)
    return {key: value for key, value in result.items() if value is not None}


def hub_id(name: str | None) -> str | None:
    """A model's name, where it can be an id on the hub; None for a folder of this machine, and for no name."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def called(name: str | None) -> str:
    """A model in words for others: its id, or the last part of a folder's path, which says nothing of this machine."""
    if name is None:
        return "not recorded"
    return hub_id(name) or f"a folder called {Path(name).name}"


def write_adapter_facts(
    folder: Path,
    method: str,
    base_model: str | None,
    rows: Mapping[str, str],
    task_type: str | None = None,
    *,
    sees_images: bool = False,
) -> None:
    """Put an adapter's facts into the model card of its folder.

    PEFT's template is replaced. What somebody has written stays; where it stands in the part of these facts, the card
    is left as it is, with a warning.

    Args:
        folder: where the adapter is.
        method: PEFT's name of the method.
        base_model: folder or hub id of the base model; None if it is not known. A folder's path is not written.
        rows: further facts, by name.
        task_type: what PEFT calls the task of the model; a language model's where None.
        sees_images: whether the model reads images beside text.
    """
    data = {
        "base_model": hub_id(base_model),
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": [method.lower()],
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in {"base model": called(base_model), **rows}.items())
    import_line = "import diablo  # registers the method with PEFT\n" if method == "DIABLO" else ""
    content = f"""| | |
|---|---|
| method | {method} |
{table}

```python
{import_line}{_loading(task_type, sees_images)}
```"""
    try:
        card = Card.read(folder)
        card.put("adapter", content, data, f"A {method} adapter")
    except EditedCardError as error:
        warnings.warn(f"{folder / CARD} is left as it is: {error}. Delete it to have a new one.", stacklevel=2)
        return
    (folder / CARD).write_text(card.content(), encoding="utf-8")


def _loading(task_type: str | None, sees_images: bool) -> str:
    """How an adapter is loaded, in Python; what its head says stands in a config beside it."""
    if sees_images:
        return f"""from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText

base = PeftConfig.from_pretrained("{HERE}").base_model_name_or_path
model = AutoModelForImageTextToText.from_pretrained(base)
model = PeftModel.from_pretrained(model, "{HERE}")"""
    form = _FORMS.get(task_type or "")
    if form is None:
        kind = "AutoPeftModelForSeq2SeqLM" if task_type == "SEQ_2_SEQ_LM" else "AutoPeftModelForCausalLM"
        return f"""from peft import {kind}

model = {kind}.from_pretrained("{HERE}")"""
    return f"""from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelFor{form}

base = PeftConfig.from_pretrained("{HERE}").base_model_name_or_path
config = AutoConfig.from_pretrained("{HERE}")  # what the labels are, and the padding token
model = AutoModelFor{form}.from_pretrained(base, config=config)
model = PeftModel.from_pretrained(model, "{HERE}")"""


def _seal(text: str) -> str:
    """A digest by which it shows later that a text was changed."""
    return hashlib.blake2b(text.strip().encode(), digest_size=6).hexdigest()
