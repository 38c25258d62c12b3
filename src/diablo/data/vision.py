"""Images through a model's processor: the tokens that stand for them, and what the model is given of their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from diablo.data.images import Image
from diablo.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

_PROBE = (64, 64)
_OF_TEXT = ("input_ids", "attention_mask")
_REPLACED = "text_replacement_offsets"
# Older versions read it only among what is for the text.
_SAY_WHAT_STANDS_THERE = {"text_kwargs": {f"return_{_REPLACED}": True}}
_TESTED_TRANSFORMERS = "5.23"
"""With this version the processors that docs/recipes.md names say which tokens stand for an image."""
_TYPES = "token_type_ids"
"""How the names end of what tells a model which tokens stand for images."""


class ImageProcessor:
    """A model's processor, which makes tokens and tensors of images.

    The tokens of an image are told by its size alone, so that they are counted before any pixels are read.

    Args:
        processor: a transformers processor with an image processor and a tokenizer.

    Attributes:
        token: the special token that a chat template writes for an image.
        repeated: the token that stands for a part of an image, and is there several times.

    Raises:
        UserError: the processor has no token for images, or does not say what it puts in its place.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str):
            raise _silent(processor)
        self.token = token
        self._replacements: dict[tuple[tuple[int, int], ...], list[str]] = {}
        # Processors of older versions leave out what they do not know, or do not find the token that they name.
        try:
            probe = self._process([[_blank(_PROBE)]], **_SAY_WHAT_STANDS_THERE)
        except ValueError:
            raise _silent(processor) from None
        if _REPLACED not in probe:
            raise _silent(processor)
        ids = [int(token) for token in probe["input_ids"][0]]
        self.repeated = max(set(ids), key=ids.count)
        # By id, since a row has other texts around its images than the probe.
        self._types = {
            name: {token: int(kind) for token, kind in zip(ids, kinds[0], strict=True) if kind}
            for name, kinds in probe.items()
            if name.endswith(_TYPES) and any(kinds[0])
        }

    def replacements(self, images: Sequence[Image]) -> list[str]:
        """The text of special tokens that takes the place of each image of a row.

        Raises:
            UserError: the processor refuses images of these sizes.
        """
        sizes = tuple(image.size for image in images)
        if sizes not in self._replacements:
            try:
                made = self._process([[_blank(size) for size in sizes]], **_SAY_WHAT_STANDS_THERE)
            except ValueError as error:
                raise UserError(
                    f"data: the model's processor refuses the image {images[0].name} ({first_line(error)})."
                ) from None
            self._replacements[sizes] = [each["replacement"] for each in made[_REPLACED][0]]
        return self._replacements[sizes]

    def tensors(self, rows: Sequence[Sequence[Image]], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a model is given of a batch beside its tokens. The pixels are read here.

        Args:
            rows: the images of each row.
            input_ids: the tokens, ``(rows, tokens)``.

        Returns:
            The tensors that the processor makes of the pixels, nothing where no row has images; and, of the shape and
            dtype of ``input_ids``, what tells which tokens stand for images, where the model is told.

        Raises:
            UserError: an image can no longer be read.
        """
        given = {}
        for name, types in self._types.items():
            kinds = input_ids.new_zeros(input_ids.shape)
            for token, kind in types.items():
                kinds[input_ids == token] = kind
            given[name] = kinds
        seen = [[image.pixels() for image in images] for images in rows if images]
        if seen:
            made = self._process(seen, return_tensors="pt", padding=True)
            given |= {name: values for name, values in made.items() if not (name in _OF_TEXT or name.endswith(_TYPES))}
        return given

    def _process(self, images: Sequence[Sequence[Any]], **options: Any) -> Mapping[str, Any]:
        """What the processor makes of rows of nothing but images."""
        texts = [self.token * len(row) for row in images]
        return self.processor(images=list(images), text=texts, add_special_tokens=False, **options)


def _silent(processor: Any) -> UserError:
    import transformers

    known = Version(transformers.__version__) >= Version(_TESTED_TRANSFORMERS)
    upgrade = "" if known else f"upgrade to transformers {_TESTED_TRANSFORMERS}, or "
    return UserError(
        f"model: with transformers {transformers.__version__} its processor, {type(processor).__name__}, does not say "
        f"which tokens stand for an image; {upgrade}take a model whose processor does."
    )


def _blank(size: tuple[int, int]) -> Any:
    from PIL import Image as Pillow

    return Pillow.new("RGB", size)
