"""Translates a chat template into the language of Ollama, where that is possible.

Chat templates are Jinja, and Ollama's are templates of Go. A chat template is rendered on conversations of marks, and
cut into what it writes before, between and behind the turns. A template of Go that writes the same around the turns is
then compared with the chat template on other conversations. It is used if all of them come out alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PLAIN = "{{ .Prompt }}"
"""The template of a model that was trained without a chat template."""

_SYSTEM, _FIRST, _ANSWER, _SECOND = "MARKSYSTEMA", "MARKUSERA", "MARKANSWERA", "MARKUSERB"
_OTHERS = ("Is it? Yes: 3 < 4.", "No.", "ab c", "Then, what?", "x = 3 + 4", "Go on")


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the turns of a conversation.

    Attributes:
        opening: before the first question, where there is no system's text.
        before_system: before the system's text; None where the template takes none.
        after_system: behind it.
        before_user: before each question.
        after_user: behind each question.
        before_answer: between the end of a question and an answer that was given.
        after_answer: behind an answer.
        asking: what asks for the next answer, behind the last question.
    """

    opening: str
    before_system: str | None
    after_system: str
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str
    asking: str

    def write(self, conversation: Sequence[dict[str, str]]) -> str:
        """A conversation as the template of Go writes it."""
        system = [turn["content"] for turn in conversation if turn["role"] == "system"]
        parts = [f"{self.before_system}{system[0]}{self.after_system}" if system else self.opening]
        for turn in conversation:
            if turn["role"] == "user":
                parts.append(f"{self.before_user}{turn['content']}{self.after_user}")
            elif turn["role"] == "assistant":
                parts.append(f"{self.before_answer}{turn['content']}{self.after_answer}")
        return "".join([*parts, self.asking])

    def in_go(self) -> str:
        """The template of Go."""
        opening = self.opening
        if self.before_system is not None:
            system = f"{self.before_system}{{{{ .System }}}}{self.after_system}"
            otherwise = f"{{{{ else }}}}{self.opening}" if self.opening else ""
            opening = f"{{{{ if .System }}}}{system}{otherwise}{{{{ end }}}}"
        user = f"{self.before_user}{{{{ .Content }}}}{self.after_user}"
        answer = f"{self.before_answer}{{{{ .Content }}}}{self.after_answer}"
        return (
            f'{opening}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}{self.asking}'
        )


def turns_of(tokenizer: Any) -> Turns | None:
    """What a tokenizer's chat template writes around the turns; None where Ollama's language cannot express it.

    What it does with tools, thoughts and parts of a content is left aside.

    Args:
        tokenizer: with a chat template. Where it puts a token before every text, as llama.cpp then does too, the
            template of Go is without that token.
    """
    # The date of the export would stay in the translated template for ever.
    if "strftime_now" in str(tokenizer.chat_template):
        return None
    turns = _cut(tokenizer)
    if turns is None or any(mark in text for text in vars(turns).values() if text for mark in ("{{", "}}", '"""')):
        return None
    for takes_system in (False, True) if turns.before_system is not None else (False,):
        for length in (1, 3, 5):
            roles = ["user", "assistant"] * 3
            talk = [{"role": role, "content": text} for role, text in zip(roles, _OTHERS, strict=True)][:length]
            if takes_system:
                talk.insert(0, {"role": "system", "content": "Be brief; say 'no'."})
            if _written(tokenizer, talk) != turns.write(talk):
                return None
    return turns


def _cut(tokenizer: Any) -> Turns | None:
    ask, answer = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}
    talk = [ask, answer, {"role": "user", "content": _SECOND}]
    with_system = _written(tokenizer, [{"role": "system", "content": _SYSTEM}, *talk])
    pieces = _between(_written(tokenizer, talk), _FIRST, _ANSWER, _SECOND)
    if pieces is None:
        return None
    head, before_answer, between, tail = pieces
    before_user = _common_end(head, between)
    if (system := _between(with_system, _SYSTEM, _FIRST, _ANSWER, _SECOND)) is not None:
        before_user = _common_end(before_user, system[1])
    # The end of a turn belongs to that turn, wherever else it stands.
    if (end := tokenizer.eos_token) and end in before_user:
        before_user = before_user.rpartition(end)[2].lstrip()
    after_user = _common_end(before_answer[::-1], tail[::-1])[::-1]
    return Turns(
        opening=head[: len(head) - len(before_user)],
        before_system=None if system is None else system[0],
        after_system="" if system is None else system[1][: len(system[1]) - len(before_user)],
        before_user=before_user,
        after_user=after_user,
        before_answer=before_answer[len(after_user) :],
        after_answer=between[: len(between) - len(before_user)],
        asking=tail[len(after_user) :],
    )


def _common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    length = 0
    while length < min(len(one), len(other)) and one[-length - 1] == other[-length - 1]:
        length += 1
    return one[len(one) - length :]


def _between(text: str | None, *marks: str) -> list[str] | None:
    """What stands before, between and behind marks, each of which must be there once and in that order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def _written(tokenizer: Any, conversation: list[dict[str, str]]) -> str | None:
    """A conversation as the chat template writes it, ready for the next answer; None where it refuses it."""
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template can raise what it likes
        return None
    first = tokenizer("x").input_ids[:1]
    if tokenizer.bos_token is not None and first == [tokenizer.bos_token_id]:
        return text.removeprefix(tokenizer.bos_token)
    return text
