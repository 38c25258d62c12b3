"""Uploads to the hub: what is checked before, which files are uploaded, and which model card is there afterwards."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from diablo.errors import UserError, first_line
from diablo.models.builtin import ORIGIN, PREFIX, cache_folder
from diablo.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_model_of, read_settings
from diablo.models.names import NoAnswerError, ask_hub, check_repository
from diablo.publishing.card import Kind
from diablo.recipes.publishing import PushToHub
from diablo.records.card import CARD, HERE, Card, EditedCardError, called, hub_id, joined, write_adapter_facts

# What models and adapters are made of. Anything else, such as a file of rows, is not uploaded unasked.
_ENDINGS = (".safetensors", ".json", ".jinja", ".md", ".model", ".tiktoken", ".spm")
_NAMES = ("merges.txt", "vocab.txt", "LICENSE", "LICENSE.txt", "NOTICE")
_HOW_TO_LOG_IN = (
    "log in with: hf auth login, or set HF_TOKEN; tokens are made at https://huggingface.co/settings/tokens"
)


@dataclass(frozen=True)
class Repository:
    """Where to upload to.

    Attributes:
        id: ``OWNER/NAME``.
        private: whether it must be private.
        revision: a branch, made where it is missing; the main one where None.
    """

    id: str
    private: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class Upload:
    """What an upload came to.

    Attributes:
        url: where people find it.
        files: the names of the files.
        left_out: files of the folder that are no part of a model or an adapter.
        kept_card: whether the model card there stayed as it was, since somebody has written into it.
    """

    url: str
    files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    kept_card: bool = False


def check_writable(repository: Repository, key: str) -> None:
    """Check that a repository can be written to: this machine is online, and a token is there that may write.

    The hub is asked who the token is of, and whether the repository is there; nothing is made or changed.

    Args:
        repository: where to write.
        key: what the user set to it, for messages.

    Raises:
        UserError: it cannot be written to, or is public and was to be private.
    """
    name = repository.id
    check_repository(name, key)
    if constants.is_offline_mode():
        raise UserError(f"{key}: {name!r} cannot be reached while HF_HUB_OFFLINE is set; unset it.")
    if get_token() is None:
        raise UserError(f"{key}: there is no token with which to write to {name!r}; {_HOW_TO_LOG_IN}.")
    api = HfApi()
    try:
        _check_rights(ask_hub(api.whoami), name, key)
        if repository.private and not ask_hub(lambda: api.model_info(name)).private:
            raise UserError(
                f"{key}: {name!r} exists and is public, and was to be private; make it private in its settings on the "
                "hub, or choose another name."
            )
    except RepositoryNotFoundError:
        return
    except NoAnswerError as error:
        raise UserError(
            f"{key}: the hub ({constants.ENDPOINT}) did not answer when asked about {name!r} ({error}); check the "
            "network, or try again later."
        ) from None
    except HfHubHTTPError as error:
        raise UserError(f"{key}: {_refusal(error, name)}") from None


def folder_to_upload(path: str, *, merged: bool = False) -> tuple[Path, Kind]:
    """The folder that is meant by a run, or by a folder of an adapter or a model, and what it holds.

    Args:
        path: what the user gave.
        merged: whether the merged model of a run is meant, and not its adapter.

    Raises:
        UserError: there is no such thing.
    """
    root = Path(path)
    if merged:
        if (root / "merged" / "config.json").is_file():
            return root / "merged", "merged"
        raise UserError(
            f"--merged: {path!r} has no merged model; make one with: diablo merge {path} {root / 'merged'}, or give "
            "the folder of a merged model without --merged."
        )
    for folder in (root, root / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file():
            if not (folder / ADAPTER_WEIGHTS).is_file():
                raise UserError(f"{str(folder)!r} has no {ADAPTER_WEIGHTS}; give a folder that training wrote.")
            return folder, "adapter"
    for folder in (root, root / "model"):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder, "merged" if folder == root else "model"
    raise UserError(
        f"{path!r} holds neither an adapter ({ADAPTER_CONFIG}) nor a model (config.json and *.safetensors); give a "
        "run's folder, or that of an adapter or a model."
    )


def base_on_hub(adapter: Path, given: str | None, key: str) -> str:
    """The id on the hub of an adapter's base model: an adapter names it, and others have no folder of this machine.

    Args:
        adapter: the adapter's folder.
        given: what the user says it is; None for what the adapter says.
        key: where the user says so, for messages.

    Raises:
        UserError: it has no id on the hub.
    """
    if given is not None:
        if hub_id(given) is None:
            raise UserError(f"{key}: found {given!r}; give the id of the base model on the hub, such as org/name.")
        return given
    name = base_model_of(adapter)
    if name.startswith(PREFIX):
        return ORIGIN[name.removeprefix(PREFIX)]
    if Path(name).parent == cache_folder():
        return next(origin for builtin, origin in ORIGIN.items() if Path(name).name.startswith(f"{builtin}-"))
    if (found := hub_id(name)) is None:
        raise UserError(
            f"{key}: the adapter's base model is a folder on this machine ({name}), which others do not have; say "
            f"which model on the hub it is with {key}, or push the merged model."
        )
    return found


def upload(
    folder: Path,
    kind: Kind,
    repository: Repository,
    *,
    base: str | None = None,
    base_key: str = "--base",
    message: str | None = None,
    overwrite_card: bool = False,
    key: str = "REPO",
) -> Upload:
    """Upload an adapter or a model with its model card, as one commit. The repository is made where it is missing.

    The adapter's config and the card are uploaded with the base model's id on the hub, and with no path of this
    machine. A card on the hub that somebody has written into stays, unless ``overwrite_card``.

    Args:
        folder: the folder; nothing in it is changed.
        kind: what it holds.
        repository: where to.
        base: the base model's id on the hub, where the adapter names a folder.
        base_key: where the user gives ``base``, for messages.
        message: of the commit.
        overwrite_card: whether a card that somebody has written into is replaced.
        key: where the user named the repository, for messages.

    Raises:
        UserError: it may not be written to, has no base model on the hub, or the upload failed.
    """
    if kind == "adapter":
        base = base_on_hub(folder, base, base_key)
    elif base is not None and hub_id(base) is None:
        raise UserError(f"{base_key}: found {base!r}; give the id of the base model on the hub, such as org/name.")
    card = _card(folder, kind, base)
    names = {HERE: repository.id}
    if kind == "adapter" and base is not None:
        names[called(base_model_of(folder))] = base
    check_writable(repository, key)
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    wanted = [path for path in paths if path.suffix in _ENDINGS or path.name in _NAMES]
    contents: dict[str, Any] = {path.name: path for path in wanted}
    if kind == "adapter":
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = base
        contents[ADAPTER_CONFIG] = f"{json.dumps(settings, indent=2)}\n".encode()
    api = HfApi()
    try:
        url = api.create_repo(repository.id, private=repository.private or None, exist_ok=True)
        if repository.revision is not None:
            api.create_branch(repository.id, branch=repository.revision, exist_ok=True)
        there = _card_there(api, repository)
        kept = there is not None and there.edited and not overwrite_card
        if kept:
            contents.pop(CARD, None)
        else:
            if there is not None:
                card.data = joined(there.data, card.data)
            if "license" not in card.data and base is not None:
                card.data |= _license_on_hub(api, base)
            card.data["base_model"] = base or card.data.get("base_model")
            card.rename(names)
            contents[CARD] = card.content().encode()
        api.create_commit(
            repository.id,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=message or f"Upload {'an adapter' if kind == 'adapter' else 'a model'} with diablo",
            revision=repository.revision,
        )
    except HfHubHTTPError as error:
        raise UserError(f"{key}: {_refusal(error, repository.id)}") from None
    except Exception as error:  # networks, proxies and disks fail in ways of their own
        raise UserError(f"{key}: the upload to {repository.id!r} failed ({first_line(error)}); try again.") from None
    left_out = [path.name for path in paths if path not in wanted]
    place = f"{url}/tree/{repository.revision}" if repository.revision else str(url)
    return Upload(place, sorted(contents), left_out, kept)


def check_upload(settings: PushToHub | None) -> None:
    """Ask the hub whether the result of a run can be uploaded, where its recipe asks for that.

    Raises:
        UserError: it cannot.
    """
    if settings is not None:
        check_writable(Repository(settings.repo, settings.private), "push_to_hub")


def upload_result(settings: PushToHub | None, folder: Path, kind: Kind) -> tuple[Upload | None, str | None]:
    """Upload the result of a run, where its recipe asks for that.

    Returns:
        The upload, and why it failed; None each where there is none.
    """
    if settings is None:
        return None, None
    repository = Repository(settings.repo, settings.private)
    base_key = "push_to_hub.base"
    try:
        return upload(folder, kind, repository, base=settings.base, base_key=base_key, key="push_to_hub"), None
    except UserError as error:
        return None, str(error)


def _card(folder: Path, kind: Kind, base: str | None) -> Card:
    """The card of a folder, or a short one where it has none, with the base model that is uploaded."""
    try:
        card = Card.read(folder)
        if not card.text and kind == "adapter":
            # It imports PEFT, for which nothing that is refused is to wait.
            from diablo.models.adapters import read_adapter_config

            read_adapter_config(folder)
            method = str(read_settings(folder)["peft_type"])
            with tempfile.TemporaryDirectory() as scratch:
                write_adapter_facts(Path(scratch), method, base, {}, read_settings(folder).get("task_type"))
                card = Card.read(Path(scratch))
        elif not card.text:
            data = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["diablo-peft"]}
            card.put("run", "A plain transformers model, fine-tuned with diablo.", data, "A fine-tuned model")
    except EditedCardError as error:
        raise UserError(f"{folder / CARD} cannot be uploaded: {error}; mend it.") from None
    if base is not None:
        card.data["base_model"] = base
        card.data["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    return card


def _card_there(api: HfApi, repository: Repository) -> Card | None:
    """The card in the repository; None where there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = api.hf_hub_download(repository.id, CARD, revision=repository.revision, local_dir=scratch)
        except (EntryNotFoundError, RevisionNotFoundError):
            return None
        content = Path(path).read_text(encoding="utf-8")
    try:
        return Card.parse(content)
    except EditedCardError:
        return Card({}, content, edited=True)


