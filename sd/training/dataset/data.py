"""The interface of a data set that can be trained on. C channels, H, W pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sd.files.hashes import tensor_hash


class PictureData:
    """Captioned pictures. A subclass has `captions`, `picture`, `fingerprint` and a length; the rest has defaults.

    captions: those of each picture; one is drawn at each use. variants: number of crops and mirror images of each picture.
    masked: whether `mask` is used. names: of the pictures, for messages. entries: the sources of pictures from files.
    """

    captions: Sequence[Sequence[str]]
    variants: int = 1
    masked: bool = False
    entries: Sequence = ()

    def __len__(self) -> int:
        return len(self.captions)

    def picture(self, i: int, variant: int = 0) -> Tensor:
        """[C, H, W] in [-1, 1]."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of pictures and captions, by which a resumed run recognises its data."""
        raise NotImplementedError

    def mask(self, i: int, variant: int = 0) -> Tensor:
        """[1, H, W] in [0, 1]: the weight of each pixel's loss."""
        return torch.ones(1, *self.picture(i, variant).shape[1:])

    def made_of(self, i: int, variant: int = 0) -> dict[str, object]:
        """Everything that `picture` and `mask` depend on, as the key of a cache; "picture" is a hash."""
        return {"picture": tensor_hash({"picture": self.picture(i, variant)})[:32]}

    @cached_property
    def names(self) -> list[str]:
        return [e.name for e in self.entries] or [f"picture {i}" for i in range(len(self))]

    @cached_property
    def uses(self) -> Sequence[int]:
        """The indices that make up an epoch; a picture may occur several times."""
        return range(len(self))

    @cached_property
    def bucket_of(self) -> Sequence[int]:
        """The bucket of each picture; only pictures of one bucket share a batch."""
        return [0] * len(self)

    @cached_property
    def options(self) -> Sequence[Mapping[str, object]]:
        """The caption options of each picture's source, where they differ from the config's."""
        return [{}] * len(self)

    @cached_property
    def regular(self) -> Sequence[bool]:
        """Whether each picture is for regularisation (prior preservation)."""
        return [False] * len(self)

    @cached_property
    def any_regular(self) -> bool:
        return any(self.regular)

    @cached_property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(width, height) of each picture."""
        return [(w, h) for _, h, w in (self.picture(i).shape for i in range(len(self)))]


class GivenData(PictureData):
    """A user's data set: an object with `captions`, `picture(i)`, `fingerprint()`, a length, and possibly more of the above."""

    OPTIONAL = ("variants", "masked", "names", "entries", "mask", "made_of", "uses", "bucket_of", "options", "regular", "sizes")

    def __init__(self, given):
        self.given, self.captions = given, given.captions
        for name in self.OPTIONAL:
            if hasattr(given, name):
                setattr(self, name, getattr(given, name))

    def __len__(self) -> int:
        return len(self.given)

    def picture(self, i: int, variant: int = 0) -> Tensor:
        return self.given.picture(i, variant) if variant else self.given.picture(i)

    def fingerprint(self) -> str:
        return self.given.fingerprint()


def as_picture_data(given) -> PictureData:
    return given if isinstance(given, PictureData) else GivenData(given)
