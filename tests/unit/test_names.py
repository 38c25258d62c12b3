"""Names that cannot be a model's are refused at once, and a hub that does not answer is asked once."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from diablo.errors import UserError
from diablo.models.loading import load_config
from diablo.models.names import check_name, check_on_hub


@pytest.mark.parametrize("name", ["gpt2", "org/model", "builtin:smollm2-135m"])
def test_what_can_be_a_model_passes_without_asking(name):
    check_name(name)


def test_a_folder_passes_whatever_its_name(tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    check_name(str(folder))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("./no/such", "there is no folder './no/such', which cannot be the id of a model on the hub either"),
        ("/no/such", "there is no folder '/no/such'"),
        ("a b", "there is no folder 'a b'"),
        ("", "there is no folder ''"),
        ("\0", "there is no folder"),
        ("x" * 5000, "there is no folder"),
        (__file__, "is a file"),
        ("builtin:gpt2", "there is no builtin:gpt2; allowed: builtin:smollm2-135m"),
    ],
)
def test_what_cannot_be_a_model_is_refused(name, match):
    with pytest.raises(UserError, match=match):
        check_name(name)


def test_a_folder_of_almost_the_same_name_is_suggested(tmp_path):
    (tmp_path / "quantized").mkdir()
    with pytest.raises(UserError, match=rf"Did you mean {tmp_path}/quantized\?"):
        check_name(str(tmp_path / "quantised"))


def place_hub(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[socket.socket]:
    """A hub that takes connections and says nothing, and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        place_hub(monkeypatch, silent.getsockname()[1])
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        yield silent


def connections_to(hub: socket.socket) -> int:
    hub.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while True:
            hub.accept()[0].close()
            count += 1
    return count


def test_a_hub_that_does_not_answer_is_asked_once(hub):
    with pytest.raises(UserError, match=r"the hub .* did not answer .* HF_HUB_OFFLINE=1") as caught:
        load_config("org/model")
    assert len(str(caught.value).splitlines()) == 1
    assert connections_to(hub) == 1


def test_a_hub_that_cannot_be_reached_is_no_wait(hub):
    hub.close()
    with pytest.raises(UserError, match=r"the hub .* did not answer when asked for it \(.*refused\)"):
        load_config("gpt2")


def test_offline_the_hub_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the hub's cache on this machine .* HF_HUB_OFFLINE is set"):
        load_config("org/model")
    assert connections_to(hub) == 0


def test_what_is_in_the_cache_needs_no_hub(hub, tmp_path):
    folder = tmp_path / "models--org--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    check_on_hub("org/model")
    assert connections_to(hub) == 0


@pytest.mark.parametrize(("status", "answers"), [(404, True), (401, True), (429, False), (503, False)])
def test_a_hub_that_says_no_has_answered(hub, monkeypatch, status, answers):
    class Says(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Says) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place_hub(monkeypatch, server.server_port)
        if answers:
            check_on_hub("org/model")
        else:
            with pytest.raises(UserError, match=f"did not answer .*{status}"):
                check_on_hub("org/model")
        server.shutdown()
