"""How fast does one model answer for many adapters over HTTP, and is every answer that of its adapter alone?

python -m benchmarks.serving
"""

from __future__ import annotations

import gc
import itertools
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
from diablo.models.adapters import load_adapter
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
    adapted.save_pretrained(folder / "a000")
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
def serving(model: str, folder: Path, *options: object) -> Iterator[tuple[OpenAI, int]]:
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
    client: OpenAI, requests: Sequence[Asked], clients: int, most: int
) -> tuple[list[Answered], dict[str, Any]]:
    """Have clients ask, each as soon as it has its answer.

    Returns:
        The answers in the order of the requests, and the figures.
    """
    before = metrics(client)
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(lambda asked: ask(client, asked, most), requests))
    seconds = time.perf_counter() - start
    spent = {name: value - before[name] for name, value in metrics(client).items()}
    first = sorted(answer.first for answer in answers)
    return answers, {
        "seconds": seconds,
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "first_token_median": statistics.median(first),
        "first_token_p95": first[int(0.95 * (len(first) - 1))],
        "switches": int(spent["diablo_switches_total"]),
        "switching_share": spent["diablo_switch_seconds_total"] / spent["diablo_busy_seconds_total"],
        "rows_per_forward": spent["diablo_forward_rows_total"] / spent["diablo_forwards_total"],
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


def lora_tokens_per_second(
    model: Any, tokenizer: Any, requests: Sequence[Asked], num_blocks: int, batch: int, most: int, *, mixed: bool
) -> float:
    """PEFT's LoRA at equal parameters on the same requests, all of which are there at the start.

    Args:
        model: the base model, which is left without adapters.
        tokenizer: its tokenizer.
        requests: the requests.
        num_blocks: DiaBlo's N, to whose number of parameters the rank comes closest.
        batch: rows of a batch.
        most: tokens of each answer.
        mixed: whether rows of one batch have different adapters, by ``adapter_names``; otherwise a batch has one
            adapter, and ``set_adapter`` comes between batches.
    """
    rank = equal_size(lambda r: LoraConfig(r=r), model, TARGETS, num_blocks)
    config = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
    names = sorted({asked.adapter for asked in requests})
    adapted: Any = get_peft_model(model, config, names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    adapted.eval()
    groups: list[list[Asked]] = []
    for asked in requests if mixed else sorted(requests, key=lambda asked: asked.adapter):
        if not groups or len(groups[-1]) == batch or not (mixed or groups[-1][0].adapter == asked.adapter):
            groups.append([])
        groups[-1].append(asked)
    start, tokens = time.perf_counter(), 0
    for group in groups:
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
    seconds = time.perf_counter() - start
    adapted.unload()
    return tokens / seconds


def wrong_answers(
    model: str, folder: Path, requests: Sequence[Asked], answers: Sequence[Answered], most: int
) -> list[str]:
    """The answers that are not, token by token, those of the adapter loaded alone by PEFT, one prompt at a time."""
    wrong = []
    order = sorted(range(len(requests)), key=lambda index: requests[index].adapter)
    for name, own in itertools.groupby(order, key=lambda index: requests[index].adapter):
        alone, tokenizer = load_adapter(folder / name, base=model, dtype=torch.float32)
        encoder = RowEncoder(tokenizer, stop_token_ids=stop_token_ids(alone.config, alone.generation_config))
        for index in own:
            ids = [encoder.prompt(Row(1, requests[index].prompt, "?"))]
            expected = complete(alone, encoder, ids, max_new_tokens=most)[0].text
            if expected != answers[index].text:
                wrong.append(f"{name}: {answers[index].text!r} in place of {expected!r}")
        del alone
        gc.collect()
    return wrong


def main(
    model: str = "builtin:smollm2-135m",
    adapters: int = 200,
    clients: int = 32,
    requests: int = 400,
    max_tokens: int = 32,
    num_blocks: int = 64,
    batch_size: int = 16,
    turn: int = 32,
    scale: float = 0.02,
    memory: float = 2.0,
    out: Path | None = None,
) -> None:
    """Serve adapters of random blocks in fp32 to clients over loopback, and compare every answer with that alone.

    The server's figures are those of adapters drawn at random for each request, and of the base model alone. LoRA's are
    those of PEFT's ``generate`` without a server, with all requests there at the start.
    """
    name = resolve_model(model)
    draw = random.Random(0)
    problems = TASKS["mawps"]().problems("test")
    prompts = [problem.row.prompt for problem in problems]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plain, tokenizer = load_model(name, torch.float32), load_tokenizer(name)
        names, parameters = make_adapters(plain, folder, adapters, num_blocks, scale)
        asked = [Asked(draw.choice(names), draw.choice(prompts)) for _ in range(requests)]
        options = ["--precision", "fp32", "--max-tokens", max_tokens, "--queue", requests, "--name", "base"]
        options += ["--batch-size", batch_size, "--turn", turn, "--adapter-memory", memory]
        results: list[dict[str, Any]] = []
        with serving(name, folder, *options) as (client, process):
            for row in (Asked("base", prompts[0]), asked[0]):
                ask(client, row, 2)
            base_asked = [Asked("base", each.prompt) for each in asked]
            _, figures = load_of(client, base_asked, clients, max_tokens)
            results.append({"method": "diablo serve, base model alone", **figures})
            answers, figures = load_of(client, asked, clients, max_tokens)
            results.append(
                {"method": f"diablo serve, {adapters} adapters", **figures, "peak_bytes": peak_bytes(process)}
            )
        for mixed, title in ((False, "LoRA, set_adapter between batches"), (True, "LoRA, rows of several adapters")):
            speed = lora_tokens_per_second(plain, tokenizer, asked, num_blocks, batch_size, max_tokens, mixed=mixed)
            results.append({"method": title, "tokens_per_second": speed})
        del plain
        wrong = wrong_answers(name, folder, asked, answers, max_tokens)
    for line in wrong[:5]:
        print(line)
    print(f"{len(asked) - len(wrong)} of {len(asked)} answers are those of their adapter alone.")
    columns = ("tokens_per_second", "first_token_median", "first_token_p95", "switches", "switching_share")
    print_table(["method", *columns], [[row["method"], *(row.get(key, "") for key in columns)] for row in results])
    settings = {
        "model": model,
        "adapters": adapters,
        "parameters_of_each": parameters,
        "clients": clients,
        "requests": requests,
        "max_tokens": max_tokens,
        "num_blocks": num_blocks,
        "batch_size": batch_size,
        "turn": turn,
        "scale": scale,
        "adapter_memory_gib": memory,
        "dtype": "fp32",
        "wrong_answers": len(wrong),
    }
    write_record(out or Path("docs/results/serving-cpu-fp32.json"), QUESTION, settings, results)


if __name__ == "__main__":
    typer.run(main)
