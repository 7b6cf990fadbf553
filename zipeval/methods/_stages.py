"""Where a method acts: before the decoder, inside it, or both."""

from __future__ import annotations

from zipeval.engine.decoder import DecoderMethod
from zipeval.engine.vision import Everything, VisionMethod
from zipeval.methods.chain import Chain
from zipeval.methods.vanilla import Vanilla


def stages(method) -> tuple[VisionMethod, DecoderMethod | None] | None:
    """Return what acts before the decoder, and what acts inside it or None; None for a method of another kind.

    The encoder's output, which the first is a function of, can then be shared.
    """
    if isinstance(method, Chain):
        return method.first, method.second
    if isinstance(method, VisionMethod):
        return method, None
    if isinstance(method, DecoderMethod):
        return Everything(), method
    return (Everything(), None) if isinstance(method, Vanilla) else None
