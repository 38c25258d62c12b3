"""Adapter folders and recipes from somewhere: one clear line for each fault, nothing executed, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from diablo import DiabloConfig
from diablo.errors import UserError
from diablo.models.adapters import load_adapter
from diablo.models.folders import adapter_folder
from diablo.recipes.reading import load_recipe
from diablo.recipes.recipe import Recipe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Payload:
    """Unpickling it writes a file: whoever reads it as anything but tensors has run its code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.marker, "executed"))


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that everything is fine with; not to be written to."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), DiabloConfig(num_blocks=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.01)
    model.save_pretrained(folder)
    return folder


def config_with(**changes: Any) -> Callable[[Path], None]:
    """Change keys of the config; ``...`` takes one out."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config |= changes
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return damage


def text_in(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def tensors_with(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """Change the tensors, given them and the first one's name."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors, min(tensors))
        save_file(tensors, folder / WEIGHTS)

    return damage


def cut_to(share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])

    return damage


def renamed(tensors: dict[str, torch.Tensor], first: str, name: str) -> None:
    tensors[name] = tensors.pop(first)


def without(tensors: dict[str, torch.Tensor], first: str) -> None:
    del tensors[first]


def filled(tensors: dict[str, torch.Tensor], first: str, value: float) -> None:
    tensors[first].fill_(value)


