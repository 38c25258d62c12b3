"""Images of rows: where they stand in a turn's text, and what is known of them before their pixels are read."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diablo.errors import UserError, first_line

PLACE = "\ufdd2"
"""What stands in the text of a turn where an image is. Unicode reserves the character for use inside a program."""

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""Orientations of EXIF in which width and height change places."""


@dataclass(frozen=True)
class Image:
    """An image of a row, which is not opened yet.

    Attributes:
        name: what messages call it.
        size: its width and height in pixels, the right way up.
        path: its file; None where it stands in the row itself.
        content: the bytes of such a file where it stands in the row.
    """

    name: str
    size: tuple[int, int]
    path: Path | None = None
    content: bytes = b""

    @property
    def key(self) -> str:
        """What tells it from other images."""
        return hashlib.sha256(self.content).hexdigest() if self.path is None else str(self.path)

    def pixels(self) -> Any:
        """The image as PIL has it, in RGB, the right way up.

        Raises:
            UserError: it can no longer be read, or has changed.
        """
        from PIL import ImageOps

        try:
            with _opened(self.path, self.content) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except Exception as error:  # what a decoder raises on damaged files is open-ended
            raise UserError(f"data: the image {self.name} cannot be read ({first_line(error)}); mend it.") from None
        if image.size != self.size:
            raise UserError(f"data: the image {self.name} has changed since the run began; start the run again.")
        return image


def inspect_image(name: str, path: Path | None, content: bytes = b"") -> Image:
    """What the header of an image says; its pixels are not decoded.

    Args:
        name: what messages call it.
        path: its file; None where its bytes are given.
        content: its bytes.

    Raises:
        Exception: of any kind: the file cannot be read, or is no image.
    """
    with _opened(path, content) as image:
        image.verify()
    # What has been verified cannot be read any more.
    with _opened(path, content) as image:
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        size = image.size[::-1] if turned else image.size
    return Image(name, size, path, content)


def _opened(path: Path | None, content: bytes) -> Any:
    from PIL import Image as Pillow

    return Pillow.open(io.BytesIO(content) if path is None else path)
