"""First imports of diablo, before PEFT is imported and after, run by unit/test_register.py in a process of its own.

Prints a JSON object: the name of each module of scenarios to its scenarios, and each of these to None or its traceback.
"""

from __future__ import annotations

import json
import sys

from forking import run_all

if __name__ == "__main__":
    import late_peft_scenarios

    assert not {"peft", "diablo"} & set(sys.modules)
    found = {late_peft_scenarios.__name__: run_all(late_peft_scenarios.SCENARIOS)}

    import register_scenarios

    assert "diablo" not in sys.modules
    found[register_scenarios.__name__] = run_all(register_scenarios.SCENARIOS)
    json.dump(found, sys.stdout)
