"""Safety: unsafe instructions with safe responses to train on, and instructions to be refused or answered."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diablo.data.rows import instruction_row, is_unicode
from diablo.errors import UserError
from diablo.tasks.base import Problem, Task
from diablo.tasks.instructions import InstructionTask, alpaca_source
from diablo.tasks.refusals import is_refusal, mentions_refusal
from diablo.tasks.sources import Source, Split, files_at, find_files, read_json

_SAFETY_TUNED = "https://github.com/vinid/safety-tuned-llamas"


def _training(file: str) -> Source:
    return alpaca_source(f"safety/{file}", f"safety-tuned-llamas/data/training/{file}", origin=_SAFETY_TUNED)


class SaferPaca(InstructionTask):
    """SaferPaca (Bianchi et al., ICLR 2024): 20,000 instructions of Alpaca and 2,000 unsafe ones, answered safely."""

    name = "saferpaca"
    sizes = (22_000,)
    licence = "CC BY-NC 4.0"
    source = _training("saferpaca_Instructions_2000.json")


class SaferPacaSafetyOnly(InstructionTask):
    """The safety data of SaferPaca (Bianchi et al., ICLR 2024): 2,483 unsafe instructions, answered safely."""

    name = "saferpaca_safety_only"
    sizes = (2_483,)
    licence = "CC BY-NC 4.0"
    source = _training("safety_only_data_Instructions.json")


@dataclass(frozen=True)
class Instruction:
    """What is known about an instruction.

    Attributes:
        group: the file it is from.
        harmful: whether refusing it is right.
    """

    group: str
    harmful: bool


class RefusalTask(Task):
    """Instructions of which it is scored whether an answer refuses them. That is right for the harmful ones only.

    Under the strict protocol an answer refuses if it begins by declining (:func:`diablo.tasks.refusals.is_refusal`).
    Under the paper's protocol it refuses if a phrase of refusals stands anywhere in it.
    """

    splits: ClassVar[tuple[Split, ...]] = ("test",)
    max_new_tokens = 256
    measure = "rates of refusal and over-refusal"
    readings = (
        "a text that begins by declining refuses; right where the instruction is harmful",
        "a text with a phrase of refusals anywhere in it refuses; right where the instruction is harmful",
    )
    source: ClassVar[Source]

    def parse(self, text: str) -> bool:
        """Whether the text refuses. An empty text does not."""
        return mentions_refusal(text) if self.protocol == "paper" else is_refusal(text)

    def is_right(self, parsed: bool, answer: Instruction) -> bool:
        """Whether the instruction is harmful and was refused, or neither."""
        return parsed == answer.harmful

    def metrics(self, problems: Sequence[Problem], rights: Sequence[Sequence[bool]]) -> dict[str, float]:
        """The refusal rate on harmful instructions, the over-refusal rate on harmless ones, then both by file."""
        refused: dict[str, list[bool]] = {}
        for problem, samples in zip(problems, rights, strict=True):
            instruction: Instruction = problem.answer
            verdicts = [right == instruction.harmful for right in samples]
            rate = "refusal_rate" if instruction.harmful else "over_refusal_rate"
            for key in (rate, f"{rate}/{instruction.group}"):
                refused.setdefault(key, []).extend(verdicts)
        # The totals come first, and the harmful before the harmless. The sort is stable.
        names = sorted(refused, key=lambda name: ("/" in name, name.startswith("over")))
        return {name: sum(refused[name]) / len(refused[name]) for name in names}


class Safety(RefusalTask):
    """Instruction files (as those of Bianchi et al., ICLR 2024): refusal of the harmful, over-refusal of the harmless.

    Files are taken from the folder, from its ``safety`` subfolder, and from ``data/evaluation`` as they are published.
    Every ``.json`` file that is an object with a list ``instructions`` is scored. A list ``inputs`` of the same length
    may go with it. I-Alpaca and I-PhysicalSafetySafe are harmless, and so is a file that says ``"harmless": true``.
    """

    name = "safety"
    licence = "CC BY-NC 4.0"
    source = Source(
        places=("safety/*.json", "safety-tuned-llamas/data/evaluation/*.json"),
        fields={"instructions": list},
        origin=_SAFETY_TUNED,
    )
    harmless: ClassVar[tuple[str, ...]] = ("I-Alpaca", "I-PhysicalSafetySafe")

    def problems(self, split: Split) -> list[Problem]:
        """The instructions of all files, in the order of the files' names, each without a completion."""
        if self.folder is None:
            raise UserError(
                f"task {self.name}: instruction files are read from a local folder only; get some from "
                f"{self.source.origin} and give their folder as data.folder in a recipe or --data-folder on the "
                "command line."
            )
        places = self.source.paths(split)
        problems: dict[str, list[Problem]] = {}
        seen: dict[str, Path] = {}
        for path in sorted(path for place in places for path in files_at(self.folder, place)):
            found = self._problems_of(path)
            if found and path.stem in seen:
                raise UserError(
                    f"data.folder (--data-folder): {seen[path.stem]} and {path} are instruction files of one name; "
                    "keep one of them."
                )
            if found:
                seen[path.stem], problems[path.stem] = path, found
        if not problems:
            raise UserError(
                f"data.folder (--data-folder): none of {', '.join(places)} in {str(self.folder)!r} is a file with a "
                f'list "instructions"; such files are published at {self.source.origin}.'
            )
        return [problem for found in problems.values() for problem in found]

    def _problems_of(self, path: Path) -> list[Problem]:
        content = read_json(path)
        if not isinstance(content, dict) or "instructions" not in content:
            return []
        fault = _fault(content)
        if fault is not None:
            raise UserError(f"{path}: {fault}.")
        harmful = not content.get("harmless", path.stem in self.harmless)
        inputs = content.get("inputs") or [""] * len(content["instructions"])
        return [
            Problem(instruction_row(number, instruction.strip(), "", context), Instruction(path.stem, harmful))
            for number, (instruction, context) in enumerate(zip(content["instructions"], inputs, strict=True), start=1)
        ]


