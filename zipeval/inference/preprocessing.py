"""Chat messages as the processor takes them: pictures decoded, and what a model does not take refused."""

from __future__ import annotations

from typing import Any

from zipeval import media, models
from zipeval.config.schema import ModelConfig
from zipeval.errors import MediaError, UsageError

Part = dict[str, Any]


class MediaDecoder:
    """Decodes the images and videos of chat messages for one model.

    Args:
        config: of the model.
        image_mean: of the processor, one number from 0 to 1 for each channel.
    """

    def __init__(self, config: ModelConfig, image_mean: list[float]):
        self.config = config
        self.family = models.family(config)
        # Padding has the mean colour, which the processor's normalisation makes 0.
        self.background = tuple(int(mean * 255) for mean in image_mean)
        self.decoders = {
            "text": self._check_text,
            "image": self._decode_image,
            "video": self._decode_video,
        }

    def decode_messages(self, messages: list[dict]) -> list[dict]:
        """Return the messages with images and frames in place of what a task names.

        Raises:
            MediaError: if one cannot be decoded.
            UsageError: for media that the model does not take.
        """
        decoded = []
        for message in messages:
            parts = [self._decode_part(part) for part in message["content"]]
            decoded.append({**message, "content": parts})
        return decoded

    def _decode_part(self, part: Part) -> Part:
        kind = part["type"]
        if kind not in ("text", *self.family.media):
            takes = ", ".join(self.family.media)
            raise UsageError(
                f"model={self.config.name}: it takes text and {takes}, a task gave it {kind}."
            )
        return self.decoders[kind](part)

    def _check_text(self, part: Part) -> Part:
        for kind in self.family.media:
            # The processor would put a picture's placeholders there, of which there is none.
            if f"<{kind}>" in part["text"]:
                raise MediaError(
                    f"its text holds <{kind}>, which the processor takes for one"
                )
        return part

    def _decode_image(self, part: Part) -> Part:
        image = media.rgb(part["url"], self.config.image_aspect, self.background)
        return {**part, "url": image}

    def _decode_video(self, part: Part) -> Part:
        # A part of a video has times, or a dict in place of its path.
        has_times = part.get("start_time") or part.get("end_time")
        if has_times or isinstance(part["url"], dict):
            raise UsageError(
                f"model={self.config.name}: it takes whole videos, a task gave it a part of one."
            )
        return {**part, "url": media.frames(part["url"], self.family.frames)}
