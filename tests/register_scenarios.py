"""What happens on the first import of diablo where PEFT is there.

Importing PEFT takes seconds and diablo can be imported for the first time only once in a process: so PEFT is imported
here once, and first_imports.py runs every scenario in a fork of that state.
"""

from __future__ import annotations

import importlib
import sys
from types import MappingProxyType

import peft
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import hotswap, register_peft_method


def add_member() -> PeftType:
    """The member as a PEFT that ships the method would have it."""
    member = str.__new__(PeftType, "DIABLO")
    member._name_ = member._value_ = "DIABLO"
    PeftType._member_map_["DIABLO"] = member
    PeftType._member_names_.append("DIABLO")
    PeftType._value2member_map_["DIABLO"] = member
    getattr(PeftType, "_hashable_values_", []).append("DIABLO")
    type.__setattr__(PeftType, "DIABLO", member)
    return member


def enum_state() -> tuple:
    return (
        dict(PeftType._member_map_),
        list(PeftType._member_names_),
        dict(PeftType._value2member_map_),
        list(getattr(PeftType, "_hashable_values_", [])),
        list(PeftType),
        sorted(vars(PeftType)),
    )


def error_of_import() -> RuntimeError:
    try:
        importlib.import_module("diablo")
    except RuntimeError as error:
        return error
    raise AssertionError("diablo was imported without an error")


def assert_method_works() -> torch.nn.Module:
    """Adapt, train one step, see an effect: with the classes that are imported now."""
    diablo = sys.modules["diablo"]
    base = torch.nn.Sequential(torch.nn.Linear(7, 5))
    x = torch.ones(2, 7)
    before = base(x).detach()
    model = peft.get_peft_model(base, diablo.DiabloConfig(num_blocks=3, target_modules=["0"]))
    assert type(model.base_model) is diablo.DiabloModel
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert not torch.allclose(model(x), before)
    return model


def foreign_package_has_the_name() -> None:
    member = add_member()
    config_cls = type("ForeignConfig", (peft.PeftConfig,), {"__module__": "someone.elses.package"})
    model_cls = type("ForeignModel", (), {"prefix": "diablo_"})
    register_peft_method(name="diablo", config_cls=config_cls, model_cls=model_cls)
    message = str(error_of_import())
    assert "someone.elses.package has already registered the PEFT method DIABLO" in message, message
    # Theirs goes on working.
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config_cls
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is model_cls


def foreign_package_has_the_prefix() -> None:
    add_member()
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["diablo_"] = "diablo_"
    message = str(error_of_import())
    assert f"PEFT {peft.__version__} refuses to register DIABLO" in message, message


def peft_ships_the_member() -> None:
    member = add_member()
    before = enum_state()
    importlib.import_module("diablo")
    assert enum_state() == before
    assert PeftType.DIABLO is member
    assert_method_works()


def enum_without_the_member_gets_it_last() -> None:
    before = list(PeftType)
    assert "DIABLO" not in before
    importlib.import_module("diablo")
    assert list(PeftType) == [*before, "DIABLO"]
    assert len(PeftType) == len(before) + 1
    assert_method_works()


def reloaded_deeply() -> None:
    """What a notebook's autoreload does: every module of the package is executed again."""
    old = importlib.import_module("diablo").DiabloConfig
    members = list(PeftType)
    for name in [name for name in sys.modules if name.partition(".")[0] == "diablo"]:
        del sys.modules[name]
    new = importlib.import_module("diablo").DiabloConfig
    assert new is not old
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DIABLO] is new
    assert list(PeftType) == members
    model = assert_method_works()
    # PEFT's function for swapping goes to the new package, and past the old one for other methods.
    swapping = hotswap.hotswap_adapter_from_state_dict
    assert swapping.__wrapped__.__module__ == "peft.utils.hotswap"
    assert not hasattr(swapping.__wrapped__, "__wrapped__")
    swapping(model, {"base_model.model.0.diablo_blocks.default": torch.ones(3, 3, 2)}, "default", new(num_blocks=3))
    assert model.base_model.model[0].diablo_blocks["default"].sum() == 18


def peft_swaps_adapters_in_another_way() -> None:
    given = hotswap.hotswap_adapter_from_state_dict
    del hotswap.CONFIG_KEYS_TO_CHECK
    importlib.import_module("diablo")
    assert hotswap.hotswap_adapter_from_state_dict is given
    assert_method_works()


def enum_whose_members_do_not_pickle() -> None:
    """The tables take the member, but it does not behave as one."""

    def refuse(self, protocol):
        raise TypeError("members of this enum do not pickle")

    type.__setattr__(PeftType, "__reduce_ex__", refuse)
    before = enum_state()
    error = error_of_import()
    assert "Cannot add DIABLO to PeftType" in str(error), error
    assert "members of this enum do not pickle" in str(error), error
    assert peft.__version__ in str(error), error
    assert enum_state() == before


def read_only_table(table: str) -> None:
    frozen = getattr(PeftType, table)
    frozen = tuple(frozen) if isinstance(frozen, list) else MappingProxyType(frozen)
    type.__setattr__(PeftType, table, frozen)
    before = enum_state()
    error = error_of_import()
    assert "Cannot add DIABLO to PeftType" in str(error), error
    assert enum_state() == before


def enum_with_read_only_members() -> None:
    read_only_table("_member_map_")


def enum_with_read_only_names() -> None:
    read_only_table("_member_names_")


def enum_with_read_only_values() -> None:
    read_only_table("_value2member_map_")


SCENARIOS = (
    foreign_package_has_the_name,
    foreign_package_has_the_prefix,
    peft_ships_the_member,
    enum_without_the_member_gets_it_last,
    reloaded_deeply,
    peft_swaps_adapters_in_another_way,
    enum_whose_members_do_not_pickle,
    enum_with_read_only_members,
    enum_with_read_only_names,
    enum_with_read_only_values,
)