def header_of(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def linked(name: str, target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def pickled_as(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps({"weights": Payload(folder.parent / "marker")}))

    return damage


def made_a_folder(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DEEP = "[" * 100_000

DAMAGES: dict[str, Callable[[Path], None]] = {
    "config: missing": removed(CONFIG),
    "config: a folder": made_a_folder(CONFIG),
    "config: empty": text_in(CONFIG, ""),
    "config: not JSON": text_in(CONFIG, "peft_type: DIABLO"),
    "config: cut": text_in(CONFIG, '{"peft_type": "DIABLO", "num_bl'),
    "config: a list": text_in(CONFIG, "[]"),
    "config: a number": text_in(CONFIG, "3"),
    "config: null": text_in(CONFIG, "null"),
    "config: a string": text_in(CONFIG, '"DIABLO"'),
    "config: no keys": text_in(CONFIG, "{}"),
    "config: bytes that are no text": text_in(CONFIG, b"\xff\xfe\x00\x01" * 20),
    "config: nested without end": text_in(CONFIG, DEEP),
    "config: a link to nowhere": linked(CONFIG, "/nonexistent/adapter_config.json"),
    "config: no method": config_with(peft_type=...),
    "config: a method that is none": config_with(peft_type="EVIL"),
    "config: a method that is a number": config_with(peft_type=3),
    "config: a method that is a list": config_with(peft_type=["DIABLO"]),
    "config: another method": config_with(peft_type="IA3"),
    "config: another task": config_with(task_type="NO_SUCH_TASK"),
    "config: no base model": config_with(base_model_name_or_path=...),
    "config: a base model that is null": config_with(base_model_name_or_path=None),
    "config: a base model that is a number": config_with(base_model_name_or_path=7),
    "config: a base model that is nowhere": config_with(base_model_name_or_path="/nonexistent/model"),
    "config: a base model above": config_with(base_model_name_or_path="../../../../etc"),
    "config: a base model that is a file": config_with(base_model_name_or_path="/etc/passwd"),
    "config: a builtin that is none": config_with(base_model_name_or_path="builtin:nothing"),
    "config: no blocks": config_with(num_blocks=0),
    "config: fewer than no blocks": config_with(num_blocks=-4),
    "config: blocks in words": config_with(num_blocks="four"),
    "config: a broken number of blocks": config_with(num_blocks=2.5),
    "config: blocks that are null": config_with(num_blocks=None),
    "config: blocks that are true": config_with(num_blocks=True),
    "config: more blocks than features": config_with(num_blocks=10**9),
    "config: another number of blocks": config_with(num_blocks=8),
    "config: targets that are none": config_with(target_modules=["no_such_layer"]),
    "config: targets that are numbers": config_with(target_modules=[1, 2]),
    "config: targets that are a number": config_with(target_modules=5),
    "config: fewer targets": config_with(target_modules=["q_proj"]),
    "config: more targets": config_with(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    ),
    "config: targets that are a broken expression": config_with(target_modules="(((("),
    "config: a pattern that is a list": config_with(block_pattern=["q_proj"]),
    "config: a pattern without a size": config_with(block_pattern={"q_proj": "many"}),
    "config: a pattern of no blocks": config_with(block_pattern={"q_proj": 0}),
    "config: dropout of 2": config_with(diablo_dropout=2),
    "config: dropout in words": config_with(diablo_dropout="some"),
    "config: a bias that is none": config_with(bias="everything"),
    "config: layers that are not there": config_with(layers_to_transform=[99]),
    "config: in place in words": config_with(in_place="perhaps"),
    "weights: missing": removed(WEIGHTS),
    "weights: a folder": made_a_folder(WEIGHTS),
    "weights: empty": text_in(WEIGHTS, b""),
    "weights: a few bytes": text_in(WEIGHTS, b"\x01\x02\x03"),
    "weights: cut in the header": cut_to(0.005),
    "weights: cut in the middle": cut_to(0.5),
    "weights: cut at the end": cut_to(0.99),
    "weights: text": text_in(WEIGHTS, "these are no weights, however long this text goes on and on and on"),
    "weights: zeros": text_in(WEIGHTS, bytes(4096)),
    "weights: a header longer than the file": text_in(WEIGHTS, header_of(b"{}", 2**62)),
    "weights: a header that is no JSON": text_in(WEIGHTS, header_of(b"{{{{")),
    "weights: a header that is a list": text_in(WEIGHTS, header_of(b"[1,2]")),
    "weights: a header nested without end": text_in(WEIGHTS, header_of(DEEP.encode())),
    "weights: no tensors": text_in(WEIGHTS, header_of(b"{}")),
    "weights: offsets outside of the file": text_in(
        WEIGHTS, header_of(b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}')
    ),
    "weights: offsets that go back": text_in(
        WEIGHTS, header_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + bytes(8)
    ),
    "weights: a dtype that is none": text_in(
        WEIGHTS, header_of(b'{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}') + bytes(4)
    ),
    "weights: a negative shape": text_in(
        WEIGHTS, header_of(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4)
    ),
    "weights: a link to nowhere": linked(WEIGHTS, "/nonexistent/weights"),
    "weights: a link to something else": linked(WEIGHTS, "/etc/passwd"),
    "weights: a pickle under their name": pickled_as(WEIGHTS),
    "weights: a pickle under PEFT's other name": pickled_as("adapter_model.bin"),
    "weights: one tensor too few": tensors_with(without),
    "weights: one tensor too many": tensors_with(lambda tensors, first: tensors.update(extra=torch.zeros(2))),
    "weights: a tensor of another shape": tensors_with(
        lambda t, first: t.update({first: t[first][:, :-1].contiguous()})
    ),
    "weights: a tensor of another rank": tensors_with(lambda t, first: t.update({first: t[first].flatten()})),
    "weights: an empty tensor": tensors_with(lambda t, first: t.update({first: torch.zeros(0)})),
    "weights: a scalar": tensors_with(lambda t, first: t.update({first: torch.tensor(1.0)})),
    "weights: a name that goes up": tensors_with(lambda t, first: renamed(t, first, "../../../evil")),
    "weights: a name that is a path": tensors_with(lambda t, first: renamed(t, first, "/etc/cron.d/evil")),
    "weights: a name of nothing": tensors_with(lambda t, first: renamed(t, first, "")),
    "weights: a name with a line break": tensors_with(lambda t, first: renamed(t, first, "a\nb: c")),
    "weights: a name of another layer": tensors_with(
        lambda t, first: renamed(t, first, first.replace("layers.0", "layers.9"))
    ),
    "weights: not a number": tensors_with(lambda t, first: filled(t, first, torch.nan)),
    "weights: infinite": tensors_with(lambda t, first: filled(t, first, torch.inf)),
}


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def assert_refused(status: int, err: str, tmp_path: Path, before: set[Path]) -> None:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert len(lines[0]) < 1500
    assert not (tmp_path / "marker").exists(), "the file's code was run"
    assert set(tmp_path.rglob("*")) == before, "something was left behind"


@pytest.mark.parametrize("damage", DAMAGES)
def test_merging_a_damaged_adapter_is_one_clear_line(diablo, damaged, tmp_path, damage):
    DAMAGES[damage](damaged)
    before = set(tmp_path.rglob("*"))
    status, _, err = diablo("merge", damaged, tmp_path / "out" / "merged")
    assert_refused(status, err, tmp_path, before)


# NaN weights generate something, which is for the user to see.
@pytest.mark.parametrize("damage", [name for name in DAMAGES if not name.endswith((": not a number", ": infinite"))])
def test_loading_a_damaged_adapter_is_one_clear_line(diablo, damaged, tmp_path, damage):
    DAMAGES[damage](damaged)
    before = set(tmp_path.rglob("*"))
    status, _, err = diablo("generate", damaged, "2 and 3", "--max-new-tokens", 1)
    assert_refused(status, err, tmp_path, before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_inspecting_a_damaged_adapter_is_one_clear_line(diablo, damaged, tmp_path, damage):
    DAMAGES[damage](damaged)
    before = set(tmp_path.rglob("*"))
    status, _, err = diablo("inspect", damaged)
    assert_refused(status, err, tmp_path, before)


def test_the_undamaged_adapter_is_merged_and_loaded(diablo, good, tmp_path):
    assert diablo("merge", good, tmp_path / "merged")[0] == 0
    assert diablo("generate", good, "2 and 3", "--max-new-tokens", 1)[0] == 0


def test_a_config_that_names_code_does_not_have_it_imported(diablo, damaged, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').write('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = {"base_model_class": "Model", "parent_library": "evil"}
    config_with(auto_mapping=names, task_type=None)(damaged)
    assert diablo("generate", damaged, "2 and 3", "--max-new-tokens", 1)[0] == 0
    assert diablo("merge", damaged, tmp_path / "merged")[0] == 0
    assert diablo("inspect", damaged)[0] == 0
    assert not (tmp_path / "marker").exists()


def test_a_base_model_that_brings_code_is_not_run(diablo, damaged, tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').write('executed')\n")
    for command in (["merge", damaged, tmp_path / "out"], ["generate", damaged, "2"], ["inspect", damaged]):
        before = set(tmp_path.rglob("*"))
        status, _, err = diablo(*command, "--base", base)
        assert_refused(status, err, tmp_path, before)


def test_a_base_model_in_a_pickle_is_not_unpickled(diablo, damaged, tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Payload(tmp_path / "marker")}))
    before = set(tmp_path.rglob("*"))
    status, _, err = diablo("merge", damaged, tmp_path / "out" / "merged", "--base", base)
    assert_refused(status, err, tmp_path, before)


def check_message(error: UserError) -> None:
    assert str(error).strip()


FUZZED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZED
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255), name=st.sampled_from([CONFIG, WEIGHTS]))
def test_a_changed_byte_is_an_error_or_harmless(good, tiny_model, tmp_path_factory, place, byte, name):
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    shutil.copytree(good, folder)
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content))] ^= byte
    (folder / name).write_bytes(content)
    try:
        model, _ = load_adapter(adapter_folder(folder), base=str(tiny_model))
    except UserError as error:
        check_message(error)
    else:
        assert model.peft_config
    finally:
        shutil.rmtree(folder.parent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZED
@given(key=st.sampled_from(sorted(DiabloConfig().to_dict())), value=JSON)
@example(key="target_modules", value="(a+)+$")
@example(key="modules_to_save", value=["no_such_module"])
@example(key="trainable_token_indices", value=[2**32])
def test_any_value_of_any_key_of_a_config_is_an_error_or_harmless(good, tiny_model, tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    shutil.copytree(good, folder)
    config_with(**{key: value})(folder)
    try:
        load_adapter(adapter_folder(folder), base=str(tiny_model))
    except UserError as error:
        check_message(error)
    finally:
        shutil.rmtree(folder.parent)


SECTIONS = ["data", "method", "training", "evaluation", None]
KEYS = ["model", "task", "train", "num_blocks", "learning_rate", "batch_size", "output", "seed", "limit", "precision"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(section=st.sampled_from(SECTIONS), key=st.sampled_from(KEYS) | st.text(max_size=12), value=JSON)
def test_any_value_of_any_key_of_a_recipe_is_an_error_or_a_recipe(tmp_path, section, key, value):
    content: dict[str, Any] = {"model": "m", "task": "mawps", "method": {"name": "diablo"}, "output": "runs/x"}
    if section is None:
        content[key] = value
    else:
        content[section] = {**content.get(section, {}), key: value}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    try:
        assert isinstance(load_recipe(path), Recipe)
    except UserError as error:
        check_message(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"!!python/object/apply:os.system ['touch marker']")
@example(content=b"model: &a [*a]")
@example(content=b"a: &a [1]\nb: &b [*a,*a]\nc: &c [*b,*b]\n")
@example(content=b"? {}\n: 1")
@example(content=b"%YAML 9.9\n---\nmodel: m")
@example(content=b"model: m\n---\nmodel: n")
@example(content=b"model: 2026-13-45")
@example(content=b"\xef\xbb\xbfmodel: m")
@example(content=DEEP.encode())
def test_no_recipe_is_a_traceback(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    cwd = Path.cwd()
    os.chdir(tmp_path)
    try:
        load_recipe(path)
    except UserError as error:
        check_message(error)
    finally:
        os.chdir(cwd)
    assert not (tmp_path / "marker").exists()
