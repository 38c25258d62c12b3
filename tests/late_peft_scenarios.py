"""What happens when PEFT is imported after diablo.

What PEFT stands on takes seconds to import, PEFT itself and diablo can each be imported for the first time only once in
a process: so the former is imported here once, and first_imports.py runs every scenario in a fork of that state.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import threading

import accelerate  # noqa: F401
import torch
from transformers import PreTrainedModel  # noqa: F401

BEFORE = list(sys.meta_path)


def assert_method_works() -> None:
    """PEFT finds the method; it is adapted with, trained a step, and has an effect. The hook is gone."""
    peft, diablo = sys.modules["peft"], sys.modules["diablo"]
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert list(peft.PeftType).count("DIABLO") == 1
    # The table is looked at before a name of diablo's is asked for: PEFT alone must have led to it.
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.DIABLO] is diablo.DiabloConfig
    assert sys.meta_path == BEFORE
    loader = type(sys.modules["json"].__loader__)
    assert type(peft.__loader__) is type(peft.__spec__.loader) is loader
    base, x = torch.nn.Sequential(torch.nn.Linear(7, 5)), torch.ones(2, 7)
    before = base(x).detach()
    model = peft.get_peft_model(base, diablo.DiabloConfig(num_blocks=3, target_modules=["0"]))
    model(x).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert not torch.allclose(model(x), before)


def error_of_import(kind: type[Exception]) -> str:
    try:
        importlib.import_module("peft")
    except kind as error:
        return str(error)
    raise AssertionError("PEFT was imported without an error")


def peft_is_imported_later() -> None:
    import diablo  # noqa: F401

    assert "peft" not in sys.modules
    assert "diablo.tuner" not in sys.modules
    import peft  # noqa: F401

    assert_method_works()


def a_name_is_taken_from_peft_later() -> None:
    from peft.tuners.lora import LoraLayer  # noqa: F401

    import diablo  # noqa: F401

    assert_method_works()


def a_name_is_taken_from_diablo() -> None:
    from diablo import DiabloConfig

    assert DiabloConfig.__module__ == "diablo.tuner.config"
    assert_method_works()


def all_names_are_taken_from_diablo() -> None:
    names: dict = {}
    exec("from diablo import *", names)
    assert set(sys.modules["diablo"].__all__) <= set(names) <= {*dir(sys.modules["diablo"])} | {"__builtins__"}
    assert_method_works()


def the_tuner_imports_peft() -> None:
    """The hook then comes upon a tuner that is half imported."""
    from diablo.tuner.model import DiabloModel  # noqa: F401

    assert_method_works()


def a_room_is_asked_for_as_an_attribute() -> None:
    import diablo

    assert diablo.layout.BlockLayout is diablo.BlockLayout
    assert "peft" not in sys.modules
    assert diablo.tuner.DiabloConfig is diablo.DiabloConfig
    assert_method_works()


def peft_is_only_looked_for() -> None:
    import diablo  # noqa: F401

    spec = importlib.util.find_spec("peft")
    assert spec.name == "peft"
    assert spec.submodule_search_locations
    assert spec.loader.is_package("peft")
    assert spec.loader.get_filename("peft") == spec.origin
    assert "peft" not in sys.modules
    assert "diablo.tuner" not in sys.modules
    assert sys.meta_path[1:] == BEFORE
    import peft  # noqa: F401

    assert_method_works()


def peft_cannot_be_imported_at_first() -> None:
    import diablo  # noqa: F401

    given, sys.modules["peft.auto"] = sys.modules.get("peft.auto"), None
    error = error_of_import(ImportError)
    assert "peft.auto" in error, error
    assert "diablo" not in error, error
    assert given is None
    assert "peft" not in sys.modules
    del sys.modules["peft.auto"]
    import peft  # noqa: F401

    assert_method_works()


def peft_cannot_be_extended() -> None:
    import diablo
    from diablo.importing import when_imported

    def refuse() -> None:
        type.__setattr__(sys.modules["peft"].PeftType, "_member_names_", ())

    when_imported("peft", refuse)
    # The last hook is the first to be called: what it finds is what those before it wrap.
    sys.meta_path.insert(0, sys.meta_path.pop(1))
    error = error_of_import(RuntimeError)
    assert "Cannot add DIABLO to PeftType" in error, error
    assert "peft" not in sys.modules
    assert diablo.__version__


def diablo_is_reloaded_before() -> None:
    import diablo

    importlib.reload(diablo)
    for name in [name for name in sys.modules if name.partition(".")[0] == "diablo"]:
        del sys.modules[name]
    import peft  # noqa: F401

    import diablo

    assert_method_works()


def threads_import_both_at_once() -> None:
    import diablo

    start, faults = threading.Barrier(4), []

    def run(statement: str) -> None:
        start.wait()
        try:
            exec(statement, {"diablo": diablo})
        except BaseException as error:
            faults.append((statement, error))

    statements = (
        "from peft import get_peft_model",
        "diablo.DiabloConfig(num_blocks=3)",
        "from diablo import DiabloConfig; DiabloConfig(num_blocks=3)",
        "from diablo.models.adapters import load_adapter; diablo.DiabloConfig(num_blocks=3)",
    )
    threads = [threading.Thread(target=run, args=[statement], daemon=True) for statement in statements]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults, faults
    assert_method_works()


def a_config_arrives_by_pickle() -> None:
    """The argument of this script is one that another process has pickled."""
    config = pickle.loads(bytes.fromhex(sys.argv[1]))
    assert config == sys.modules["diablo"].DiabloConfig(num_blocks=3)
    assert config.peft_type is sys.modules["peft"].PeftType.DIABLO
    assert_method_works()


SCENARIOS = (
    peft_is_imported_later,
    a_name_is_taken_from_peft_later,
    a_name_is_taken_from_diablo,
    all_names_are_taken_from_diablo,
    the_tuner_imports_peft,
    a_room_is_asked_for_as_an_attribute,
    peft_is_only_looked_for,
    peft_cannot_be_imported_at_first,
    peft_cannot_be_extended,
    diablo_is_reloaded_before,
    threads_import_both_at_once,
    a_config_arrives_by_pickle,
)
