"""The size of a batch of video, as networks see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentShape:
    """Latent frames, height and width, and how many text tokens come along."""

    batch: int
    frames: int
    height: int
    width: int
    text_tokens: int = 300
