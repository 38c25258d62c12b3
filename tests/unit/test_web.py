"""The endpoints' guards, without a process: who may have adapters loaded, and which names the server answers to."""

from __future__ import annotations

import json

import pytest
from adapters_to_serve import make_adapter
from test_serving_engine import Served

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from diablo.serving.prompts import PromptsByAdapter
from diablo.web.app import Access, Server
from diablo.web.asking import Asking, Bounds


@pytest.fixture
def ask(tiny_model, tmp_path):
    """Makes a client of a server for somebody who has access to it in a given way."""
    served = Served(tiny_model, {"a": make_adapter(tiny_model, tmp_path / "a", 0)})
    prompts = PromptsByAdapter(served.tokenizer, [served.tokenizer.eos_token_id])
    asking = Asking("base", served.adapters, prompts, Bounds(256, 20, 32, 1000, len(served.tokenizer)))
    served.engine.start()

    def client(host: str = "http://127.0.0.1:8000", **access: object) -> TestClient:
        app = Server(served.engine, asking, served.tokenizer, Access(**access)).app  # type: ignore[arg-type]
        return TestClient(app, base_url=host)

    yield client
    served.engine.stop()


def test_adapters_are_loaded_by_requests_only_where_there_is_a_key_or_this_machine_alone_asks(ask, tmp_path):
    body = {"lora_name": "b", "lora_path": str(tmp_path / "a")}
    assert ask(is_loopback=False).post("/v1/load_lora_adapter", json=body).status_code == 403
    assert ask(is_loopback=False).delete("/v1/models/a").status_code == 403
    assert ask().post("/v1/load_lora_adapter", json=body).status_code == 200
    keyed = ask(is_loopback=False, api_key="k")
    assert keyed.delete("/v1/models/a").status_code == 401
    assert keyed.delete("/v1/models/a", headers={"Authorization": "Bearer k"}).json()["deleted"] is True


def test_a_server_of_this_machine_alone_answers_to_its_names_alone(ask):
    for host in ("http://localhost:8000", "http://127.0.0.1:8000", "http://[::1]:8000"):
        assert ask(host).get("/health").status_code == 200
    assert ask("http://attacker.example:8000").get("/health").status_code == 400
    assert ask("http://our.example", is_loopback=False).get("/health").status_code == 200


def test_the_base_model_is_neither_replaced_nor_removed_and_long_prompts_are_refused(ask, tmp_path):
    client = ask()
    body = {"lora_name": "base", "lora_path": str(tmp_path / "a"), "load_inplace": True}
    assert "is the base model" in client.post("/v1/load_lora_adapter", json=body).json()["error"]["message"]
    assert client.delete("/v1/models/base").status_code == 400
    answer = client.post("/v1/completions", json={"model": "a", "prompt": "Ann had 3 apples. " * 9})
    assert answer.json()["error"]["code"] == "prompt_too_long"


def test_what_is_neither_text_nor_a_conversation_is_refused(ask):
    client = ask()

    def message(path: str, **body: object) -> str:
        content = json.dumps({"model": "a", **body})
        answer = client.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    for wrong in ({"prompt": "\ud800"}, {"prompt": "x", "key\ud800": 1}, {"prompt": "x", "stop": "\ud800"}):
        assert "no Unicode" in message("completions", **wrong)
    assert "messages.0.role" in message("chat/completions", messages=[{"role": "tool", "content": "x"}])
    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert "messages.0.content" in message("chat/completions", messages=[{"role": "user", "content": [image]}])
    asked = [{"role": "user", "content": "x"}]
    assert "tools: found" in message("chat/completions", messages=asked, tools=[{"type": "function"}])
    assert "set logprobs to true" in message("chat/completions", messages=asked, top_logprobs=2)
