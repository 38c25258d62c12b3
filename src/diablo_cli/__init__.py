"""The command line: each verb is one call of a public function.

A verb first refuses what it can, by functions that import neither torch nor PEFT, and then imports what it needs: these
take seconds, for which neither ``diablo --help`` nor a typo should wait.
"""

from __future__ import annotations

import logging
import os
import sys

# isort: off
# Verbs are listed in the order in which their modules are imported.
from diablo_cli import recipes, training, scoring, models, classifying, embedding, publishing, serving
from diablo_cli.shell import app

# isort: on

__all__ = [
    "app",
    "classifying",
    "embedding",
    "main",
    "models",
    "publishing",
    "recipes",
    "scoring",
    "serving",
    "training",
]


def main() -> None:
    """Run the command line; an error that the user can mend is a message and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Where quantization libraries are installed, PEFT imports them, and they report kernels for other machines.
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # DeepSpeed sets the level of its log itself, and writes to standard output.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        app(standalone_mode=True)
    except Exception as error:
        from diablo.errors import Interrupted, UserError

        if isinstance(error, Interrupted):
            print(error, file=sys.stderr)
            sys.exit(error.status)
        if not isinstance(error, UserError):
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
