"""How fast does one model answer for many adapters over HTTP, and is every answer that of its adapter alone?

python -m benchmarks.serving    # about eight minutes on two cores
"""

from __future__ import annotations

import itertools
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from benchmarks.harness import print_table
from benchmarks.methods import equal_size
from diablo import DiabloConfig
from diablo.data import Row, RowEncoder
from diablo.models.adapters import attach_adapter
from diablo.models.folders import ADAPTER_WEIGHTS
from diablo.models.loading import load_model, load_tokenizer, resolve_model, stop_token_ids
from diablo.records.results import write_record
from diablo.scoring.generation import complete
from diablo.tasks import TASKS
from diablo.tuner.targets import PAPER_TARGETS

TARGETS = list(PAPER_TARGETS)
QUESTION = "answering for many adapters of one model over HTTP"


@dataclass(frozen=True)
class Asked:
    """A request: which adapter, and what."""

    adapter: str
    prompt: str


@dataclass(frozen=True)
class Answered:
    """An answer and when it came."""

    text: str
    tokens: int
    first: float
    whole: float


def make_adapters(model: Any, folder: Path, count: int, num_blocks: int, scale: float) -> tuple[list[str], int]:
    """Save adapters of random blocks, of the size that blocks have after training.

    Returns:
        Their names, and the parameters of each.
    """
    adapted = get_peft_model(model, DiabloConfig(num_blocks=num_blocks))
    adapted.save_pretrained(str(folder / "a000"))
    base = adapted.unload()
    tensors = load_file(folder / "a000" / ADAPTER_WEIGHTS)
    names = [f"a{number:03}" for number in range(count)]
    for number, name in enumerate(names):
        own = folder / name
        own.mkdir(exist_ok=True)
        (own / "adapter_config.json").write_bytes((folder / "a000" / "adapter_config.json").read_bytes())
        generator = torch.Generator().manual_seed(number)
        values = {key: torch.randn(value.shape, generator=generator) * scale for key, value in tensors.items()}
        save_file(values, own / ADAPTER_WEIGHTS)
    assert base is model
    return names, sum(value.numel() for value in tensors.values())


