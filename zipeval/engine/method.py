"""Declare what every method is: an object to apply to a model, which says where it acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zipeval.engine.budget import VisualInput

# Both import this module: the names are for annotations alone.
if TYPE_CHECKING:
    from zipeval.engine.decoder import DecoderMethod
    from zipeval.engine.vision import VisionMethod


@dataclass(frozen=True)
class Stages:
    """Declare the parts of a method by the place where they act.

    Attributes:
        vision: the part between encoder and projector; None where nothing leaves there.
        decoder: the part between decoder layers; None where nothing leaves there.
    """

    vision: VisionMethod | None = None
    decoder: DecoderMethod | None = None


class Method(ABC):
    """Reduce the visual tokens of a model, or none of them."""

    @property
    @abstractmethod
    def reduction_stages(self) -> Stages:
        """Return the parts of the method."""

    @abstractmethod
    def applied(self, model) -> AbstractContextManager:
        """Return a context manager in which the model reduces."""

    @abstractmethod
    def tokens_per_layer(self, images: list[VisualInput], depth: int) -> list[int]:
        """Return the visual tokens that enter each of `depth` decoder layers.

        Args:
            images: the images or videos of one prompt.
            depth: number of decoder layers.
        """


def stages_of(method) -> Stages:
    """Return the parts that a method declares; none for one that is no `Method`.

    Such a method, which only has `applied` and `tokens_per_layer`, runs all the same, but what
    the engine knows of stages is not used for it.
    """
    return method.reduction_stages if isinstance(method, Method) else Stages()
