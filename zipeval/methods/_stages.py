"""Split a method by where it acts: before the decoder, inside it, or both."""

from __future__ import annotations

from zipeval.engine.decoder import DecoderMethod
from zipeval.engine.method import Method
from zipeval.engine.vision import KeepAll, VisionMethod


def stages(method) -> tuple[VisionMethod, DecoderMethod | None] | None:
    """Return what acts before the decoder, and what acts inside it or None.

    The encoder's output, which the first is a function of, can then be shared. A method
    that declares no stages gives None: nobody knows what it is a function of.
    """
    if not isinstance(method, Method):
        return None
    declared = method.reduction_stages
    return declared.vision or KeepAll(), declared.decoder
