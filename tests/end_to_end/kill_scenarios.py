"""Kills a run at random moments, resumes it, and compares what it ends with; a process of its own, which forks runs.

    python kill_scenarios.py RECIPE KILLS

The parent never computes anything, so that its children can be forked. Prints a JSON object.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from diablo.errors import UserError
from diablo.recipes.reading import load_recipe
from diablo.training import saving, train

# A run imports it late. Imported here, it is there for every child: what is killed is a run and not its imports.
from diablo.training.trainers.making import make_trainer  # noqa: F401


def run(recipe_file: str) -> int:
    """Go on as a user would: resume, or start anew where there is nothing to resume from."""
    import torch

    torch.set_num_threads(1)
    recipe = load_recipe(recipe_file)
    try:
        train(recipe, resume=True)
    except UserError as error:
        if "no checkpoint" not in str(error):
            print(error, file=sys.stderr)
            return 3
        train(recipe, overwrite=True)
    return 0


def fork(recipe_file: str) -> int:
    """Start a run, and return its process."""
    process = os.fork()
    if process == 0:
        status = 4
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            status = run(recipe_file)
        os._exit(status)
    return process


def wait(process: int, seconds: float) -> int | None:
    """The exit status of a run; None where it is still going on after some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def digest(folder: Path) -> str:
    """A digest of the adapter."""
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def where(folder: Path) -> str:
    """What a run was doing, by the files that it has left."""
    if not (folder / "recipe.yaml").is_file():
        return "before it had written anything"
    if (folder / "checkpoints" / saving.STAGING).is_dir():
        return "in a save"
    if (folder / "adapter").is_dir():
        return "after training"
    return "in training" if any((folder / "checkpoints").glob("checkpoint-*")) else "before its first checkpoint"


def main() -> None:
    """Kill and resume."""
    recipe_file, kills = sys.argv[1], int(sys.argv[2])
    folder = load_recipe(recipe_file).output
    start = time.monotonic()
    assert wait(fork(recipe_file), 300) == 0
    duration = time.monotonic() - start
    undisturbed = digest(folder)
    shutil.rmtree(folder)
    chance = random.Random(0)
    killed: dict[str, int] = {}
    faults: list[str] = []
    ends = 0
    while sum(killed.values()) < kills or (folder.exists() and not (folder / "run.json").is_file()):
        process = fork(recipe_file)
        is_last = sum(killed.values()) >= kills
        status = wait(process, 300 if is_last else chance.uniform(0.02, 0.9) * duration)
        if status is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            killed[where(folder)] = killed.get(where(folder), 0) + 1
            _, torn = saving.last_whole(folder / "checkpoints")
            faults += [f"{name}: {fault}" for name, fault in torn.items()]
        elif status:
            faults.append(f"a run ended with status {status}")
            break
        if (folder / "run.json").is_file():
            ends += 1
            if digest(folder) != undisturbed:
                faults.append("a resumed run ended with another adapter")
            shutil.rmtree(folder)
    print(json.dumps({"killed": killed, "ends": ends, "faults": faults, "duration": duration}))


if __name__ == "__main__":
    main()
