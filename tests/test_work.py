"""FLOPs of a trace: loops by their length, kernels by their grid, regions by their devices; plans of networks."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from opensora_jax import work
from opensora_jax.common.shapes import LatentShape
from opensora_jax.config import part
from opensora_jax.parallel import shard
from opensora_jax.parallel.mesh import MeshConfig, make_mesh

A = jax.ShapeDtypeStruct((8, 16), jnp.float32)
B = jax.ShapeDtypeStruct((16, 32), jnp.float32)


def flops(f, *shapes):
    return work.count(jax.make_jaxpr(f)(*shapes)).flops


def test_matmuls_and_their_gradients():
    assert flops(jnp.dot, A, B) == 2 * 8 * 16 * 32
    gradient = jax.grad(lambda a, b: jnp.sum(jnp.dot(a, b) ** 2), (0, 1))
    assert flops(gradient, A, B) == 3 * 2 * 8 * 16 * 32


def test_convolutions():
    image, kernel = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32"), jax.ShapeDtypeStruct((3, 3, 3, 5), "float32")
    run = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert flops(run, image, kernel) == 2 * 8 * 8 * 5 * 3 * 3 * 3


def test_loops_and_remat_count_what_runs():
    layers = jax.ShapeDtypeStruct((7, 16, 16), jnp.float32)
    body = lambda x, w: (jnp.tanh(x @ w), None)
    once = 2 * 8 * 16 * 16
    run = lambda x, w: jax.lax.scan(body, x, w)[0]
    assert flops(run, A, layers) == 7 * once
    kept = jax.checkpoint(body, policy=jax.checkpoint_policies.nothing_saveable)
    again = lambda x, w: jax.lax.scan(kept, x, w)[0].sum()
    assert flops(jax.grad(again, (0, 1)), A, layers) == 4 * 7 * once
    assert flops(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), A, layers_of(layers)) == once


def layers_of(stacked):
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)


def test_kernels_count_their_grid():
    def kernel(x_ref, y_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], y_ref[...])

    def run(x, y):
        block = pl.BlockSpec((8, 16), lambda i: (i, 0))
        whole = pl.BlockSpec((16, 32), lambda i: (0, 0))
        out = jax.ShapeDtypeStruct((64, 32), jnp.float32)
        return pl.pallas_call(
            kernel, grid=(8,), in_specs=[block, whole], out_specs=pl.BlockSpec((8, 32), lambda i: (i, 0)),
            out_shape=out, name="tiles",
        )(x, y)  # fmt: skip

    found = work.count(jax.make_jaxpr(run)(jax.ShapeDtypeStruct((64, 16), "float32"), B))
    assert found.flops == 2 * 64 * 16 * 32
    assert [(k.name, k.calls, k.flops) for k in found.kernels] == [("tiles", 1, found.flops)]
    assert found.kernels[0].bytes == 4 * (64 * 16 + 16 * 32 + 64 * 32)


def test_regions_count_every_device():
    mesh = Mesh(jax.devices()[:8], ("data",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops(inside, A, B) == 2 * 8 * 16 * 32
    whole = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    assert flops(whole, A, B) == 8 * 2 * 8 * 16 * 32  # everyone does all of it


SPACE, FRAMES, TEXT = 1024, 16, 120  # patches of a frame of 512 x 512
FORMULAS = {  # of width, depth and tokens, by hand: without embedders, modulation and the last layer
    "stdit": (lambda c, n: 28 * (36 * c**2 * n + 4 * c**2 * TEXT + 4 * n * c * (SPACE + FRAMES + TEXT)), 1152),
    "stdit3": (lambda c, n: 28 * (56 * c**2 * n + 8 * c**2 * TEXT + 4 * n * c * (SPACE + FRAMES + 2 * TEXT)), 1152),
    "dit": (lambda c, n: 28 * (24 * c**2 * n + 4 * n * n * c), 1152),
    "mmdit": (lambda c, n: 57 * (24 * c**2 * (n + TEXT) + 4 * (n + TEXT) ** 2 * c), 3072),
}


@pytest.mark.parametrize("family", FORMULAS)
def test_forward_passes_of_whole_networks(family):
    """Counted under a mesh, which must not matter."""
    formula, width = FORMULAS[family]
    with shard.use(shard.layout(make_mesh(MeshConfig(data=2, context=4)), "fsdp_context")):
        counted = work.forward_flops(part("models", {"family": family}, "test"), LatentShape(1, FRAMES, 64, 64, TEXT))
    assert counted == pytest.approx(formula(width, FRAMES * SPACE), rel=0.01)
