"""Our Hopper kernels: each pass in Pallas' Mosaic GPU interpreter against float64, and all of them lowered.

The interpreter runs every warpgroup on a thread of its own, with TMA copies and barriers. It does not know wgmma with an
operand in registers; those products are plain jax there (`mosaic_gpu.Ops`).
"""

import functools
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from opensora_jax.kernels import mosaic_gpu, spec
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.spec import Unsupported
from tests.kernels.cases import BY_NAME
from tests.kernels.compare import FORWARD, GRADIENT, relative
from tests.kernels.reference import attention64

BLOCKS = tuple((stage, mosaic_gpu.Blocks(64, 2)) for stage in ("forward", "dq", "dkv"))
# Beyond an array TMA brings zeros; the tail of the streamed tiles relies on it.
INTERPRETER = InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")


@pytest.fixture
def interpreter(monkeypatch):
    """jax compiles an interpreted kernel anew for each thread of each block; once is enough."""
    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *arguments):
        with lock:
            if id(jaxpr) not in compiled:
                closed = ClosedJaxpr(jaxpr, consts)
                program = jax.jit(lambda *arguments: jaxpr_as_fun(closed)(*arguments) and None)
                compiled[id(jaxpr)] = jaxpr, program.lower(*arguments).compile()
        compiled[id(jaxpr)][1](*arguments)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)


class Problem:
    """Operands in bfloat16 and, in float64, everything that a pass is given or gives."""

    def __init__(self, head_dim, heads, queries, keys, lengths):
        rng = np.random.default_rng(0)
        draw = lambda length: jnp.asarray(rng.normal(size=(len(lengths), length, heads * head_dim)), jnp.bfloat16)
        self.q, self.k, self.v, self.d_out = draw(queries), draw(keys), draw(keys), draw(queries)
        self.lengths = jnp.asarray(lengths, jnp.int32)
        self.options = mosaic_gpu.Options(heads, head_dim, head_dim**-0.5, keys, True, BLOCKS, INTERPRETER)
        split = lambda x: np.asarray(x, np.float64).reshape(*x.shape[:2], heads, head_dim).swapaxes(1, 2)
        join = lambda x: x.swapaxes(1, 2).reshape(len(lengths), -1, heads * head_dim)
        q, k, v, d_out = (split(x) for x in (self.q, self.k, self.v, self.d_out))
        seen = np.arange(keys) < np.asarray(lengths)[:, None, None, None]
        weights = np.where(seen, np.exp(q @ k.swapaxes(2, 3) * head_dim**-0.5), 0)
        total = weights.sum(-1, keepdims=True)
        weights = weights / np.maximum(total, 1e-300)
        out = weights @ v
        delta = (out * d_out).sum(-1)
        slope = weights * (d_out @ v.swapaxes(2, 3) - delta[..., None]) * head_dim**-0.5
        self.out, self.d_q = join(out), join(slope @ k)
        self.d_k, self.d_v = join(slope.swapaxes(2, 3) @ q), join(weights.swapaxes(2, 3) @ d_out)
        self.lse = np.where(total > 0, np.log2(np.maximum(total, 1e-300)), 1e30)[..., 0]
        pad = lambda x, value: jnp.asarray(np.pad(x, ((0, 0), (0, 0), (0, -queries % 128)), constant_values=value))
        self.kept = pad(self.lse, 1e30).astype(jnp.float32), pad(delta, 0).astype(jnp.float32)


# A tile that overlaps its neighbour, no visible key and all of them; two heads side by side, keys hidden within a tile.
PROBLEMS = {"128": (128, 1, 136, 152, [0, 152]), "64": (64, 2, 128, 152, [85])}


@pytest.mark.parametrize("size", PROBLEMS)
def test_forward_matches_float64(size, interpreter):
    problem = Problem(*PROBLEMS[size])
    out, lse = mosaic_gpu.forward(problem.q, problem.k, problem.v, problem.lengths, problem.options)
    assert relative(out, problem.out) < FORWARD["bfloat16"]
    np.testing.assert_allclose(lse[..., : problem.lse.shape[-1]], problem.lse, rtol=1e-5, atol=1e-5)


def test_lengths_that_fill_no_tile_match_float64(interpreter):
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 1, 64)), jnp.bfloat16) for length in (130, 150, 150))
    out = mosaic_gpu.attention(q, k, v, scale=0.2, blocks=BLOCKS, interpret=INTERPRETER)
    exact = attention64(*(np.asarray(x, np.float32) for x in (q, k, v)), scale=0.2)
    assert out.shape == q.shape and relative(out, exact) < FORWARD["bfloat16"]


@pytest.mark.parametrize("size", PROBLEMS)
def test_gradient_of_queries_matches_float64(size, interpreter):
    problem = Problem(*PROBLEMS[size])
    operands = (problem.q, problem.k, problem.v, problem.d_out, *problem.kept, problem.lengths)
    (d_q,) = mosaic_gpu.backward_queries(*operands, problem.options)
    assert relative(d_q, problem.d_q) < GRADIENT["bfloat16"]


@pytest.mark.parametrize("size", PROBLEMS)
def test_gradients_of_keys_and_values_match_float64(size, interpreter):
    problem = Problem(*PROBLEMS[size])
    operands = (problem.q, problem.k, problem.v, problem.d_out, *problem.kept, problem.lengths)
    d_k, d_v = mosaic_gpu.backward_keys(*operands, problem.options)
    assert relative(d_k, problem.d_k) < GRADIENT["bfloat16"]
    assert relative(d_v, problem.d_v) < GRADIENT["bfloat16"]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lowers_without_a_gpu(head_dim):
    """Forward and backward at full size: layouts, swizzles and the size of fast memory are checked on the way."""
    case = replace(BY_NAME["v2.0 joint 256px"], head_dim=head_dim)
    shapes = jax.eval_shape(lambda: case.inputs()[0])

    def both(*arrays):
        out, pull = jax.vjp(functools.partial(attention, implementation="mosaic_gpu"), *arrays)
        return out, pull(out)

    with spec.target("hopper"):
        text = jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3


def test_what_does_not_fit_is_refused_with_the_reason():
    call = functools.partial(spec.Call, "attention", 2, 256, 256, 4, 128)
    with spec.target("hopper"):
        mosaic_gpu.supports(call("bfloat16", frozenset({"kv_lengths"})))
        for refused, reason in {
            call("float32"): "not float32",
            call("bfloat16", frozenset({"bias"})): "bias not served",
            spec.Call("attention", 2, 64, 256, 4, 128, "bfloat16"): "fewer than 128",
            spec.Call("attention", 2, 256, 256, 4, 72, "bfloat16"): "not whole tiles",
        }.items():
            with pytest.raises(Unsupported, match=reason):
                mosaic_gpu.supports(refused)
        with pytest.raises(Unsupported, match="negative scale"):
            jax.eval_shape(
                lambda x: attention(x, x, x, scale=-1.0, implementation="mosaic_gpu"),
                jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16),
            )
    with spec.target("cuda"), pytest.raises(Unsupported, match="needs a Hopper GPU"):
        mosaic_gpu.supports(call("bfloat16"))
