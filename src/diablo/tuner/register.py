"""Make DIABLO a PEFT method, from outside of PEFT.

PEFT looks a method up by a member of the enum ``peft.PeftType`` and writes the member's value into
``adapter_config.json``. An enum is closed once its class exists, and ``register_peft_method`` refuses a name that is no
member. The member therefore has to be added first, by writing to the tables in which the enum keeps its members.
Everything that depends on how CPython builds these tables is in this file, and is checked afterwards. If a new Python
or PEFT differs in a way that matters, the error comes here, and not as a puzzling one later.
"""

from __future__ import annotations

import copy
import pickle
import sys
from functools import wraps
from typing import Any

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import hotswap, register_peft_method

from diablo.tuner.config import DiabloConfig
from diablo.tuner.model import DiabloModel
from diablo.tuner.swapping import swap_state_dict

NAME = "DIABLO"


def register() -> None:
    """Register the method with PEFT. Calling it again, also after a reload of this package, is harmless.

    Raises:
        RuntimeError: another package has registered the name, or this PEFT cannot be extended.
    """
    if NAME not in PeftType.__members__:
        _add_member()
    member = PeftType[NAME]
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is None:
        try:
            register_peft_method(name=NAME.lower(), config_cls=DiabloConfig, model_cls=DiabloModel)
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"PEFT {peft.__version__} refuses to register {NAME}: {error}") from error
    elif _is_ours(registered):
        # A reload has made new classes of the same names. Instances of the new config must find the new tuner.
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = DiabloConfig
        PEFT_TYPE_TO_TUNER_MAPPING[member] = DiabloModel
    else:
        raise RuntimeError(
            f"{registered.__module__} has already registered the PEFT method {NAME}, and a process can have only one: "
            "use that implementation, or do not import it together with diablo."
        )
    if PEFT_TYPE_TO_PREFIX_MAPPING.get(member) != DiabloModel.prefix:
        raise RuntimeError(
            f"PEFT {peft.__version__} saves {NAME} adapters under the prefix "
            f"{PEFT_TYPE_TO_PREFIX_MAPPING.get(member)!r}, not {DiabloModel.prefix!r}; use a release that diablo knows."
        )
    _register_swapping(member)


def _register_swapping(member: PeftType) -> None:
    """Let ``peft.utils.hotswap.hotswap_adapter`` take the method's adapters too.

    PEFT looks in a table whether it can swap a method's adapters, and then calls a function that is written for LoRA.
    For every other method that function is called as before. A PEFT that does this in another way is left alone. It
    says itself that it does not know the method.
    """
    peft_hotswap: Any = hotswap
    names = ("check_hotswap_configs_compatible", "hotswap_adapter_from_state_dict")
    tables = getattr(peft_hotswap, "CONFIG_KEYS_TO_CHECK", None)
    if not isinstance(tables, dict) or not set(names) <= set(peft_hotswap.hotswap_adapter.__code__.co_names):
        return
    given = peft_hotswap.hotswap_adapter_from_state_dict
    # After a reload, the function there is that of the package before the reload. PEFT's own is kept in it.
    of_peft = getattr(given, "_diablo_others", given)

    @wraps(of_peft)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if config.peft_type == member:
            swap_state_dict(model, state_dict, adapter_name, config)
        else:
            of_peft(model, state_dict, adapter_name, config, *args, **kwargs)

    hotswap_adapter_from_state_dict._diablo_others = of_peft  # pyrefly: ignore[missing-attribute]
    peft_hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    # PEFT would check settings of the active adapter. Swapping itself checks those of the adapter that is swapped,
    # which may be another one.
    tables[member] = []


def _is_ours(config_cls: type) -> bool:
    return (config_cls.__module__, config_cls.__qualname__) == (DiabloConfig.__module__, DiabloConfig.__qualname__)


def _add_member() -> None:
    """Add the member to ``PeftType`` and check that it behaves as one. If it does not, remove it again."""
    enum: Any = PeftType
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    try:
        enum._member_map_[NAME] = member
        enum._member_names_.append(NAME)
        enum._value2member_map_[NAME] = member
        # From Python 3.13 on, look-up by value goes through a list of the hashable values.
        if hasattr(enum, "_hashable_values_"):
            enum._hashable_values_.append(NAME)
        # The metaclass guards plain attribute setting on an enum.
        type.__setattr__(enum, NAME, member)
        _check_member(member)
    except Exception as error:
        _remove_member()
        raise RuntimeError(
            f"Cannot add {NAME} to PeftType of PEFT {peft.__version__} on Python {sys.version.split()[0]}: {error}. "
            "Install the PEFT that diablo's constraints.txt names."
        ) from error


def _check_member(member: PeftType) -> None:
    """Everything that PEFT, pickle, copy and argument parsers do with a member."""
    behaviours = {
        "attribute access": lambda: PeftType.DIABLO,  # pyrefly: ignore[missing-attribute]
        "look-up by name": lambda: PeftType[NAME],
        "look-up by value": lambda: PeftType(NAME),
        "iteration": lambda: list(PeftType)[-1],
        "pickle": lambda: pickle.loads(pickle.dumps(member)),
        "copy": lambda: copy.deepcopy(member),
    }
    for name, behaviour in behaviours.items():
        if behaviour() is not member:
            raise RuntimeError(f"{name} does not give the new member")
    if member != NAME or member.name != NAME or member.value != NAME or NAME not in list(PeftType):
        raise RuntimeError("the new member does not equal its name")


def _remove_member() -> None:
    # Only tables that took the member are touched. One that refused it would refuse this too, and that error would hide
    # the first one.
    for table in (PeftType._member_map_, PeftType._value2member_map_):
        if NAME in table:
            del table[NAME]
    for names in (PeftType._member_names_, getattr(PeftType, "_hashable_values_", [])):
        if NAME in names:
            names.remove(NAME)
    if NAME in PeftType.__dict__:
        type.__delattr__(PeftType, NAME)
