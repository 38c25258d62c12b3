"""DIABLO as a member of PEFT's enum: everything that is done with members, and every way the first import can go."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import late_peft_scenarios
import peft
import pytest
import register_scenarios
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import diablo
from diablo.tuner import register


def test_member_is_found_in_every_way():
    member = PeftType.DIABLO
    assert PeftType["DIABLO"] is member
    assert PeftType("DIABLO") is member
    assert getattr(PeftType, "DIABLO") is member  # noqa: B009
    assert PeftType.__members__["DIABLO"] is member
    assert sum(other is member for other in PeftType) == 1
    assert member in PeftType
    assert list(reversed(PeftType))[0] is member  # noqa: RUF015
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)


def test_member_is_like_those_that_peft_ships():
    member, lora = PeftType.DIABLO, PeftType.LORA
    assert isinstance(member, PeftType)
    assert type(member) is type(lora)
    assert (member.name, member.value) == ("DIABLO", "DIABLO")
    for shown in (repr, str, format):
        assert shown(member) == shown(lora).replace("LORA", "DIABLO")
    assert member == "DIABLO"
    assert "DIABLO" == member  # noqa: SIM300
    assert member != lora
    assert member != "diablo"
    assert hash(member) == hash(PeftType("DIABLO"))
    assert {member: 1}[PeftType("DIABLO")] == 1
    assert json.dumps({"peft_type": member}) == '{"peft_type": "DIABLO"}'


def test_other_members_are_as_they_were():
    assert PeftType("LORA") is PeftType.LORA
    assert PeftType.DIABLO not in (member for member in PeftType if member.name != "DIABLO")
    with pytest.raises(ValueError, match="DIABLOS"):
        PeftType("DIABLOS")
    with pytest.raises(KeyError):
        PeftType["diablo"]
    with pytest.raises(AttributeError):
        PeftType.LORA = "x"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_member_survives_pickle(protocol):
    assert pickle.loads(pickle.dumps(PeftType.DIABLO, protocol)) is PeftType.DIABLO
    config = pickle.loads(pickle.dumps(diablo.DiabloConfig(num_blocks=3), protocol))
    assert config == diablo.DiabloConfig(num_blocks=3)
    assert config.peft_type is PeftType.DIABLO


def test_member_survives_copies():
    assert copy.copy(PeftType.DIABLO) is PeftType.DIABLO
    assert copy.deepcopy({"type": [PeftType.DIABLO]})["type"][0] is PeftType.DIABLO


def test_member_as_a_type_of_argparse(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", type=PeftType, choices=list(PeftType))
    assert parser.parse_args(["--method", "DIABLO"]).method is PeftType.DIABLO
    with pytest.raises(SystemExit):
        parser.parse_args(["--method", "DIABLOS"])
    assert "invalid PeftType value" in capsys.readouterr().err


def test_peft_finds_the_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["DIABLO"] is diablo.DiabloConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["DIABLO"] is diablo.DiabloModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["DIABLO"] == diablo.DiabloModel.prefix
    assert type(peft.get_peft_config({"peft_type": "DIABLO", "num_blocks": 3})) is diablo.DiabloConfig


def test_registering_again_and_reloading_are_harmless():
    member, members = PeftType.DIABLO, list(PeftType)
    register()
    assert importlib.import_module("diablo") is diablo
    importlib.reload(diablo)
    importlib.reload(diablo)
    assert list(PeftType) == members
    assert PeftType.DIABLO is member
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(7, 5)), diablo.DiabloConfig(num_blocks=3, target_modules=["0"])
    )
    assert type(model.base_model) is diablo.DiabloModel
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(3, 3, 2)]


def test_the_names_of_the_package_are_those_that_a_type_checker_sees():
    tree = ast.parse(Path(diablo.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for alias in statement.names
    }
    assert seen | {"__version__"} == set(diablo.__all__) <= set(dir(diablo))
    for name in diablo.__all__:
        assert getattr(diablo, name) is not None
    with pytest.raises(AttributeError, match="module 'diablo' has no attribute 'DiabloConfigs'"):
        diablo.DiabloConfigs  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'DiabloConfigs' from 'diablo'"):
        exec("from diablo import DiabloConfigs")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, str | None]]:
    """What each of the scenarios came to, in a process of its own; by their modules."""
    source = str(Path(diablo.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    script = Path(register_scenarios.__file__).with_name("first_imports.py")
    done = subprocess.run(
        [sys.executable, script, pickle.dumps(diablo.DiabloConfig(num_blocks=3)).hex()],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def scenarios_of(*modules: ModuleType) -> list[tuple[str, str]]:
    return [(module.__name__, scenario.__name__) for module in modules for scenario in module.SCENARIOS]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the scenarios share one import of torch by forking")
@pytest.mark.parametrize(("module", "name"), scenarios_of(late_peft_scenarios, register_scenarios))
def test_first_import(outcomes, module, name):
    assert outcomes[module][name] is None, outcomes[module][name]
