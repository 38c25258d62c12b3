"""The endpoints' guards, without a process: who may have adapters loaded, and how much a client may ask for."""

from __future__ import annotations

import json

import pytest
from adapters_to_serve import make_adapter
from hypothesis import given
from hypothesis import strategies as st
from test_serving_engine import Served

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from diablo.serving.prompts import PromptsByAdapter
from diablo.web.app import Access, Server
from diablo.web.asking import Asking, Bounds
from diablo.web.rates import Charge, Rate

SECOND = 1_000_000_000


@pytest.fixture
def ask(tiny_model, tmp_path):
    """Makes a client of a server for somebody who has access to it in a given way."""
    served = Served(tiny_model, {"a": make_adapter(tiny_model, tmp_path / "a", 0)})
    prompts = PromptsByAdapter(served.tokenizer, [served.tokenizer.eos_token_id])
    asking = Asking("base", served.adapters, prompts, Bounds(256, 20, 32, 1000, len(served.tokenizer)))
    served.engine.start()

    def client(host: str = "http://127.0.0.1:8000", **access: object) -> TestClient:
        app = Server(served.engine, asking, served.tokenizer, Access(**access)).app
        return TestClient(app, base_url=host, client=("10.0.0.1", 50000))

    yield client
    served.engine.stop()


def test_adapters_are_loaded_by_requests_only_where_there_is_a_key_or_this_machine_alone_asks(ask, tmp_path):
    body = {"lora_name": "b", "lora_path": str(tmp_path / "a")}
    assert ask(is_loopback=False).post("/v1/load_lora_adapter", json=body).status_code == 403
    assert ask(is_loopback=False).delete("/v1/models/a").status_code == 403
    assert ask().post("/v1/load_lora_adapter", json=body).status_code == 200
    keyed = ask(is_loopback=False, api_keys=["k"])
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


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9), st.integers(0, 70 * SECOND)), max_size=40))
def test_no_client_takes_more_than_its_limit_in_any_minute_and_what_it_is_told_to_wait_is_enough(takes):
    now = 0
    rate = Rate(7, clock=lambda: now)
    taken: dict[str, list[Charge]] = {"a": [], "b": []}
    for client, amount, pause in takes:
        now += pause
        found = rate.take(client, amount)
        within = sum(charge.amount for charge in taken[client] if charge.at > now - 60 * SECOND)
        assert isinstance(found, Charge) == (within + amount <= 7)
        if not isinstance(found, Charge):
            assert (found.seconds is None) == (amount > 7)
            if found.seconds is None:
                continue
            assert 1 <= found.seconds <= 60
            now += found.seconds * SECOND
            found = rate.take(client, amount)
        assert isinstance(found, Charge)
        taken[client].append(found)


def test_a_client_is_forgotten_after_a_minute():
    now = 0
    rate = Rate(7, clock=lambda: now)
    for client in range(100):
        rate.take(client, 1)
    now = 61 * SECOND
    rate.take("x", 1)
    assert list(rate._charges) == ["x"]


def completion(client: TestClient, key: str | None = None, **body: object):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return client.post("/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 2, **body}, headers=headers)


def test_more_requests_than_allowed_are_refused_for_the_key_that_asks_and_for_no_other(ask):
    client = ask(api_keys=["one", "other"], requests=2)
    assert [completion(client, "one").status_code for _ in range(2)] == [200, 200]
    refused = completion(client, "one")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "More than 2 requests a minute" in error["message"]
    assert completion(client, "other").status_code == 200
    assert completion(client, "wrong").status_code == 401
    own = {"Authorization": "Bearer one"}
    # What asks the model for nothing is not counted.
    assert client.get("/v1/models", headers=own).status_code == 200
    metrics = client.get("/metrics", headers=own).text
    assert 'diablo_rate_limited_total{limit="requests"} 1' in metrics
    assert 'diablo_requests_total{path="/v1/completions",status="429"} 1' in metrics


def test_without_keys_a_client_is_known_by_its_address(ask):
    client = ask(requests=1)
    assert [completion(client).status_code for _ in range(2)] == [200, 429]
    other = TestClient(client.app, base_url="http://127.0.0.1:8000", client=("10.0.0.2", 50000))
    assert completion(other).status_code == 200


def test_tokens_count_as_they_were_read_and_written_and_what_could_never_be_answered_is_told_so(ask):
    client = ask(tokens=30)
    prompt = [5, 6, 7, 8]
    assert completion(client, prompt=prompt, max_tokens=5, temperature=0).status_code == 200
    # Nine were used. A stop string ends this one early, and the rest of what it could have taken is free again.
    stopped = completion(client, prompt=prompt, max_tokens=6, temperature=0, stop=completion_text(client)[:1])
    assert stopped.json()["usage"]["total_tokens"] < 10
    left = 30 - 9 - stopped.json()["usage"]["total_tokens"]
    assert completion(client, prompt=prompt, max_tokens=left - 3).status_code == 429
    streamed = completion(client, prompt=prompt, max_tokens=left - 4, stream=True)
    assert "[DONE]" in streamed.text
    refused = completion(client, prompt=prompt, max_tokens=27)
    assert refused.status_code == 429
    assert "Retry-After" not in refused.headers
    assert "may take 31 tokens, and 30 a minute are allowed" in refused.json()["error"]["message"]


def completion_text(client: TestClient) -> str:
    """What the adapter writes behind the tokens 5, 6, 7 and 8, asked by somebody else."""
    other = TestClient(client.app, base_url="http://127.0.0.1:8000", client=("10.0.0.2", 50000))
    return completion(other, prompt=[5, 6, 7, 8], max_tokens=5, temperature=0).json()["choices"][0]["text"]
