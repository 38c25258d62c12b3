"""Chat templates in Ollama's language: what Go writes is what the chat template writes, or nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from diablo.publishing.go_template import Turns, turns_of

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja")) if "_training" not in path.stem}
TALK = [
    {"role": "user", "content": 'How many "x" <b>?\nOr y & z'},
    {"role": "assistant", "content": "Four {{.}} {% raw"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "OK"},
]
SYSTEM = {"role": "system", "content": "Be 'brief'"}
GO = """package main
import ("bytes"; "encoding/json"; "os"; "strings"; "text/template")
type Message struct { Role string `json:"role"`; Content string `json:"content"` }
type Case struct { Template string; Messages []*Message }
func main() {
  var cases []Case
  if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
  written := []string{}
  for _, each := range cases {
    system := []string{}
    for _, message := range each.Messages { if message.Role == "system" { system = append(system, message.Content) } }
    parsed := template.Must(template.New("").Option("missingkey=zero").Parse(each.Template))
    var out bytes.Buffer
    values := map[string]any{"System": strings.Join(system, " "), "Messages": each.Messages, "Response": ""}
    if err := parsed.Execute(&out, values); err != nil { panic(err) }
    written = append(written, out.String())
  }
  json.NewEncoder(os.Stdout).Encode(written)
}
"""


@pytest.fixture
def tokenizer(tiny_model) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def conversations(turns: Turns) -> list[list[dict[str, str]]]:
    talks = [TALK[:length] for length in (1, 3, 5)]
    return talks + ([[SYSTEM, *talk] for talk in talks] if turns.before_system is not None else [])


def written(tokenizer: Any, talk: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


def test_a_template_that_can_be_said_writes_other_conversations_alike(tokenizer):
    said = []
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        if (turns := turns_of(tokenizer)) is not None:
            said.append(name)
            for talk in conversations(turns):
                assert turns.write(talk) == written(tokenizer, talk), name
    assert {"llama3", "qwen2_5", "qwen3", "gemma3", "phi3", "deepseekv3"} <= set(said)


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_writes_what_the_chat_template_writes(tokenizer, tmp_path):
    cases, expected = [], []
    for template in (tokenizer.chat_template, *TEMPLATES.values()):
        tokenizer.chat_template = template
        if (turns := turns_of(tokenizer)) is not None:
            for talk in conversations(turns):
                cases.append({"Template": turns.in_go(), "Messages": talk})
                expected.append(written(tokenizer, talk))
    (tmp_path / "main.go").write_text(GO)
    environment = os.environ | {"GO111MODULE": "off", "GOCACHE": str(tmp_path / "cache")}
    command = ["go", "run", "main.go"]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ strftime_now('%Y') }}{{ messages[-1].content }}", id="the date of the day"),
        pytest.param("{% for m in messages %}{{ m.content | upper }}{% endfor %}", id="changes what is said"),
        pytest.param("{{ messages[-1].content }}", id="forgets the turns before"),
        pytest.param("{% for m in messages %}{{ loop.index }}:{{ m.content }}\n{% endfor %}", id="counts the turns"),
        pytest.param("{% for m in messages %}{{ '{{' + m.content }}{% endfor %}", id="writes what Go would read"),
        pytest.param("{{ raise_exception('no') }}", id="refuses"),
    ],
)
def test_what_cannot_be_said_in_go_is_not_said(tokenizer, template):
    tokenizer.chat_template = template
    assert turns_of(tokenizer) is None


def test_a_token_that_the_engine_puts_before_every_text_is_not_written_twice(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert turns_of(tokenizer).opening.startswith("<s>")
    before = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = before
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert "<s>" not in turns_of(tokenizer).in_go()
