"""Talking to the tiny model: in this process on lists of lines, and once as the real command with piped input."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_python
from peft import get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, GenerationConfig

from diablo import DiabloConfig
from diablo.data import RowEncoder, read_rows
from diablo.errors import UserError
from diablo.models.loading import load_tokenizer
from diablo.scoring.generation import generate
from diablo_cli.chat import Chat, Conversation, read_line


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """An adapter that makes the tiny model say something else."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=names, task_type="CAUSAL_LM"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return adapted


@pytest.fixture
def encoder(tiny_model: Path) -> RowEncoder:
    return RowEncoder(load_tokenizer(str(tiny_model)), chat=True)


def said(model: Any, encoder: RowEncoder, *lines: str, console: Console | None = None, **options: Any) -> str:
    console = console or Console(file=io.StringIO(), width=400)
    chat = Chat(model, encoder, console, **({"max_new_tokens": 8} | options))
    remaining = iter(lines)
    chat.run(lambda: next(remaining, None))
    return console.file.getvalue()


def answer(model: Any, encoder: RowEncoder, text: str, max_new_tokens: int = 8) -> str:
    """The model's answer to a rendered prompt."""
    prompt = encoder.tokenizer(text).input_ids
    [completion] = generate(model, encoder, [prompt], max_new_tokens=max_new_tokens)
    return completion.strip()


