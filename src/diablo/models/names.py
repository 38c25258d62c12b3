"""What a model can be called: builtin, a folder or an id on the hub, which is asked once and not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from diablo.errors import UserError, did_you_mean, first_line, shortened
from diablo.models.builtin import PREFIX, check_builtin

WHAT_TO_GIVE = f"Give a folder, the id of a model on the hub, or {PREFIX}smollm2-135m."
_CONFIG = "config.json"
T = TypeVar("T")


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


def check_repository(name: str, key: str) -> None:
    """Check that a name can be that of a repository on the hub, with its owner's name in front.

    Args:
        name: what the user gave.
        key: where, for the message.

    Raises:
        UserError: it cannot.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = first_line(error)
    else:
        if "/" in name:
            return
        reason = "the owner's name is missing"
    raise UserError(
        f"{key}: found {shortened(name)}, which is no repository's name ({reason}); give OWNER/NAME, in which OWNER is "
        "your account on the hub, or an organisation's."
    )


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
    url = hf_hub_url(name, _CONFIG)
    try:
        ask_hub(lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT))
    except HfHubHTTPError:
        return
    except NoAnswerError as error:
        raise UserError(
            f"model: {name!r} is no folder, and the hub ({constants.ENDPOINT}) did not answer when asked for it "
            f"({error}). Give a folder or builtin:smollm2-135m, try again later, or set HF_HUB_OFFLINE=1 to have only "
            f"what is in the hub's cache.{similar_folder(name)}"
        ) from None


class NoAnswerError(Exception):
    """The hub did not answer, or said that it cannot; the message says why, in a few words."""


def ask_hub(question: Callable[[], T]) -> T:
    """Ask the hub something, and wait no longer than HF_HUB_ETAG_TIMEOUT says (10 seconds).

    Raises:
        HfHubHTTPError: the hub's answer is an error, such as that there is no such thing or that it may not be asked.
        NoAnswerError: the hub does not answer, or has too much to do.
    """
    answers: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put((True, question()))
        except Exception as error:  # what a network, a proxy or a certificate can be at fault with is open-ended
            answers.put((False, error))

    # The timeout is one of each address that the hub's name has, and looking the name up has none.
    Thread(target=ask, daemon=True).start()
    try:
        is_answer, found = answers.get(timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Empty:
        raise NoAnswerError(f"nothing came for {constants.HF_HUB_ETAG_TIMEOUT} seconds") from None
    if is_answer:
        return found
    status = found.response.status_code if isinstance(found, HfHubHTTPError) else None
    if status is None or status == 429 or status >= 500:
        raise NoAnswerError(first_line(found)) from None
    raise found
