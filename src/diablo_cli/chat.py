"""Talking to a model on the terminal, with the base model's answer beside the adapter's where it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer, set_seed

from diablo.data import Row, RowEncoder
from diablo.errors import UserError
from diablo.scoring.generation import generate

HELP = """\
/base          answer the last question with the base model, beside the adapter's answer
/system TEXT   put TEXT before the conversation; without TEXT, take it away
/undo          take back the last question and its answer
/reset         start again; the system's text stays
/save FILE     write the conversation as a .jsonl dataset that diablo train reads
/help          show this
/quit          leave, as Ctrl-D does
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""


@dataclass
class Conversation:
    """What was said so far, and the prompt that a further question makes.

    Without a chat template each question is a prompt by itself, since that is what the model was trained on.

    Args:
        encoder: turns rows into tokens as in training.
        room: the longest prompt, in tokens; None where the model has no limit.
    """

    encoder: RowEncoder
    room: int | None = None
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, question: str) -> tuple[list[int], int]:
        """The tokens of a question after as much of the conversation as there is room for.

        Returns:
            The tokens, and how many turns at the front are left out of them.

        Raises:
            UserError: the question alone is too long, or the chat template refuses the conversation.
        """
        earlier = len(self.turns) if self.encoder.chat else 0
        for left_out in range(earlier + 1):
            tokens = self.encoder.prompt(self._row(self.turns[left_out:], question))
            if self.room is None or len(tokens) <= self.room:
                return tokens, left_out
        raise UserError(f"The question has {len(tokens)} tokens, and the model's context has room for {self.room}.")

    def rows(self) -> list[dict[str, Any]]:
        """The conversation as rows of a dataset."""
        if not self.encoder.chat:
            return [{"prompt": question, "completion": answer} for question, answer in self.turns]
        return [{"messages": self._messages(self.turns)}] if self.turns else []

    def _row(self, turns: list[tuple[str, str]], question: str) -> Row:
        if not self.encoder.chat:
            return Row(1, question, "?")
        # The encoder's prompt is what precedes the last answer, which is not there yet.
        return Row(len(turns) + 1, messages=tuple(self._messages([*turns, (question, "?")])))

    def _messages(self, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


class Chat:
    """A conversation with a model, line by line.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns rows into tokens as in training.
        console: where answers go.
        notes: where all else goes, such as what a command has done; as ``console`` if None.
        max_new_tokens: length limit of an answer.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.
    """

    def __init__(
        self,
        model: Any,
        encoder: RowEncoder,
        console: Console,
        *,
        notes: Console | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # An answer may be shorter than its limit, and half of the context is the conversation's in any case.
        room = context - min(max_new_tokens, context // 2) if context else None
        self.model = model
        self.console, self._notes = console, notes or console
        self.conversation = Conversation(encoder, room)
        self._encoder = encoder
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if temperature:
            self._options |= {"do_sample": True, "temperature": temperature}
        self._seed = seed
        self._left_out = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/base": self._show_base,
            "/system": self._set_system,
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self._say(HELP),
        }

    def run(self, read: Callable[[], str | None]) -> None:
        """Answer lines until there are no more, or one says ``/quit``.

        Args:
            read: gives the next line; None where there are no more.
        """
        form = "its chat template" if self._encoder.chat else "each question completed by itself, as in training"
        self._say(f"Talking to the model with {form}. /help lists the commands.")
        while True:
            # All of it, so that there is no moment at which Ctrl-C ends the program.
            try:
                line = read()
                if line is None or line.strip() == "/quit":
                    return
                self._take(line.strip())
            except UserError as fault:
                self._say(str(fault))
            except KeyboardInterrupt:
                self.console.print()

    def _take(self, text: str) -> None:
        command, _, argument = text.partition(" ")
        if command in self._commands:
            self._commands[command](argument.strip())
        elif command.startswith("/"):
            raise UserError(f"There is no command {command}; allowed: {', '.join([*self._commands, '/quit'])}.")
        elif text:
            self._ask(text)

    def _ask(self, question: str) -> None:
        prompt, left_out = self.conversation.prompt(question)
        if left_out > self._left_out:
            self._say(f"The conversation exceeds the model's context: its first {left_out} turns are left out.")
        self._left_out = left_out
        self.conversation.turns.append((question, self._answer(prompt, self.console)))

    def _answer(self, prompt: list[int], shown_on: Console | None) -> str:
        """The model's answer, shown as it comes; what there is of it where the user stops it."""
        streamer = _Streamer(self._encoder.tokenizer, shown_on)
        set_seed(self._seed)
        try:
            generate(self.model, self._encoder, [prompt], streamer=streamer, **self._options)
        except KeyboardInterrupt:
            self.console.print()
            self._say("stopped")
        return streamer.text.strip()

    def _show_base(self, _: str) -> None:
        if not isinstance(self.model, PeftModel):
            raise UserError("This model has no adapter that could be taken off.")
        (question, answer), prompt = self._last()
        with self.console.status("the base model answers"), self.model.disable_adapter():
            base_answer = self._answer(prompt, None)
        table = Table("adapter", "base model", title=Text(question), expand=True)
        for column in table.columns:
            column.ratio = 1
        table.add_row(Text(answer), Text(base_answer))
        self.console.print(table)

    def _last(self) -> tuple[tuple[str, str], list[int]]:
        """The last turn, and the prompt that it answered."""
        turns = self.conversation.turns
        if not turns:
            raise UserError("There is no question yet.")
        last = turns.pop()
        try:
            return last, self.conversation.prompt(last[0])[0]
        finally:
            turns.append(last)

    def _set_system(self, text: str) -> None:
        if not self._encoder.chat:
            raise UserError("/system needs a chat template: start diablo chat with --chat, where the model has one.")
        self.conversation.system = text
        self._say("The system's text is set." if text else "The system's text is taken away.")

    def _undo(self, _: str) -> None:
        if not self.conversation.turns:
            raise UserError("There is no question yet.")
        question, _answer = self.conversation.turns.pop()
        self._say(f"Taken back: {question}")

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        self._left_out = 0
        self._say("The conversation starts again.")

    def _save(self, name: str) -> None:
        rows = self.conversation.rows()
        if not rows:
            raise UserError("There is nothing to save yet.")
        path = Path(name)
        if path.suffix != ".jsonl":
            raise UserError(f"/save: found {name!r}; give a file that ends with .jsonl.")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise UserError(f"/save: {name!r} cannot be written: {error.strerror}.") from None
        self._say(f"Wrote {path}.")

    def _say(self, text: str) -> None:
        self._notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


class _Streamer(TextStreamer):
    """Keeps text as it is generated, and shows it where there is a console."""

    def __init__(self, tokenizer: Any, console: Console | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take a piece of text."""
        self.text += text
        if self.console is not None:
            self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def read_line(console: Console) -> str | None:
    """A line from the terminal, or from standard input where that is none; None at its end.

    A line that ends with a backslash is joined with the next.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        # Gives input() a history and the keys that move in a line; Windows has it built in.
        with suppress(ImportError):
            import readline  # noqa: F401
    parts: list[str] = []
    while not parts or parts[-1].endswith("\\"):
        try:
            parts.append(input(("... " if parts else "> ") if interactive else ""))
        except EOFError:
            if interactive:
                console.print()
            break
    return "\n".join(part.removesuffix("\\") for part in parts) if parts else None