@contextmanager
def serving(model: str, folder: Path, *options: object) -> Generator[tuple[OpenAI, int]]:
    """A server in a process of its own, its client, and the number of the process."""
    command = [sys.executable, "-m", "diablo_cli", "serve", model, "--adapters", folder, "--port", 0, *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        (url,) = re.findall(r"http://[^/ ]+/v1", process.stdout.readline())
        yield OpenAI(base_url=url, api_key="none", timeout=3600, max_retries=0), process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


def ask(client: OpenAI, asked: Asked, most: int) -> Answered:
    """Ask for one answer, as a stream."""
    start = time.perf_counter()
    stream = client.completions.create(
        model=asked.adapter,
        prompt=asked.prompt,
        max_tokens=most,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, first, tokens = "", 0.0, 0
    for chunk in stream:
        first = first or time.perf_counter() - start
        text += "".join(choice.text for choice in chunk.choices)
        tokens = chunk.usage.completion_tokens if chunk.usage is not None else tokens
    return Answered(text, tokens, first, time.perf_counter() - start)


def load_of(
    client: OpenAI, requests: Sequence[Asked], clients: int, most: int, seconds: float
) -> tuple[dict[int, Answered], dict[str, Any]]:
    """Have clients ask, each as soon as it has its answer.

    Args:
        client: the server's client.
        requests: what is asked, in this order.
        clients: how many ask at once.
        most: tokens of each answer.
        seconds: after these no further request is sent. Those under way are waited for.

    Returns:
        The answers by the places of the requests, and the figures.
    """
    before = metrics(client)
    start = time.perf_counter()

    def answered(asked: Asked) -> Answered | None:
        return ask(client, asked, most) if time.perf_counter() - start < seconds else None

    with ThreadPoolExecutor(clients) as threads:
        found = list(threads.map(answered, requests))
    taken = time.perf_counter() - start
    answers = {index: answer for index, answer in enumerate(found) if answer is not None}
    spent = {name: value - before[name] for name, value in metrics(client).items()}
    first = sorted(answer.first for answer in answers.values())
    return answers, {
        "requests": len(answers),
        "seconds": taken,
        "tokens_per_second": sum(answer.tokens for answer in answers.values()) / taken,
        "first_token_median": statistics.median(first),
        "first_token_p95": first[int(0.95 * (len(first) - 1))],
        "whole_median": statistics.median(answer.whole for answer in answers.values()),
        "switches": int(spent["diablo_switches_total"]),
        "switching_share": spent["diablo_switch_seconds_total"] / spent["diablo_busy_seconds_total"],
        "rows_per_forward": spent["diablo_forward_rows_total"] / spent["diablo_forwards_total"],
        "mixed_share": spent["diablo_mixed_forwards_total"] / spent["diablo_forwards_total"],
    }


def metrics(client: OpenAI) -> dict[str, float]:
    """The server's counters."""
    text = client._client.get(str(client.base_url).removesuffix("v1/") + "metrics").text
    return {name: float(value) for name, value in re.findall(r"^(diablo_\w+_total) (\S+)$", text, re.MULTILINE)}


def peak_bytes(process: int) -> int | None:
    """The most memory that a process has had; None where the system does not tell."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return None if found is None else int(found[1]) * 1024


def lora(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Asked],
    num_blocks: int,
    batch: int,
    most: int,
    seconds: float,
    *,
    mixed: bool,
) -> dict[str, Any]:
    """PEFT's LoRA at equal parameters on the same requests, without a server, all of them being there at the start.

    Args:
        model: the base model, which is left without adapters.
        tokenizer: its tokenizer.
        requests: the requests.
        num_blocks: DiaBlo's N, to whose number of parameters the rank comes closest.
        batch: rows of a batch.
        most: tokens of each answer.
        seconds: after these no further batch begins.
        mixed: whether rows of one batch have different adapters, by ``adapter_names``; otherwise a batch has one
            adapter, and ``set_adapter`` comes between batches.
    """
    rank = equal_size(lambda r: LoraConfig(r=r), model, TARGETS, num_blocks)
    config = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
    names = sorted({asked.adapter for asked in requests})
    adapted: Any = get_peft_model(model, config, names[0])
    try:
        for name in names[1:]:
            adapted.add_adapter(name, config)
        adapted.eval()
        groups: list[list[Asked]] = []
        for asked in requests if mixed else sorted(requests, key=lambda asked: asked.adapter):
            if not groups or len(groups[-1]) == batch or not (mixed or groups[-1][0].adapter == asked.adapter):
                groups.append([])
            groups[-1].append(asked)
        start, tokens, done = time.perf_counter(), 0, 0
        for group in groups:
            if time.perf_counter() - start > seconds:
                break
            texts = [asked.prompt for asked in group]
            padded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
            options: dict[str, Any] = {"adapter_names": [asked.adapter for asked in group]} if mixed else {}
            if not mixed:
                adapted.set_adapter(group[0].adapter)
            with torch.no_grad():
                # Answers of random adapters hardly ever end by themselves: here they all have the same length.
                lengths = {"max_new_tokens": most, "min_new_tokens": most}
                output = adapted.generate(**padded, **lengths, do_sample=False, num_beams=1, **options)
            tokens += output[:, padded["input_ids"].shape[1] :].numel()
            done += len(group)
        taken = time.perf_counter() - start
        return {
            "requests": done,
            "seconds": taken,
            "tokens_per_second": tokens / taken,
            "rank": rank,
        }
    finally:
        adapted.unload()


def check(
    model: Any,
    tokenizer: Any,
    name: str,
    folder: Path,
    requests: Sequence[Asked],
    answers: Sequence[Mapping[int, Answered]],
    most: int,
    seconds: float,
) -> tuple[int, list[str]]:
    """Compare answers with those of the adapter loaded alone by PEFT, one prompt at a time.

    Args:
        model: the base model, which is left without adapters.
        tokenizer: its tokenizer.
        name: the base model's name.
        folder: the folder of the adapters.
        requests: the requests.
        answers: for each measurement its answers by the places of the requests.
        most: tokens of each answer.
        seconds: after these no further adapter is looked at.

    Returns:
        The number of answers that were compared, and a line for each that is another one.
    """
    compared, wrong, start = 0, [], time.perf_counter()
    encoder = RowEncoder(tokenizer, stop_token_ids=stop_token_ids(model.config, model.generation_config))
    places = sorted({place for own in answers for place in own}, key=lambda place: requests[place].adapter)
    for adapter, own in itertools.groupby(places, key=lambda place: requests[place].adapter):
        if time.perf_counter() - start > seconds:
            break
        alone = attach_adapter(model, folder / adapter, name, None)
        for place in own:
            ids = [encoder.prompt(Row(1, requests[place].prompt, "?"))]
            expected = complete(alone, encoder, ids, max_new_tokens=most)[0].text
            found = [each[place].text for each in answers if place in each]
            compared += len(found)
            wrong += [f"{adapter}: {text!r} in place of {expected!r}" for text in found if text != expected]
        alone.unload()
    return compared, wrong


@dataclass
class Recorder:
    """Results as they come: a measurement that fails is noted, and the others go on.

    Attributes:
        path: where the record is written after each measurement.
        settings: how it is measured.
        results: a row for each measurement and round.
    """

    path: Path
    settings: dict[str, Any]
    results: list[dict[str, Any]]

    def measure(self, method: str, round_: int, run: Callable[[], dict[str, Any]]) -> None:
        """Measure, and write what is known by now."""
        try:
            figures = run()
        except Exception as error:  # whatever it is, the other rows are worth having
            figures = {"note": f"{type(error).__name__}: {error}"}
        self.results.append({"method": method, "round": round_, **figures})
        print(method, {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()})
        self.write()

    def write(self) -> None:
        """Write the record."""
        write_record(self.path, QUESTION, self.settings, self.results)


def draw(names: Sequence[str], prompts: Sequence[str], count: int, skew: float) -> list[Asked]:
    """Requests for adapters at random. With a skew, the k-th adapter is asked for in proportion to ``k**-skew``."""
    random_ = random.Random(0)
    weights = [(index + 1) ** -skew for index in range(len(names))]
    return [Asked(random_.choices(names, weights)[0], random_.choice(prompts)) for _ in range(count)]


def main(
    model: str = "builtin:smollm2-135m",
    adapters: int = 200,
    clients: int = 32,
    requests: int = 96,
    max_tokens: int = 16,
    num_blocks: int = 64,
    batch_size: int = 16,
    turn: int = 32,
    skew: float = 0.0,
    scale: float = 0.02,
    memory: float = 2.0,
    rounds: int = 1,
    seconds: float = 60.0,
    check_seconds: float = 120.0,
    out: Path = Path("docs/results/serving-cpu-fp32.json"),
) -> None:
    """Serve adapters of random blocks in fp32 to clients over loopback, and compare every answer with that alone.

    Each measurement takes ``seconds`` and what the last requests need. The servers' figures are those of adapters drawn
    at random for each request, and of the base model alone. LoRA's are those of PEFT's ``generate`` without a server,
    with three batches of requests that are there at the start.
    """
    name = resolve_model(model)
    prompts = [problem.row.prompt for problem in TASKS["mawps"]().problems("test")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plain, tokenizer = load_model(name, torch.float32), load_tokenizer(name)
        plain.eval()
        names, parameters = make_adapters(plain, folder, adapters, num_blocks, scale)
        asked = draw(names, prompts, requests, skew)
        settings = {
            "model": model,
            "adapters": adapters,
            "adapters_asked_for": len({each.adapter for each in asked}),
            "parameters_of_each": parameters,
            "clients": clients,
            "requests": requests,
            "max_tokens": max_tokens,
            "num_blocks": num_blocks,
            "batch_size": batch_size,
            "turn": turn,
            "skew": skew,
            "scale": scale,
            "adapter_memory_gib": memory,
            "seconds": seconds,
            "dtype": "fp32",
        }
        recorder = Recorder(out, settings, [])
        answers: list[dict[int, Answered]] = []
        options = ["--precision", "fp32", "--max-tokens", max_tokens, "--queue", max(clients, 1), "--name", "base"]
        options += ["--batch-size", batch_size, "--turn", turn, "--adapter-memory", memory]

        def served(mixed: str, is_base: bool) -> dict[str, Any]:
            wanted = [Asked("base", each.prompt) for each in asked] if is_base else asked
            with serving(name, folder, *options, "--mixed", mixed) as (client, process):
                for row in (Asked("base", prompts[0]), asked[0]):
                    ask(client, row, 2)
                found, figures = load_of(client, wanted, clients, max_tokens, seconds)
                if not is_base:
                    answers.append(found)
                return {**figures, "peak_bytes": peak_bytes(process)}

        for round_ in range(rounds):
            recorder.measure("base model alone", round_, lambda: served("never", True))
            recorder.measure("DiaBlo in turns", round_, lambda: served("never", False))
            recorder.measure("DiaBlo, mixed where that is faster", round_, lambda: served("auto", False))
            for is_mixed, title in ((False, "LoRA, set_adapter between batches"), (True, "LoRA, mixed batches")):
                arguments = (plain, tokenizer, asked[: 3 * batch_size], num_blocks, batch_size, max_tokens, seconds)
                recorder.measure(title, round_, lambda own=arguments, mixed=is_mixed: lora(*own, mixed=mixed))
        compared, wrong = check(plain, tokenizer, name, folder, asked, answers, max_tokens, check_seconds)
    for line in wrong[:5]:
        print(line)
    print(f"{compared - len(wrong)} of {compared} answers that were compared are those of their adapter alone.")
    settings |= {"answers": sum(map(len, answers)), "answers_compared": compared, "answers_wrong": len(wrong)}
    recorder.write()
    columns = ("requests", "tokens_per_second", "first_token_median", "first_token_p95", "switching_share", "note")
    print_table(
        ["method", *columns], [[row["method"], *(row.get(key, "") for key in columns)] for row in recorder.results]
    )


if __name__ == "__main__":
    typer.run(main)
