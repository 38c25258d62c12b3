"""All measurements on a GPU in one command.

    python -m benchmarks.gpu                                   # one GPU, six minutes
    python -m benchmarks.gpu --parts kernels,layers            # some parts only
    python -m benchmarks.gpu --device cpu --tiny               # a rehearsal, under a minute

Another process measures. If it dies, or stops because its GPU no longer answers, a new process goes on with the next
row. When the time is up, the remaining rows are recorded as left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu.recorder import BROKEN, row_name
from benchmarks.gpu.report import print_record
from benchmarks.gpu.sizes import PARTS
from benchmarks.methods import BESIDE, FROZEN, IN_PLACE
from diablo.records.results import commit_of, write_record

QUESTION = "layers, steps, memory, switching and kernels on one GPU"
GRACE_SECONDS = 20
OURS = (FROZEN, IN_PLACE, BESIDE)


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None where ``nvidia-smi`` does not tell it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def run_worker(task: dict[str, Any], environment: dict[str, str]) -> int | None:
    """Let a process measure. Returns its exit code; None where it was stopped because the time was up."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(task)]
    process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, task["deadline"] + GRACE_SECONDS - time.time()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            # The process has a session of its own, so that this ends the processes of its compiler too.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that the processes have written so far. A line that a dying process left unfinished is ignored."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def rows_of(lines: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """The rows of a part, in the form in which the record has them."""
    return [
        {**line["keys"], **{key: value for key, value in line.items() if key not in ("part", "event", "keys")}}
        for line in lines
        if line.get("part") == part and line["event"] == "row"
    ]


def measure(parts: list[str], device: str, tiny: bool, deadline: float, path: Path) -> list[dict[str, Any]]:
    """Let processes measure until every part is done or the time is up. Returns the lines that they wrote."""
    environment: dict[str, str] = {}
    left = parts
    while left:
        before = read_lines(path)
        done = [row_name(line["part"], line["keys"]) for line in before if line["event"] == "row"]
        task = {"parts": left, "device": device, "tiny": tiny, "deadline": deadline, "rows": str(path), "done": done}
        code = run_worker(task, environment)
        lines = read_lines(path)
        finished = {line["part"] for line in lines if line["event"] == "part"}
        left = [part for part in parts if part not in finished]
        started = {row_name(line["part"], line["keys"]): line for line in lines if line["event"] == "start"}
        ended = {row_name(line["part"], line["keys"]) for line in lines if line["event"] == "row"}
        reason = {"left_out": "the time was up"} if code is None else {"error": f"the process ended with {code}"}
        with path.open("a", encoding="utf-8") as file:
            for name, line in started.items():
                if name not in ended:
                    file.write(json.dumps({**line, "event": "row", **reason}) + "\n")
        if code is None:
            break
        # The process finished nothing, and the next one would end in the same way. So this part is given up.
        if left and code != BROKEN and len(lines) <= len(before) + 1:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"part": left[0], "event": "part", **reason}) + "\n")
            left = left[1:]
        # Processes that use CUDA graphs have crashed when the profiler removed its hooks and set them again. These
        # variables make it keep them.
        environment = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    return read_lines(path)


def status_of(rows: list[dict[str, Any]], end: dict[str, Any] | None) -> str:
    """How a part went. If another library's method cannot run, this is a result, and the part does not fail."""
    is_ours = [row for row in rows if row.get("method", FROZEN) in OURS or row["method"].startswith("DiaBlo")]
    if (end or {}).get("error") or any("error" in row for row in is_ours):
        return "failed"
    return "left out in part" if end is None or any("left_out" in row for row in rows) else "done"


def main(
    parts: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(PARTS),
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Sizes for a rehearsal.")] = False,
    minutes: Annotated[float, typer.Option(help="No row is begun after that.")] = 6.0,
    out: Annotated[Path | None, typer.Option(help="The record, or a folder for it.")] = None,
    commit: Annotated[str | None, typer.Option(help="What is measured, where this is no git checkout.")] = None,
) -> None:
    """Measure, print the tables, and write one record. The exit code is 1 where a part failed."""
    # A signal to stop this process must also stop the process that measures. So it becomes an exception, and the
    # `finally` of `run_worker` runs.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    deadline = time.time() + 60 * minutes
    chosen = [part for part in PARTS if part in parts.split(",")]
    if unknown := set(parts.split(",")) - set(PARTS):
        raise typer.BadParameter(f"There is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("There is no GPU here; --device cpu --tiny rehearses without one.")
    default = Path(tempfile.gettempdir()) if tiny else Path("docs/results")
    target = out or default
    folder = target.parent if target.suffix == ".json" else target
    folder.mkdir(parents=True, exist_ok=True)
    # The rows are written beside the record, so that they remain if this process is killed.
    rows = folder / f".gpu-rows-{os.getpid()}.jsonl"
    start = time.time()
    lines = measure(chosen, device, tiny, deadline, rows)
    described = next((line["device"] for line in lines if line["event"] == "device"), {"device_name": device})
    results = []
    for part in chosen:
        end = next((line for line in lines if line["event"] == "part" and line["part"] == part), None)
        found = rows_of(lines, part)
        results.append({"part": part, "status": status_of(found, end), "rows": found})
        results[-1] |= {key: end[key] for key in ("error", "took") if end and key in end}
    settings = {
        **described,
        "driver": driver_version() if device == "cuda" else None,
        "commit": commit or commit_of(Path(__file__)),
        "dtype": "bf16",
        "device": device,
        "tiny": tiny,
        "minutes": minutes,
        "parts": chosen,
        "took_seconds": round(time.time() - start),
    }
    slug = re.sub(r"[^a-z0-9]+", "-", described["device_name"].lower()).strip("-")
    path = target if target.suffix == ".json" else folder / f"gpu-{'tiny-' * tiny}{slug}.json"
    write_record(path, QUESTION, settings, results)
    rows.unlink(missing_ok=True)
    print_record({"settings": settings, "results": results})
    if any(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