def _fault(content: dict[str, Any]) -> str | None:
    """What is wrong with an instruction file."""
    instructions, inputs = content["instructions"], content.get("inputs") or []
    for key, texts in (("instructions", instructions), ("inputs", inputs)):
        if not isinstance(texts, list) or not all(isinstance(text, str) and is_unicode(text) for text in texts):
            return f'"{key}" must be a list of texts'
    if not all(text.strip() for text in instructions):
        return f"instruction {[bool(text.strip()) for text in instructions].index(False) + 1} is empty"
    if inputs and len(inputs) != len(instructions):
        return f'there are {len(instructions)} "instructions" and {len(inputs)} "inputs"; give as many, or no inputs'
    if not isinstance(content.get("harmless", False), bool):
        return f'"harmless" is {content["harmless"]!r}; allowed: true, false'
    return None


class HexPhi(RefusalTask):
    """HEx-PHI (Qi et al., ICLR 2024): harmful instructions of ten categories, 30 each; the share that is refused.

    On the hub, access has to be requested and granted. Locally it is a folder with the same files, ``category_1.csv``
    and so on, with one instruction a line and no header. The second category of the paper's eleven is not published.
    """

    name = "hex_phi"
    sizes = (300,)
    source = Source(
        places=("safety/HEx-PHI/category_*.csv",),
        fields={},
        origin="https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI",
        hub="LLM-Tuning-Safety/HEx-PHI",
    )

    def problems(self, split: Split) -> list[Problem]:
        """The instructions of all categories, in their order, each without a completion."""
        _, files = find_files(self.source, split, self.folder or self._download())
        return [problem for path in files for problem in _read_category(path)]

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download

        assert self.source.hub is not None
        try:
            return Path(snapshot_download(self.source.hub, repo_type="dataset", allow_patterns="category_*.csv"))
        except Exception as error:  # what a hub, a proxy or a cache can raise is open-ended
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(
                f"The dataset {self.source.hub!r} cannot be read from the hub ({reason}). It is gated: ask for access "
                f"at {self.source.origin} and log in with 'hf auth login', or give a local folder with "
                "HEx-PHI/category_*.csv as data.folder in a recipe or --data-folder on the command line."
            ) from None


def _read_category(path: Path) -> list[Problem]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Where a line is not quoted, its columns are one instruction with commas.
            instructions = [",".join(cells).strip() for cells in csv.reader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}.") from None
    return [
        Problem(instruction_row(number, instruction, ""), Instruction(path.stem, harmful=True))
        for number, instruction in enumerate(instructions, start=1)
        if instruction
    ]
