"""What the command line writes is its own: no library's warnings, bars or banners."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRESS = re.compile(r"(training|merging files|scoring mawps) \d+/\d+ .* left")

# One process for all lines, since libraries write when they are imported, and when the process ends.
EACH_LINE = """
import json, os, sys
from diablo_cli import main
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.write(stream.fileno(), b"\\0")
"""


def written_by(folder: Path, *lines: list[object]) -> Iterator[tuple[list[str], list[str]]]:
    """The lines that each command writes to standard output and to standard error."""
    command = [sys.executable, "-c", EACH_LINE, json.dumps(lines, default=str)]
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert run.returncode == 0, run.stderr
    *outs, at_exit = run.stdout.split("\0")
    assert at_exit == ""
    *errors, at_exit = run.stderr.split("\0")
    assert at_exit == ""
    for out, error in zip(outs, errors, strict=True):
        yield out.splitlines(), error.splitlines()


def test_nothing_is_written_but_what_the_verbs_say(tiny_model, tmp_path):
    rows = [{"prompt": f"{number} and 1?", "completion": str(number + 1)} for number in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Shorter than logging_steps, and without held-out rows: there is one loss to draw.
    (tmp_path / "own.yaml").write_text(
        f"model: {tiny_model}\noutput: run\ndata: {{train: own.jsonl}}\nprecision: fp32\n"
        "method: {num_blocks: 4, target_modules: [q_proj, lm_head]}\n"
        "training: {max_steps: 1, batch_size: 2, gradient_checkpointing: full, save_steps: 1}\n"
    )
    trained, evaluated, merged, generated = written_by(
        tmp_path,
        ["train", "own.yaml"],
        ["evaluate", "run", "--task", "mawps", "--limit", 2, "--examples", 0],
        ["merge", "run", "merged"],
        ["generate", "merged", "1 and 1?", "--max-new-tokens", 2],
    )
    out, errors = trained
    assert out[0].startswith("trained  ")
    assert [line for line in errors if not PROGRESS.fullmatch(line)] == []

    out, errors = evaluated
    assert len(out) == 1
    assert out[0].startswith("mawps: accuracy")
    assert [line for line in errors if not PROGRESS.fullmatch(line)] == []

    out, errors = merged
    assert [line.split()[0] for line in out] == ["Wrote", "Read", "Its"]
    assert [line for line in errors if not PROGRESS.fullmatch(line)] == []

    out, errors = generated
    assert len(out) <= 2
    assert errors == []