def test_the_conversation_goes_on_through_the_chat_template(model: Any, encoder: RowEncoder, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    out = said(model, encoder, "/system be kind", "the dog", "", "the fox", f"/save {path}", "/quit", "never read")
    [row] = [json.loads(line) for line in path.read_text().splitlines()]
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    _, first_question, first, second_question, second = (message["content"] for message in row["messages"])
    assert (first_question, second_question) == ("the dog", "the fox")
    start = "<s>system\nbe kind</s>\n<s>user\nthe dog</s>\n<s>assistant\n"
    assert first == answer(model, encoder, start)
    assert second == answer(model, encoder, f"{start}{first}</s>\n<s>user\nthe fox</s>\n<s>assistant\n")
    assert first in out
    assert second in out
    # What is saved can be trained on.
    assert len(read_rows(path)[0]) == 1


def test_undo_and_reset_take_turns_back(model: Any, encoder: RowEncoder, tmp_path: Path) -> None:
    path, after_reset = tmp_path / "talk.jsonl", tmp_path / "reset.jsonl"
    lines = ["the dog", "the fox", "/undo", f"/save {path}", "/reset", f"/save {after_reset}", "/undo"]
    out = said(model, encoder, *lines)
    [row] = [json.loads(line) for line in path.read_text().splitlines()]
    assert [message["content"] for message in row["messages"][::2]] == ["the dog"]
    assert "Taken back: the fox" in out
    assert "There is nothing to save yet." in out
    assert out.strip().endswith("There is no question yet.")
    assert not after_reset.exists()


def test_base_shows_both_answers_side_by_side(model: Any, encoder: RowEncoder) -> None:
    prompt = "<s>user\nthe [b]dog[/b]</s>\n<s>assistant\n"
    adapted = answer(model, encoder, prompt)
    with model.disable_adapter():
        base = answer(model, encoder, prompt)
    assert adapted != base
    out = said(model, encoder, "the [b]dog[/b]", "/base", "/base")
    tables = out.partition("adapter")[2]
    assert adapted in tables
    assert tables.count(base) == 2  # asking for the base model's answer does not enter the conversation
    assert "the [b]dog[/b]" in out
    assert answer(model, encoder, prompt) == adapted


def test_a_model_without_an_adapter_has_no_base(tiny_model: Path, encoder: RowEncoder) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert "no adapter that could be taken off" in said(plain, encoder, "the dog", "/base")


def test_without_a_template_each_question_is_a_prompt_by_itself(model: Any, tiny_model: Path, tmp_path: Path) -> None:
    plain = RowEncoder(load_tokenizer(str(tiny_model)))
    path = tmp_path / "talk.jsonl"
    out = said(model, plain, "the dog", "the fox", "/system be kind", f"/save {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"prompt": text, "completion": answer(model, plain, text)} for text in ("the dog", "the fox")]
    assert "/system needs a chat template" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bace", "There is no command /bace; allowed: /base, /system"),
        ("/base", "There is no question yet."),
        ("/help", "/undo          take back"),
        ("apples " * 300, "tokens, and the model's context has room for 248"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(
    model: Any, encoder: RowEncoder, line: str, message: str
) -> None:
    out = said(model, encoder, line, "/undo")
    assert message in out
    assert "There is no question yet." in out


def test_saving_where_it_cannot_be_done_is_said(model: Any, encoder: RowEncoder, tmp_path: Path) -> None:
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine")
    out = said(model, encoder, "the dog", f"/save {taken}", "/save", f"/save {tmp_path}/no/such.jsonl")
    assert taken.read_text() == "mine"
    assert f"{str(taken)!r} cannot be written: File exists." in out
    assert "/save: found ''; give a file that ends with .jsonl." in out
    assert "cannot be written: No such file" in out


def test_a_long_conversation_is_cut_at_the_front_and_says_so(model: Any, encoder: RowEncoder) -> None:
    questions = [f"the dog {n} " + "apples " * 40 for n in range(6)]
    out = said(model, encoder, *questions, max_new_tokens=8)
    assert "The conversation exceeds the model's context: its first 1 turns are left out." in out
    assert out.count("are left out") < len(questions)

    conversation = Conversation(encoder, room=100, system="be kind")
    conversation.turns = [(f"first {n} " + "apples " * 10, "dog") for n in range(9)]
    tokens, left_out = conversation.prompt("the last?")
    text = encoder.tokenizer.decode(tokens)
    assert len(tokens) <= 100
    assert 0 < left_out < 9
    assert text.startswith("<s>system\nbe kind</s>\n<s>user\n" + f"first {left_out} ")
    assert text.endswith("<s>user\nthe last?</s>\n<s>assistant\n")
    # One turn more would not have fitted.
    conversation.room = None
    conversation.turns = conversation.turns[left_out - 1 :]
    assert len(conversation.prompt("the last?")[0]) > 100


class Impatient(Console):
    """A user who presses Ctrl-C at the second piece of the first answer."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=400)
        self.pieces = 0

    def print(self, *texts: Any, **options: Any) -> None:
        super().print(*texts, **options)
        if options.get("end") == "" and texts[0]:
            self.pieces += 1
            if self.pieces == 2:
                raise KeyboardInterrupt


def test_ctrl_c_stops_an_answer_and_not_the_chat(model: Any, encoder: RowEncoder, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    whole = answer(model, encoder, "<s>user\nthe dog</s>\n<s>assistant\n", max_new_tokens=100)
    console = Impatient()
    out = said(model, encoder, "the dog", f"/save {path}", "/undo", console=console, max_new_tokens=100)
    assert "stopped" in out
    assert "Taken back: the dog" in out
    stopped = json.loads(path.read_text())["messages"][-1]["content"]
    assert stopped
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)


def test_sampling_differs_from_greedy_and_repeats_by_seed(model: Any, encoder: RowEncoder) -> None:
    greedy = said(model, encoder, "the dog")
    first, again = (said(model, encoder, "the dog", temperature=5.0, seed=3) for _ in range(2))
    assert first == again != greedy


def test_lines_that_end_with_a_backslash_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Problem: 2 and 3?\\\nEquation:\n/quit\nlast\\\n"))
    lines = [read_line(Console()) for _ in range(5)]
    assert lines == ["Problem: 2 and 3?\nEquation:", "/quit", "last", None, None]


def test_ctrl_c_at_the_prompt_does_not_end_the_chat(model: Any, encoder: RowEncoder) -> None:
    lines: list[Any] = ["the dog", KeyboardInterrupt(), "/undo"]

    def read() -> str | None:
        line = lines.pop(0) if lines else None
        if isinstance(line, KeyboardInterrupt):
            raise line
        return line

    console = Console(file=io.StringIO(), width=400)
    Chat(model, encoder, console, max_new_tokens=8).run(read)
    assert "Taken back: the dog" in console.file.getvalue()


def test_the_command_reads_piped_lines_and_ends_with_them(tiny_model: Path, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "talk.jsonl"
    command = ["-m", "diablo_cli", "chat", tmp_path / "adapter", "--base", tiny_model, "--max-new-tokens", 8]
    result = run_python(*command, given=f"the dog\n/base\n/save {path}\n", settings={"COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "base model" in result.stdout
    # Scripts read the answers alone.
    assert "Talking to the model" in result.stderr
    assert f"Wrote {path}." in result.stderr
    assert "Wrote" not in result.stdout
    assert "Talking" not in result.stdout
    # The tokenizer has a chat template, and no run says that it was not used.
    assert json.loads(path.read_text())["messages"][0] == {"role": "user", "content": "the dog"}


def test_a_model_without_a_run_stops_where_its_configs_say(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tokenizer = load_tokenizer(str(base))
    GenerationConfig(eos_token_id=list(range(len(tokenizer)))).save_pretrained(base)  # any token ends an answer
    path = tmp_path / "talk.jsonl"
    command = ["-m", "diablo_cli", "chat", base, "--max-new-tokens", 8]
    result = run_python(*command, given=f"the dog\n/save {path}\n")
    assert result.returncode == 0, result.stderr
    # One token, which has a part of a character.
    assert len(json.loads(path.read_text())["messages"][1]["content"]) == 1


def test_a_question_alone_that_is_too_long_is_an_error(encoder: RowEncoder) -> None:
    conversation = Conversation(encoder, room=10, turns=[("a", "b")])
    with pytest.raises(UserError, match="has room for 10"):
        conversation.prompt("apples " * 20)
    assert conversation.turns == [("a", "b")]
