"""The STDiT family with frames cut over `context`: results equal those of one device, also for lengths that do not
divide, and the compiled program exchanges the bytes of theory and nothing else."""

import importlib
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.common.shapes import LatentShape
from opensora_jax.kernels.stdit import stdit_attention
from opensora_jax.models import stdit
from opensora_jax.nn.modulate import gated, modulated_mlp, table_rows
from opensora_jax.nn.params import Buffer, Network
from opensora_jax.parallel import pieces, shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.plan import hlo

FAMILIES = ("stdit", "stdit2", "stdit3")
BATCH, TEXT, WIDTH, DEPTH = 4, 8, 48, 2
SIZES = {"uneven": (5, 6, 6), "even": (8, 8, 8)}  # latent frames, height, width; 9 and 16 positions of a frame
MESHES = {ways: MeshConfig(data=1, fsdp=8 // ways, context=ways, rules="fsdp_context") for ways in (2, 4, 8)}
CASES = {2: ("uneven", "dots"), 4: ("even", "full"), 8: ("uneven", "switches")}  # context: size and remat
SCALARS = 64  # bytes: the loss


def layout_of(ways: int) -> shard.Layout:
    if ways == 1:
        return shard.layout(make_mesh(MeshConfig(data=1), jax.devices()[:1]), "dp")
    return shard.layout(make_mesh(MESHES[ways]), "fsdp_context")


class Subject:
    """A tiny network, its inputs and a loss that weighs every output differently."""

    def __init__(self, family: str, size: str, remat: str = "none"):
        module = importlib.import_module(f"opensora_jax.models.{family}")
        cfg = module.Config(
            hidden_size=WIDTH, depth=DEPTH, num_heads=4, caption_channels=32, model_max_length=TEXT, remat=remat,
            drop_path=0.2,
        )  # fmt: skip
        self.network = Network.of(lambda rngs: module.build(cfg, rngs=rngs))
        rng = np.random.default_rng(0)
        normal = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)
        self.params = jax.tree.map(lambda leaf: 0.06 * normal(leaf), self.network.abstract)
        shapes = module.inputs(cfg, LatentShape(BATCH, *SIZES[size], TEXT))
        self.inputs = {name: normal(leaf) for name, leaf in shapes.items()}
        self.inputs["text_mask"] = (np.arange(TEXT) < 3 + np.arange(BATCH)[:, None]).astype(np.int32)
        self.inputs["x_mask"] = np.arange(SIZES[size][0]) >= np.arange(BATCH)[:, None] % 2
        self.inputs |= {name: np.full(BATCH, 32, np.float32) for name in ("height", "width") if name in shapes}

    def forward(self, params, inputs):
        return self.network(params, **inputs, key=jax.random.key(1))

    def loss(self, params, inputs):
        out = self.forward(params, inputs)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * weights).sum() + jnp.square(out).mean()

    def compiled(self, layout, train=True):
        """The program and what to call it with."""
        with shard.use(layout):
            where = shard.shardings(self.network.abstract, self.network.axes, layout)
            given = jax.device_put(self.params, where), shard.place_batch(self.inputs, layout)
            run = jax.jit(self.forward)
            if train:
                run = jax.jit(jax.value_and_grad(self.loss), out_shardings=(layout.replicated(), where))
            return run.lower(*given).compile(), given


@cache
def alone(family, size):
    program, given = Subject(family, size).compiled(layout_of(1))
    return jax.device_get(program(*given))


@cache
def sharded(family, ways):
    return Subject(family, *CASES[ways]).compiled(layout_of(ways))


@pytest.mark.parametrize("ways", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_one_device(family, ways):
    program, given = sharded(family, ways)
    loss, grads = program(*given)
    expected_loss, expected = alone(family, CASES[ways][0])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)  # a sum of thousands of terms of either sign
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    wanted, found = jax.tree.leaves(expected), jax.tree.leaves(jax.device_get(grads))
    sizes = np.array([np.linalg.norm(a) for a in wanted])
    errors = np.array([np.linalg.norm(a - b) for a, b in zip(wanted, found, strict=True)])
    assert np.linalg.norm(errors) < 1e-5 * np.linalg.norm(sizes)
    far = [path for path, error, size in zip(paths, errors, sizes) if error > 1e-4 * size]
    assert not far
    assert [path for path, size in zip(paths, sizes) if not size] == ["['y_embedder']['null']"], "all else is trained"


def collectives(program, layout):
    return hlo.contents(hlo.parse(program.as_text()), layout.sizes).collectives


def moved(found, *kinds):
    return sum(c.moved for c in found if c.kind in kinds)


