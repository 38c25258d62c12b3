"""Images of records: put where the turns have places for them, and looked at."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diablo.data.faults import NoRowError
from diablo.data.images import PLACE, Image, inspect_image
from diablo.data.rows import Row, RowKind, Turn, kind_of
from diablo.errors import UserError, first_line, shortened

COLUMNS = ("images", "image")
"""The columns that hold the images of a record, beside its turns."""

_A_PART = '{"type": "image", "image": "..."}'
_SPELLED = "<image>"
"""What stands for an image in the texts of data that has images in a column."""
_DATA, _BASE64 = "data:", ";base64,"
_PATH = 300
"""How much of a path a message shows: enough to find the file, and not all of what was meant to be its content."""


def part_image(part: Mapping[str, Any]) -> Any:
    """What a part of a turn's content says of its image; None where the image is in a column.

    Raises:
        NoRowError: it says nothing that can be read.
    """
    value = part.get("image_url") if part.get("type") == "image_url" else None
    if value is not None:
        return value.get("url") if isinstance(value, dict) else value
    if part.get("base64") is not None:
        return f"{_DATA}{_BASE64}{part['base64']}"
    return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)


def column_images(record: Mapping[str, Any]) -> list[Any]:
    """The images that a record has in a column; none where it has no such column, or nothing there.

    Raises:
        NoRowError: it has two such columns.
    """
    found = [record[key] for key in COLUMNS if record.get(key) not in (None, "", [])]
    if len(found) > 1:
        raise NoRowError("has images in both columns, image and images", "give one of them")
    return [] if not found else list(found[0]) if isinstance(found[0], (list, tuple)) else found


def place_images(record: Mapping[str, Any], turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Turns with the images of a record in their places.

    The places are parts of the type ``image``. Where turns have none, ``<image>`` in their texts stands for an image;
    where they have none of these either, the images of a column come before the first text of the user.

    Args:
        record: the record.
        turns: its turns, with None for an image that is in a column.

    Raises:
        NoRowError: there are more images than places, or fewer.
    """
    images = column_images(record)
    has_parts = any(turn.get("images") for turn in turns)
    if images and not has_parts:
        turns = _with_places(turns, len(images))
    asked = [image for turn in turns for image in turn.get("images", ())]
    places = asked.count(None)
    if places != len(images):
        raise NoRowError(
            f"has {places} places for images that are in a column, and {len(images)} there",
            f"give as many, or each image where it stands, as {_A_PART}",
        )
    in_order = iter(images)
    placed = []
    for turn in turns:
        if own := turn.get("images"):
            if turn["content"].count(PLACE) != len(own):
                raise NoRowError("a turn has images and the character U+FDD2", "take that character out")
            own = tuple(next(in_order) if image is None else image for image in own)
        placed.append(turn | {"images": own} if own else turn)
    return tuple(placed)


def _with_places(turns: Sequence[Turn], count: int) -> list[Turn]:
    """Turns with places for images that are in a column, where they have no parts for them."""
    result = [dict(turn) for turn in turns]
    asking = [turn for turn in result if turn["role"] == "user"]
    if not any(_SPELLED in turn["content"] for turn in asking):
        for turn in asking[:1]:
            turn |= {"content": PLACE * count + turn["content"], "images": (None,) * count}
        return result
    for turn in asking:
        if spelled := turn["content"].count(_SPELLED):
            turn |= {"content": turn["content"].replace(_SPELLED, PLACE), "images": (None,) * spelled}
    return result


def with_images(row: Row, folder: Path | None, kind: RowKind) -> Row:
    """A row whose images are looked at, as far as their headers.

    Args:
        row: the row, as a format reads it.
        folder: where its file is; None where it is of no file.
        kind: the kind of the row.

    Raises:
        NoRowError: an image cannot be read, or rows of this kind are not trained with images.
    """
    both = [each for each in (row, row.rejected) if each is not None]
    if not any(turn.get("images") for each in both for turn in each.messages):
        return row
    if kind != "completions":
        raise NoRowError(*WITHOUT_IMAGES)
    messages = [
        turn | {"images": tuple(read_image(image, folder) for image in turn["images"])} if "images" in turn else turn
        for turn in row.messages
    ]
    return replace(row, messages=tuple(messages))


WITHOUT_IMAGES = ("has images, which objective: sft alone is trained with", "set objective to sft, or take them out")
"""What is wrong with images in rows of other objectives, and how to mend it."""


def read_image(value: Any, folder: Path | None) -> Image:
    """An image as records have it: a path, a data URI, or an object with ``bytes`` or ``path``.

    Args:
        value: what the record has.
        folder: what paths are relative to; None where they are taken as they are.

    Raises:
        NoRowError: it is none of these, is not there, or is no image.
    """
    given = value
    if isinstance(value, dict):
        given = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(given, str) and given.startswith(_DATA):
        given = _decoded(given)
    if isinstance(given, bytes):
        # Not by its bytes, nor by a path that is not there: it is told by its row.
        return _inspected("in the row", None, given)
    if not isinstance(given, str):
        raise NoRowError(
            f"an image is {kind_of(given)}", "give a path, a base64 data URI, or an object with bytes or path"
        )
    if given.startswith(("http://", "https://")):
        raise NoRowError(
            f"the image {shortened(given)} is a URL, which is not fetched",
            "download it, and give its path relative to the data file",
        )
    path = Path(given) if folder is None else folder / given
    if not path.is_file():
        raise NoRowError(
            f"there is no image {shortened(str(path), _PATH)}", "paths in rows count from the folder of the data file"
        )
    return _inspected(str(path), path)


def question_about(prompt: str, images: Sequence[Path]) -> Row:
    """A prompt with images before it, whose completion is to come.

    Args:
        prompt: the prompt.
        images: files, as the user names them.

    Raises:
        UserError: one of them cannot be read.
    """
    if not images:
        return Row(1, prompt, completion="?")
    try:
        read = tuple(read_image(str(path), None) for path in images)
    except NoRowError as error:
        raise UserError(f"--image: {error.reason}; {error.mend}.") from None
    asked: Turn = {"role": "user", "content": PLACE * len(read) + prompt, "images": read}
    return Row(1, messages=(asked, {"role": "assistant", "content": ""}))


def _decoded(uri: str) -> bytes:
    head, found, content = uri.partition(",")
    try:
        if not found or not f"{head},".endswith(_BASE64):
            raise ValueError
        return base64.b64decode(content, validate=True)
    except ValueError:
        raise NoRowError("the data URI of an image is not base64", f"begin it with {_DATA}image/png{_BASE64}") from None


def _inspected(name: str, path: Path | None, content: bytes = b"") -> Image:
    try:
        return inspect_image(name, path, content)
    except ImportError:
        raise NoRowError("has images, and Pillow is not installed", "install it with: pip install pillow") from None
    except Exception as error:  # what a decoder raises on what is no image is open-ended
        what = "an image in the row" if path is None else f"the image {shortened(name, _PATH)}"
        reason = "is no image that can be read"
        if path is not None and isinstance(error, OSError) and error.errno is not None:
            reason = f"cannot be read ({first_line(error)})"
        raise NoRowError(
            f"{what} {reason}", "give a whole file of JPEG, PNG, WebP or another format of Pillow"
        ) from None
