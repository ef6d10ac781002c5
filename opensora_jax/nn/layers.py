"""A list of unlike layers (stages of an autoencoder); alike layers are stacked, see nn/stack.py."""

from collections.abc import Iterable, Iterator
from typing import Any

from flax import nnx


class Layers(nnx.Module):
    """Children called "0", "1", ... so that parameter trees have the same string keys in memory and on disk.

    None stands for an absent layer and keeps the numbering of the others."""

    def __init__(self, layers: Iterable[nnx.Module | None]):
        layers = list(layers)
        self.length = len(layers)
        for i, layer in enumerate(layers):
            setattr(self, str(i), layer)

    def __getitem__(self, index: int) -> Any:
        return getattr(self, str(range(self.length)[index]))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.length))

    def __len__(self) -> int:
        return self.length