def switch_bytes(ways: int, size: str) -> float:
    """What a device sends to change a float32 stream between frames and positions."""
    frames, height, width = SIZES[size]
    samples = BATCH // MESHES[ways].fsdp
    return 4 * samples * frames * (height * width // 4) * WIDTH / ways * (ways - 1) / ways


def parameter_bytes(network, layout) -> dict[bool, float]:
    """Of the trained and fixed parameters, by: are they cut?"""
    found = {True: 0.0, False: 0.0}
    for leaf, axes, kind in zip(
        jax.tree.leaves(network.abstract),
        jax.tree.leaves(network.axes, is_leaf=lambda x: isinstance(x, tuple)),
        jax.tree.leaves(network.kinds),
    ):
        if kind is not Buffer:
            found[any(layout.sharding(axes, leaf.shape).spec)] += 4 * math.prod(leaf.shape)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_switches_cross_the_context_axis(family):
    layout, (program, _) = layout_of(4), sharded(family, 4)
    found = collectives(program, layout)
    over_context = [c for c in found if c.axes == ("context",) and c.bytes > SCALARS]
    assert {c.kind for c in over_context} == {"all-to-all"}
    assert sum(c.count for c in over_context) == 5 * DEPTH  # 2 forward, 1 recomputed, 2 backward
    assert moved(over_context, "all-to-all") == pytest.approx(5 * DEPTH * switch_bytes(4, "even"), rel=0.02)

    # All else is parameters: weights gathered (those of layers once more in backward) and gradients scattered.
    network = Subject(family, "even").network
    size = parameter_bytes(network, layout)
    stacked = sum(parameter_bytes(network.part(n), layout)[True] for n in network.abstract if n.endswith("blocks"))
    share = 7 / 8
    assert moved(found, "all-gather") == share * (size[True] + stacked)
    assert moved(found, "reduce-scatter") == share * size[True]
    assert moved(found, "all-reduce") <= 2 * share * (size[False] + SCALARS)  # biases, tables, norms
    gradients = moved(found, "reduce-scatter", "all-reduce")
    assert gradients <= 1.1 * share * (size[True] + size[False])
    assert moved(found, "collective-permute") == 0


def test_saved_switches_are_not_repeated():
    layout, (program, _) = layout_of(8), sharded("stdit", 8)
    switches = [c for c in collectives(program, layout) if c.kind == "all-to-all"]
    assert sum(c.count for c in switches) == 4 * DEPTH


class UlyssesBlock(stdit.Block):
    """Frames stay cut; temporal attention exchanges heads: q, k and v there, the output back."""

    def __call__(self, x, sequence, text, modulation, unmasked, frame_positions, keep):
        ways, heads = sequence.ways, self.attn_temp.heads
        x, frame_positions = sequence.join(x), pieces.join(frame_positions, ways, 1)[0]
        modulation, unmasked, keep = [modulation[0][: len(x)]], unmasked[: len(x)], keep[:, : len(x)]
        shift_msa, scale_msa, gate_msa, shift, scale, gate = table_rows(self.scale_shift_table[...], modulation[0])
        h = self.attn(x, mode="spatial", modulation=(shift_msa, scale_msa))
        x = x + gated(h, gate_msa, keep[0])
        first = jax.lax.axis_index("context") * x.shape[1]
        qkv = self.attn_temp.qkv(x + jax.lax.dynamic_slice_in_dim(frame_positions, first, x.shape[1]))
        qkv = qkv.reshape(*x.shape[:3], 3, heads, -1)
        qkv = jax.lax.all_to_all(qkv, "context", split_axis=4, concat_axis=1, tiled=True)
        h = stdit_attention(qkv.reshape(*qkv.shape[:3], -1), num_heads=heads // ways, mode="temporal")
        h = jax.lax.all_to_all(h, "context", split_axis=1, concat_axis=3, tiled=True)
        x = x + gated(self.attn_temp.proj(h), table_rows(self.scale_shift_table[...], unmasked)[2], keep[1])
        x = x + self.cross_attn(x.reshape(x.shape[0], -1, x.shape[-1]), **text).reshape(x.shape)
        return sequence.cut(modulated_mlp(x, self.mlp, shift, scale, gate, keep[2]))


def test_forward_switches_twice_and_moves_half_of_ulysses(monkeypatch):
    layout = layout_of(4)
    ours, given = Subject("stdit", "even").compiled(layout, train=False)
    monkeypatch.setattr(stdit, "Block", UlyssesBlock)
    theirs, _ = Subject("stdit", "even").compiled(layout, train=False)
    np.testing.assert_allclose(theirs(*given), ours(*given), rtol=0, atol=1e-5)  # the same network, another exchange
    switches, exchanges = ([c for c in collectives(p, layout) if c.axes == ("context",)] for p in (ours, theirs))
    assert {c.kind for c in switches + exchanges} == {"all-to-all"}
    assert sum(c.count for c in switches) == 2 * DEPTH
    assert moved(switches, "all-to-all") == pytest.approx(2 * DEPTH * switch_bytes(4, "even"), rel=0.02)
    assert moved(switches, "all-to-all") <= moved(exchanges, "all-to-all") / 2
