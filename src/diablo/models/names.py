"""What a model can be called: builtin, a folder or an id on the hub, which is asked once and not waited for."""

from __future__ import annotations

import os
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from diablo.errors import UserError, did_you_mean, first_line
from diablo.models.builtin import PREFIX, check_builtin

WHAT_TO_GIVE = f"Give a folder, the id of a model on the hub, or {PREFIX}smollm2-135m."
_CONFIG = "config.json"


def check_name(name: str, key: str = "model") -> None:
    """Check that a name can be a model's, before anything is read, fetched or asked for.

    Args:
        name: a folder, an id on the hub or ``builtin:NAME``.
        key: what the user set to it, for the message.

    Raises:
        UserError: there is no such folder or builtin model, and it cannot be an id on the hub.
    """
    if name.startswith(PREFIX):
        check_builtin(name)
        return
    if os.path.isdir(name):
        return
    if os.path.isfile(name):
        raise UserError(f"{key}: {name!r} is a file. {WHAT_TO_GIVE}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"{key}: there is no folder {name!r}, which cannot be the id of a model on the hub either. {WHAT_TO_GIVE}"
            f"{similar_folder(name)}"
        ) from None


def similar_folder(name: str) -> str:
    """The end of a message about a model that is not there: a folder with almost the same name, or nothing."""
    parent = Path(name).parent
    try:
        return did_you_mean(name, [path for path in parent.iterdir() if path.is_dir()])
    except (OSError, ValueError):
        return ""


def check_on_hub(name: str) -> None:
    """Check that a model which is no folder can be had, without huggingface_hub's minutes of retries.

    The hub is asked once, for as long as HF_HUB_ETAG_TIMEOUT says (10 seconds). That it knows no such model, or shows
    it to members alone, transformers finds out as fast, and says so better.

    Args:
        name: an id on the hub.

    Raises:
        UserError: the hub does not answer, or may not be asked, and its cache on this machine lacks the model.
    """
    if isinstance(try_to_load_from_cache(name, _CONFIG), str):
        return
    if constants.is_offline_mode():
        raise UserError(
            f"model: {name!r} is no folder, and is not in the hub's cache on this machine ({constants.HF_HUB_CACHE}), "
            "the one place to look for it while HF_HUB_OFFLINE is set. Give a folder or builtin:smollm2-135m, or unset "
            f"HF_HUB_OFFLINE.{similar_folder(name)}"
        )
    fault = _ask_hub(name)
    if fault is not None:
        raise UserError(
            f"model: {name!r} is no folder, and the hub ({constants.ENDPOINT}) did not answer when asked for it "
            f"({fault}). Give a folder or builtin:smollm2-135m, try again later, or set HF_HUB_OFFLINE=1 to have only "
            f"what is in the hub's cache.{similar_folder(name)}"
        )


def _ask_hub(name: str) -> str | None:
    """Why the hub does not answer; None where it does, whatever it says."""
    answers: SimpleQueue[str | None] = SimpleQueue()
    url = hf_hub_url(name, _CONFIG)

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HfHubHTTPError as error:
            status = error.response.status_code
            answers.put(first_line(error) if status == 429 or status >= 500 else None)
        except Exception as error:  # what a network, a proxy or a certificate can be at fault with is open-ended
            answers.put(first_line(error))
        else:
            answers.put(None)

    # The timeout is one of each address that the hub's name has, and looking the name up has none.
    Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Empty:
        return f"nothing came for {constants.HF_HUB_ETAG_TIMEOUT} seconds"
