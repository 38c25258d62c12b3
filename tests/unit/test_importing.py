"""A function that waits for an import is called once the package is there, and takes no other part in imports."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys

import pytest

from diablo.importing import when_imported


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """The name of a package of its own for each test; it fails to import while a file `broken` is in it."""
    folder = tmp_path / "waited_for"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from pathlib import Path\n"
        "if (Path(__file__).parent / 'broken').exists():\n"
        "    raise OSError('broken')\n"
        "x = 1\n"
    )
    (folder / "inner.py").write_text("from waited_for import x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield folder.name
    for name in (folder.name, f"{folder.name}.inner"):
        sys.modules.pop(name, None)


def test_it_is_called_at_once_where_the_package_is_imported():
    before, calls = list(sys.meta_path), []
    when_imported("json", lambda: calls.append(sys.modules["json"].loads))
    assert calls == [importlib.import_module("json").loads]
    assert sys.meta_path == before


@pytest.mark.parametrize("imported", ["", ".inner"])
def test_it_is_called_when_the_package_has_been_executed(package, imported):
    before, calls = list(sys.meta_path), []
    when_imported(package, lambda: calls.append(sys.modules[package].x))
    importlib.import_module("json")
    assert calls == []
    importlib.import_module(package + imported)
    assert calls == [1]
    assert sys.meta_path == before
    importlib.reload(sys.modules[package])
    assert calls == [1]


def test_looking_for_the_package_calls_nothing_and_finds_its_own_loader(package):
    plain = importlib.util.find_spec(package)
    calls = []
    when_imported(package, lambda: calls.append(1))
    spec = importlib.util.find_spec(package)
    assert (spec.name, spec.origin, spec.parent) == (plain.name, plain.origin, plain.parent)
    assert spec.loader.get_source(package) == plain.loader.get_source(package)
    assert copy.copy(spec.loader).path == plain.loader.path
    assert importlib.util.find_spec("no_such_package") is None
    assert calls == []
    module = importlib.import_module(package)
    assert calls == [1]
    assert type(module.__loader__) is type(module.__spec__.loader) is type(plain.loader)


def test_the_error_of_an_import_is_its_own_and_the_next_import_calls(package, tmp_path):
    calls = []
    when_imported(package, lambda: calls.append(1))
    (tmp_path / package / "broken").touch()
    with pytest.raises(OSError, match="broken"):
        importlib.import_module(package)
    assert calls == []
    assert package not in sys.modules
    (tmp_path / package / "broken").unlink()
    importlib.import_module(package)
    assert calls == [1]


def test_what_the_function_raises_is_raised_by_the_import_and_the_next_one_calls_again(package):
    calls = []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not yet")

    when_imported(package, fail_once)
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(package)
    assert package not in sys.modules
    assert importlib.import_module(package).x == 1
    assert calls == [1, 1]


def test_several_functions_can_wait_for_one_package(package):
    before, calls = list(sys.meta_path), []
    for number in range(3):
        when_imported(package, lambda number=number: calls.append(number))
    importlib.import_module(package)
    assert sorted(calls) == [0, 1, 2]
    assert sys.meta_path == before


def test_a_package_that_is_not_there_stays_so():
    when_imported("no_such_package", pytest.fail)
    try:
        with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
            importlib.import_module("no_such_package")
    finally:
        sys.meta_path.pop(0)
