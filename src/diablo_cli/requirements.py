"""The packages that the command line needs beyond the library: the extra ``cli``."""

from __future__ import annotations

from importlib.util import find_spec

CLI_PACKAGES = {
    "datasets": "datasets",
    "gguf": "gguf",
    "jinja2": "jinja2",
    "math-verify": "math_verify",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "PyYAML": "yaml",
    "rich": "rich",
    "trl": "trl",
    "typer": "typer",
}
"""Each package, as pip calls it, and the name that it is imported by."""


def missing_packages() -> str | None:
    """An error message that names the packages that are not installed; None where all are."""
    missing = [package for package, name in CLI_PACKAGES.items() if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"the command line needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
        "install it with: pip install 'diablo-peft[cli]'"
    )