def _license_on_hub(api: HfApi, base: str) -> dict[str, Any]:
    try:
        data = ask_hub(lambda: api.model_info(base)).card_data
    except (HfHubHTTPError, NoAnswerError):
        return {}
    told = data.to_dict() if data else {}
    return {key: told[key] for key in ("license", "license_name", "license_link") if isinstance(told.get(key), str)}


def _check_rights(who: dict[str, Any], name: str, key: str) -> None:
    """Check what the hub says of a token: that it may write, and write there."""
    owner = name.partition("/")[0]
    orgs = [org["name"] for org in who.get("orgs", [])]
    if owner not in (who["name"], *orgs):
        others = f", or of {', '.join(orgs)}" if orgs else ""
        raise UserError(
            f"{key}: found {name!r}, and the token is of {who['name']!r}, who is not in an organisation {owner!r}; "
            f"give a repository of {who['name']}{others}, or log in as somebody else with: hf auth login --force."
        )
    token = who.get("auth", {}).get("accessToken", {})
    role = token.get("role")
    scopes = token.get("fineGrained", {}).get("scoped", [])
    writes = any(
        permission in ("repo.write", "repo.content.write") and scope.get("entity", {}).get("name") in (owner, name)
        for scope in scopes
        for permission in scope.get("permissions", [])
    )
    if role == "read" or (role == "fineGrained" and not writes):
        raise UserError(
            f"{key}: the token {token.get('displayName', '')!r} of {who['name']!r} may read, but not write to {name!r};"
            " make one that may write at https://huggingface.co/settings/tokens, and log in with: hf auth login --force"
            "."
        )


def _refusal(error: HfHubHTTPError, name: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the hub does not take the token; {_HOW_TO_LOG_IN}."
    if status == 403:
        return f"the token may not write to {name!r}; give a repository of yours, or {_HOW_TO_LOG_IN}."
    return f"the hub refused the upload to {name!r} ({first_line(error)}); try again."
