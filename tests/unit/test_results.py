"""The commit that a record names."""

from __future__ import annotations

import subprocess
from pathlib import Path

from diablo.records.results import commit_of


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_commit_is_dirty_where_code_has_changed_and_not_where_a_record_was_written(tmp_path: Path) -> None:
    code, record = tmp_path / "src" / "code.py", tmp_path / "docs" / "record.json"
    for file in (code, record):
        file.parent.mkdir()
        file.write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert commit_of(code) == commit
    record.write_text("2")
    (tmp_path / "docs" / "another.json").write_text("3")
    assert commit_of(code) == commit
    code.write_text("2")
    assert commit_of(code) == f"{commit}-dirty"
    git(tmp_path, "add", "src")
    assert commit_of(code) == f"{commit}-dirty"


def test_a_file_that_belongs_to_no_checkout_has_no_commit(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("1")
    assert commit_of(file) is None
    git(tmp_path, "init", "-q")
    assert commit_of(file) is None
