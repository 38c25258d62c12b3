"""The page of ``diablo serve`` in a real browser, headless: two models are asked at once and answer side by side."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from adapters_to_serve import make_adapter

pytest.importorskip("uvicorn")
pytest.importorskip("openai")
aiohttp = pytest.importorskip("aiohttp")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


class Page:
    """A page of a browser that is told what to do over its debugging protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self.is_loaded = False

    async def open(self, url: str) -> None:
        """Go to an address, and wait until all of it is there."""
        self.is_loaded = False
        await self.tell("Page.navigate", url=url)
        while not self.is_loaded:
            self._note(await asyncio.wait_for(self._socket.receive_json(), 30))

    def _note(self, message: dict[str, Any]) -> None:
        method = message.get("method")
        if method == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(message["params"]))
        self.is_loaded |= method == "Page.loadEventFired"

    async def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), 30)
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression: str) -> Any:
        result = await self.tell("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        for _ in range(300):
            if await self.value(expression):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{expression} did not become true: {await self.value('document.body.innerText')}")

    async def picture(self, path: Path, width: int, height: int, scheme: str) -> None:
        """Write what the page looks like in a window of a size, in the ``light`` or ``dark`` scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.tell("Emulation.setDeviceMetricsOverride", **size)
        await self.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        shot = await self.tell("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


def browse(url: str, doing: Callable[[Page], Awaitable[None]]) -> Page:
    """Open a page in a browser of its own, and do something there."""

    async def run(port: int) -> Page:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(each for each in await answer.json() if each["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Network", "Runtime", "Log", "Page"):
                    await page.tell(f"{domain}.enable")
                await page.open(url)
                await doing(page)
                return page

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [str(BROWSER), *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        browser = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert browser.stderr is not None
            port = next(found[1] for line in browser.stderr if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
            return asyncio.run(run(int(port)))
        finally:
            browser.kill()
            browser.wait()


def test_two_models_are_asked_at_once_and_answer_side_by_side(tiny_model, tmp_path):
    from test_serving import Server

    adapters = {name: make_adapter(tiny_model, tmp_path / name, seed) for seed, name in enumerate("ab")}
    named = [word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")]
    server = Server(tiny_model, *named, "--api-key", "a key of the tests")

    async def compare(page: Page) -> None:
        # Without the key there is nothing to choose, and the page asks for it.
        await page.until("!document.getElementById('key-place').hidden")
        await page.value("at('key').value = 'a key of the tests'; at('key').dispatchEvent(new Event('change'))")
        await page.until("at('model-1').options.length === 3")
        assert await page.value("[at('model-0').value, at('model-1').value].join()") == "a,model"
        await page.value(
            "at('question').value = 'Ann had 3 apples.'; at('tokens').value = 12; at('model-1').value = 'b';"
            "at('form').requestSubmit(); window.waited = at('ask').disabled"
        )
        await page.until("window.waited && !at('ask').disabled")
        for side, name in enumerate("ab"):
            messages = [{"role": "user", "content": "Ann had 3 apples."}]
            asked = server.client.chat.completions.create(model=name, messages=messages, max_tokens=12, temperature=0)
            assert await page.value(f"at('answer-{side}').textContent") == asked.choices[0].message.content
            assert (await page.value(f"at('facts-{side}').textContent")).startswith("12 tokens in ")
        # What a model writes is text, whatever it is; an error is told beside the answer that it is of.
        await page.value("at('tokens').value = 100000; at('form').requestSubmit()")
        await page.until("at('facts-0').textContent.includes('writes up to 1024 tokens')")
        for width, scheme in ((360, "light"), (1100, "dark")):
            await page.picture(tmp_path / "shot.png", width, 800, scheme)
            assert await page.value("document.documentElement.scrollWidth <= window.innerWidth")

    try:
        page = browse(server.url, compare)
        assert all(url.startswith(server.url) for url in page.requested if url.startswith("http"))
        assert not [
            text for text in page.complaints if "favicon" not in text and "401" not in text and "400" not in text
        ]
    finally:
        server.close()
