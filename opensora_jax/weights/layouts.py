"""Another publisher's layout of a network: how diffusers' tensors make those of the reference, and exactly back.

    joins("blocks.{n}.attn.qkv", *(f"transformer_blocks.{{n}}.attn1.to_{part}" for part in "qkv"))

A weight table that reads such a layout has `layout(shapes, config) -> list[Join]`. What no join takes up keeps its name,
so that the table of rules can say what does not fit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from opensora_jax.common.errors import UserError
from opensora_jax.weights.engine import MappingError, Shape, named, pattern

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Merge:
    """Several arrays → one, and back into pieces of as many rows as they had."""

    name: str
    forward: Callable[[Arrays], np.ndarray]
    back: Callable[[np.ndarray, list[int]], Arrays]
    shape: Callable[[list[Shape]], Shape]


def _stacked(shapes: list[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _rows(array: np.ndarray, rows: list[int]) -> Arrays:
    return np.split(array, np.cumsum(rows)[:-1])


def _swapped(arrays: Arrays) -> np.ndarray:
    return np.concatenate(np.split(arrays[0], 2)[::-1])


def _one(arrays: Arrays) -> np.ndarray:
    if not all(np.array_equal(arrays[0], other) for other in arrays[1:]):
        raise ValueError("should be the same tensor, but differ")
    return arrays[0]


ROWS = Merge("rows", np.concatenate, _rows, _stacked)  # one below the other
SWAPPED = Merge("swapped", _swapped, lambda a, rows: [_swapped([a])], _stacked)  # halves in the other order
COPIES = Merge("copies", _one, lambda a, rows: [a] * len(rows), lambda shapes: shapes[0])  # one tensor, written often
POINTWISE = Merge(  # linear layers as one 1 x 1 convolution
    "pointwise",
    lambda arrays: np.concatenate(arrays)[:, :, None, None],
    lambda a, rows: _rows(a[:, :, 0, 0], rows),
    lambda shapes: (*_stacked(shapes), 1, 1),
)
MERGES = {merge.name: merge for merge in (ROWS, SWAPPED, COPIES, POINTWISE)}


@dataclass(frozen=True)
class Join:
    """One tensor of the reference; its sources in order. With COPIES, a placeholder that the target lacks stands for
    all the numbers that there are."""

    target: str
    sources: tuple[str, ...]
    merge: Merge = ROWS

    def names(self, name: str) -> tuple[str, list[str]] | None:
        """For a tensor that is the first source: the target's name, and the names of all sources."""
        match = pattern(self.sources[0]).fullmatch(name)
        if match is None:
            return None
        return named(self.target, match.groupdict()), [named(s, match.groupdict()) for s in self.sources]


def joins(target: str, *sources: str, merge: Merge = ROWS) -> list[Join]:
    """A linear layer: weight and bias."""
    return [Join(f"{target}.{kind}", tuple(f"{s}.{kind}" for s in sources), merge) for kind in ("weight", "bias")]


@dataclass
class Recipe:
    """What one joined tensor is made of."""

    merge: Merge
    sources: list[str] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)

    def plain(self) -> dict:
        return {"merge": self.merge.name, "sources": self.sources, "shapes": self.shapes}

    @classmethod
    def of(cls, plain: Mapping) -> "Recipe":
        return cls(MERGES[plain["merge"]], plain["sources"], [tuple(shape) for shape in plain["shapes"]])


@dataclass(frozen=True)
class Joined:
    """A checkpoint as if it had the reference's names."""

    found: Mapping[str, Shape]
    recipes: dict[str, Recipe]

    @property
    def shapes(self) -> dict[str, Shape]:
        for name, recipe in self.recipes.items():
            if () in recipe.shapes:
                raise MappingError(f"{recipe.sources[recipe.shapes.index(())]}: a single number, not a part of {name}")
        joined = {name: recipe.merge.shape(recipe.shapes) for name, recipe in self.recipes.items()}
        used = {source for recipe in self.recipes.values() for source in recipe.sources}
        return joined | {name: tuple(shape) for name, shape in self.found.items() if name not in used}

    def origin(self, name: str) -> str:
        """The (first) tensor that it comes from."""
        return self.recipes[name].sources[0] if name in self.recipes else name

    def read(self, read: Callable[[str], np.ndarray], name: str) -> np.ndarray:
        recipe = self.recipes.get(name)
        if recipe is None:
            return read(name)
        try:
            return recipe.merge.forward([np.asarray(read(source)) for source in recipe.sources])
        except ValueError as error:
            raise MappingError(f"{', '.join(recipe.sources[:2])}, ...: {error}") from None


def of(table, shapes: Mapping[str, Shape], config: dict) -> list[Join]:
    """Those of a family's weight table, if it knows another layout."""
    return table.layout(shapes, config) if hasattr(table, "layout") else []


def joined(found: Mapping[str, Shape], table: list[Join]) -> Joined:
    recipes: dict[str, Recipe] = {}
    for name in found:
        for join in table:
            target, sources = join.names(name) or (None, [])
            if target is None or not all(source in found for source in sources):
                continue
            if join.merge is not COPIES or target not in recipes:
                recipes[target] = Recipe(join.merge)
            recipes[target].sources += sources
            recipes[target].shapes += [tuple(found[source]) for source in sources]
    return Joined(found, recipes)


def separated(
    arrays: Iterable[tuple[str, np.ndarray]], recipes: Mapping[str, Recipe]
) -> Iterator[tuple[str, np.ndarray]]:
    """The way back: tensors of the reference in the layout that they came from."""
    for name, array in arrays:
        if name not in recipes:
            yield name, array
            continue
        recipe = recipes[name]
        yield from zip(recipe.sources, recipe.merge.back(array, [shape[0] for shape in recipe.shapes]), strict=True)


# ---- names that diffusers' BasicTransformerBlock, PatchEmbed and timesteps share --------------------------------------

BLOCK = "transformer_blocks.{n}."


def transformer_block() -> list[Join]:
    """Self-attention, MLP and patches of a transformer in the DiT line."""
    return [
        *joins("x_embedder.proj", "pos_embed.proj"),
        *joins("blocks.{n}.attn.qkv", *(f"{BLOCK}attn1.to_{part}" for part in "qkv")),
        *joins("blocks.{n}.attn.proj", BLOCK + "attn1.to_out.0"),
        *joins("blocks.{n}.mlp.fc1", BLOCK + "ff.net.0.proj"),
        *joins("blocks.{n}.mlp.fc2", BLOCK + "ff.net.2"),
    ]


def two_layers(
    target: str, source: str, first: str = "mlp.0", second: str = "mlp.2", merge: Merge = ROWS
) -> list[Join]:
    """diffusers' linear_1 and linear_2."""
    return joins(f"{target}.{first}", f"{source}.linear_1", merge=merge) + joins(
        f"{target}.{second}", f"{source}.linear_2", merge=merge
    )


def check_diffusers(config: dict, norm_type: str, **only) -> None:
    """The config.json is there, and has none of the options that no released DiT or PixArt uses."""
    if "sample_size" not in config:
        raise UserError(
            "diffusers' layout needs the config.json beside the weights: its sample_size says the positions"
        )
    only |= {
        "norm_type": norm_type, "attention_bias": True, "activation_fn": "gelu-approximate",
        "norm_elementwise_affine": False, "attention_type": "default",
    }  # fmt: skip
    for key, plain in only.items():
        if config.get(key, plain) != plain:
            raise UserError(f"{key}={config[key]!r} is not served; diffusers' folders are read with {plain!r} only")
