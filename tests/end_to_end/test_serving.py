"""``diablo serve`` as its users meet it: a process, the official client, adapters that come and go, and its end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from adapters_to_serve import PROMPTS, make_adapter
from launching import forked_python

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

KEY = "a key of the tests"
LONG = 150


class Server:
    """A server in a process of its own."""

    def __init__(self, model: Path, *arguments: object) -> None:
        command = [forked_python(), "-m", "diablo_cli", "serve", model, "--port", 0, "--precision", "fp32", *arguments]
        descriptor, name = tempfile.mkstemp(suffix=".log")
        self.log, self._stderr = Path(name), os.fdopen(descriptor, "w")
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=self._stderr, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Serving "), self.log.read_text()
        self.url = re.findall(r"http://[^/ ]+(?=/v1)", line)[0]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def get(self, path: str, **headers: str) -> str:
        return (
            urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30).read().decode()
        )

    def post(self, path: str, content: bytes, **headers: str) -> tuple[int, dict]:
        """A request that no client would make; its status and its error."""
        request = urllib.request.Request(self.url + path, content, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, {}
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]

    def metric(self, name: str) -> float:
        lines = self.get("/metrics", Authorization=f"Bearer {KEY}").splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._stderr.close()
        self.log.unlink()


def until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    for seed, name in enumerate("bc", start=1):
        make_adapter(tiny_model, folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_model) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("first") / "a", seed=0)


@pytest.fixture(scope="module")
def server(tiny_model, watched, first) -> Iterator[Server]:
    limits = ["--max-tokens", LONG, "--queue", 8, "--batch-size", 2, "--turn", 4, "--max-body", 0.01]
    server = Server(tiny_model, "--adapter", f"a={first}", "--adapters", watched, "--api-key", KEY, *limits)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server):
    return server.client


def test_models_are_listed_and_what_there_is_not_is_not_found(client):
    models = client.models.list().data
    assert [(model.id, model.parent) for model in models] == [("model", None), *((name, "model") for name in "abc")]
    assert client.models.retrieve("b").form == "chat"
    with pytest.raises(openai.NotFoundError, match="there is no 'd'"):
        client.models.retrieve("d")
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="modell", prompt="x")
    assert "Did you mean model?" in missing.value.message
    assert missing.value.code == "model_not_found"


def test_answers_at_the_same_time_are_those_that_diablo_generate_gives(client, diablo, tiny_model, watched, first):
    folders = {"model": tiny_model, "a": first, "b": watched / "b", "c": watched / "c"}

    def asked(name: str, prompt: str) -> str:
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=10, temperature=0)
        return answer.choices[0].text.strip()

    pairs = [(name, prompt) for prompt in PROMPTS[:2] for name in folders]
    with ThreadPoolExecutor(len(pairs)) as threads:
        answers = dict(zip(pairs, threads.map(lambda pair: asked(*pair), pairs), strict=True))
    for (name, prompt), answer in answers.items():
        status, out, _ = diablo("generate", folders[name], prompt, "--max-new-tokens", 10, "--no-chat", "--json")
        assert status == 0
        assert json.loads(out)["text"] == answer, (name, prompt)


def test_a_conversation_is_answered_whole_and_as_a_stream_with_the_same_text(client):
    asked = {
        "model": "a",
        "messages": [
            {"role": "developer", "content": "short"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    assert (whole.choices[0].message.role, whole.choices[0].finish_reason) == ("assistant", "length")
    assert whole.usage.completion_tokens == 8
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 8
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]


def test_choices_seeds_and_stop_strings(client):
    def texts(**options: object) -> list[str]:
        answer = client.completions.create(model="b", prompt="The", max_tokens=12, **options)
        return [choice.text for choice in answer.choices]

    three = texts(n=3, seed=5)
    assert len(set(three)) == 3
    assert texts(n=1, seed=5) == three[:1]
    assert texts(n=3, seed=5) == three
    (whole,) = texts(temperature=0)
    assert texts(temperature=0, stop=whole[4:6]) == [whole[: whole.index(whole[4:6])]]
    two = client.completions.create(model="b", prompt=["The", "user asks"], max_tokens=12, temperature=0)
    assert (len(two.choices), two.choices[0].text) == (2, whole)


def test_logprobs_in_both_forms(client):
    (choice,) = client.completions.create(model="a", prompt="x", max_tokens=3, temperature=0, logprobs=2).choices
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 3
    assert all(value < 0 for value in choice.logprobs.token_logprobs)
    messages = [{"role": "user", "content": "x"}]
    asked = {"model": "a", "messages": messages, "max_tokens": 3, "temperature": 0, "logprobs": True}
    answer = client.chat.completions.create(**asked, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert [token.top_logprobs[0].logprob for token in tokens] == [token.logprob for token in tokens]
    assert bytes(tokens[0].bytes).decode() == tokens[0].token
    chunks = client.chat.completions.create(**asked, top_logprobs=2, stream=True)
    streamed = [each for chunk in chunks for part in chunk.choices if part.logprobs for each in part.logprobs.content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in tokens], abs=1e-4)


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"max_tokens": LONG + 1}, "max_tokens", "writes up to 150 tokens"),
        ({"max_tokens": 0}, "max_tokens", "found 0"),
        ({"prompt": "word " * 300}, None, "a prompt and its answer have room for 256 in all"),
        (
            {"prompt": "a b c d e f g h i j k l m n o p q r s t u v w x y z" * 4, "max_tokens": 150},
            None,
            "are asked for",
        ),
        ({"prompt": [1, 100_000]}, "prompt", "token ids"),
        ({"prompt": ""}, "prompt", "found an empty prompt"),
        ({"temperature": 3}, "temperature", "found 3"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "which this server does not do"),
        ({"extra_body": {"top_q": 1}}, "top_q", "top_q: unknown key. Did you mean top_p?"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    ],
)
def test_what_cannot_be_done_is_refused_by_a_message_that_names_it(client, asked, param, message):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**({"model": "a", "prompt": "x"} | asked))
    assert message in refused.value.message
    assert refused.value.param == param


def test_requests_that_are_none(server):
    own = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert server.post("/v1/completions", b"{}", **{"Content-Type": "application/json"})[0] == 401
    assert (
        server.post("/v1/completions", b"{}", **own | {"Authorization": "Bearer other"})[1]["code"] == "invalid_api_key"
    )
    assert server.post("/v1/completions", b"{", **own)[1]["code"] == "invalid_json"
    assert server.post("/v1/completions", b"[]", **own)[0] == 400
    assert server.post("/v1/completions", b" " * 20_000, **own)[0] == 413
    # A page of another site can send this without asking.
    assert server.post("/v1/completions", b"{}", **own | {"Content-Type": "text/plain"})[0] == 415
    assert server.post("/v1/models", b"{}", **own)[0] == 405
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.get("/health", Host="attacker.example")


def test_adapters_are_added_replaced_and_removed_while_others_are_asked(server, client, tiny_model, watched, tmp_path):
    def text(name: str) -> str:
        return client.completions.create(model=name, prompt="The quick", max_tokens=8, temperature=0).choices[0].text

    def load(path: Path, **more: object) -> None:
        client.post("/load_lora_adapter", body={"lora_name": "new", "lora_path": str(path), **more}, cast_to=str)

    before = {name: text(name) for name in "bc"}
    load(watched / "b")
    assert text("new") == before["b"]
    with pytest.raises(openai.BadRequestError, match="there is an adapter 'new' already"):
        load(watched / "c")
    load(watched / "c", load_inplace=True)
    assert text("new") == before["c"]
    client.models.delete("new")
    with pytest.raises(openai.NotFoundError):
        text("new")
    with pytest.raises(openai.BadRequestError, match="there is no folder"):
        load(tmp_path / "none")
    # By files: a new folder is an adapter as soon as it is whole, and its requests fail alone where it is broken.
    shutil.copytree(watched / "b", watched / "d")
    until(lambda: "d" in [model.id for model in client.models.list()])
    assert text("d") == before["b"]
    broken = shutil.copytree(watched / "b", tmp_path / "broken")
    os.truncate(broken / "adapter_model.safetensors", 100)
    broken.rename(watched / "broken")
    until(lambda: "broken" in [model.id for model in client.models.list()])
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match="cannot be read") as failed:
            client.completions.create(model="broken", prompt="x", stream=stream)
        assert failed.value.status_code == 424
    assert "cannot be read" in client.models.retrieve("broken").fault
    assert text("c") == before["c"]
    for name in ("d", "broken"):
        shutil.rmtree(watched / name)
    until(lambda: [model.id for model in client.models.list()] == ["model", *"abc"])


def test_a_client_that_goes_away_frees_its_row(server, client):
    def all_free() -> bool:
        return server.metric("diablo_rows_running") + server.metric("diablo_rows_waiting") == 0

    def is_given_up() -> bool:
        # A busy machine may let the server write all of an answer before it lets the client go away.
        opened = client.completions.create(model="a", prompt="x", max_tokens=LONG, n=8, stream=True)
        next(iter(opened))
        opened.close()
        until(all_free)
        return any(event.get("status") == 499 for event in server.events())

    until(is_given_up)
    written = server.metric("diablo_completion_tokens_total")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(model="a", prompt="x", max_tokens=LONG, n=8)
    until(all_free)
    assert server.metric("diablo_completion_tokens_total") - written < 8 * LONG


def test_a_full_queue_is_told_with_a_time_to_ask_again(server, client):
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="a", prompt="x", max_tokens=LONG, n=9)
    assert full.value.response.headers["retry-after"] == "1"
    assert full.value.code == "queue_full"
    assert server.metric("diablo_rows_waiting") == 0


def test_metrics_and_the_log_tell_what_was_done_and_no_prompt(server, client):
    client.completions.create(model="a", prompt="a secret word", max_tokens=2)
    assert server.metric("diablo_switches_total") > 0
    assert server.metric("diablo_first_token_seconds_count") > 0
    text = server.get("/metrics", Authorization=f"Bearer {KEY}")
    assert 'diablo_requests_total{path="/v1/completions",status="200"}' in text
    answered = [event for event in server.events() if event["event"] == "answered"][-1]
    assert (answered["model"], answered["completion_tokens"], answered["status"]) == ("a", 2, 200)
    assert "secret" not in server.log.read_text()
    assert json.loads(server.get("/health")) == {"status": "ok"}


def test_sigterm_in_the_middle_of_a_stream_finishes_it_and_refuses_others(tiny_model, first):
    server = Server(tiny_model, "--adapter", f"a={first}", "--max-tokens", 240, "--name", "base")
    try:
        opened = server.client.completions.create(
            model="a", prompt="x", max_tokens=240, temperature=0, stream=True, extra_body={"stop": "\u2603"}
        )
        stream = iter(opened)
        chunks = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        until(lambda: any(event["event"] == "closing" for event in server.events()))
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)) as refused:
            server.client.completions.create(model="base", prompt="x")
        assert getattr(refused.value, "status_code", 503) == 503
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert server.process.wait(timeout=60) == 0
        assert server.events()[-1]["event"] == "stopped"
    finally:
        server.close()


def test_what_takes_longer_than_the_grace_is_told_so_and_a_run_is_served_by_its_own_name(tiny_model, first):
    # Eight answers, one after the other: none of them knows how soon the signal arrives.
    server = Server(first, "--grace", 0, "--max-tokens", 240, "--batch-size", 1)
    try:
        assert [model.id for model in server.client.models.list()] == ["model", "a"]
        stream = iter(server.client.completions.create(model="a", prompt="x", max_tokens=240, n=8, stream=True))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="The server has ended"):
            for _ in stream:
                pass
        assert server.process.wait(timeout=60) == 0
    finally:
        server.close()


def test_an_adapter_that_does_not_fit_is_refused_at_the_start(diablo, tiny_model, first, tmp_path):
    other = shutil.copytree(first, tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"base_digest": "float32:00"}))
    status, _, errors = diablo("serve", tiny_model, "--adapter", f"a={other}", "--port", 0, "--precision", "fp32")
    assert status == 2
    assert "was made for base weights that differ" in errors
