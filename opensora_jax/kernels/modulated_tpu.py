"""Products with the modulated norm before them or the gate behind them on TPUs (Pallas, Mosaic); forward only,
modulated.py says why.

One program takes some frames x some positions, about 256 rows, and holds all weights in fast memory, where they stay for
the whole grid. The products run in slices of columns, so that the vector unit's work on one slice (GELU, gate) can run
beside the matrix unit's on the next.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import spec
from opensora_jax.kernels.spec import Unsupported
from opensora_jax.kernels.tpu_lanes import LANES, OLDER, dot, hold, unknown_zero, values_of

ROWS = 256
COLUMNS = 512  # of one slice: whole tiles of the matrix unit, and results that nearly fit the registers
VMEM_LIMIT = 100 << 20


class Block(NamedTuple):
    frames: int
    positions: int

    @classmethod
    def of(cls, frames: int, positions: int) -> "Block":
        """About ROWS rows: neighbouring positions of one frame, or several frames of few positions."""
        parts = -(-positions // ROWS)
        per_frame = -(-positions // (16 * parts)) * 16
        return cls(max(1, min(frames, ROWS // per_frame)), per_frame)

    @property
    def rows(self) -> int:
        return self.frames * self.positions


def supports(x, *kernels) -> None:
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"dtype {x.dtype}")
    for width in {size for kernel in kernels for size in kernel.shape}:
        if width % LANES:
            raise Unsupported(f"{width} channels are no whole tiles of {LANES} lanes")
    needed = 2 * sum(kernel.size for kernel in kernels) + ROWS * 4 * sum(kernel.shape[1] for kernel in kernels)
    if needed > VMEM_LIMIT // 2:
        raise Unsupported(f"{needed >> 20} MiB of weights and activations in VMEM")


def linear(x, shift, scale, kernel, bias, *, eps, interpret=None):
    run = functools.partial(_linear_kernel, eps=eps)
    return _call("linear", run, (x,), (shift, scale), [(kernel, bias)], kernel.shape[1], (x.shape[-1],), interpret)


def project(x, a, gate, kernel, bias, *, interpret=None):
    return _call("project", _project_kernel, (x, a), (gate,), [(kernel, bias)], x.shape[-1], (), interpret)


def mlp(x, shift, scale, gate, first, second, *, eps, interpret=None):
    run, width, hidden = functools.partial(_mlp_kernel, eps=eps), x.shape[-1], first[0].shape[1]
    return _call("mlp", run, (x,), (shift, scale, gate), [first, second], width, (width, hidden), interpret)


def _call(name, kernel, streams, vectors, layers, outputs, scratch, interpret):
    """scratch: widths of what is kept of a block in fast memory."""
    x = streams[0]
    batch, frames, positions, channels = x.shape
    block = Block.of(frames, positions)
    vectors = [v.astype(jnp.float32) for v in vectors if v is not None]
    weights = [a for w, b in layers for a in (w.astype(x.dtype), b.astype(jnp.float32)[None])]
    rows = lambda width: pl.BlockSpec((1, block.frames, block.positions, width), lambda b, i, j: (b, i, j, 0))

    whole = lambda a: pl.BlockSpec(a.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1))
    lines, dtype = (block.rows, x.dtype) if spec.chip() in OLDER else (block.rows // 2, jnp.int32)
    return pl.pallas_call(
        kernel,
        grid=(batch, -(-frames // block.frames), -(-positions // block.positions)),
        in_specs=[
            [rows(a.shape[-1]) for a in streams],
            [vector_spec(v, block) for v in vectors],
            [whole(a) for a in weights],
        ],
        out_specs=rows(outputs),
        out_shape=jax.ShapeDtypeStruct((*x.shape[:3], outputs), x.dtype),
        scratch_shapes=[pltpu.VMEM((lines, width), dtype) for width in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM_LIMIT),
        interpret=spec.platform() != "tpu" if interpret is None else interpret,
        name=f"modulated_{name}",
    )(list(streams), vectors, weights)


def vector_spec(v, block: Block) -> pl.BlockSpec:
    """Of a vector [B or 1, T or 1, 1, C]."""
    shared, frames = v.shape[0] == 1, 1 if v.shape[1] == 1 else block.frames
    return pl.BlockSpec(
        (1, frames, 1, v.shape[-1]), lambda b, i, j: (0 if shared else b, 0 if v.shape[1] == 1 else i, 0, 0)
    )


def _linear_kernel(streams, vectors, weights, o_ref, h_ref, *, eps):
    (x_ref,), (kernel, bias) = streams, weights
    _keep(h_ref, slice(None), _modulated(x_ref, *vectors, eps=eps))

    def columns(at):
        y = dot(_kept(h_ref), kernel[:, at]) + bias[:, at]
        o_ref[0, :, :, at] = y.astype(o_ref.dtype).reshape(*o_ref.shape[1:3], -1)

    each_slice(kernel.shape[1], columns)


def _project_kernel(streams, vectors, weights, o_ref):
    (x_ref, a_ref), (kernel, bias) = streams, weights

    def columns(at):
        a = a_ref[...].reshape(-1, a_ref.shape[-1])
        _add_gated(x_ref, vectors, dot(a, kernel[:, at]) + bias[:, at], o_ref, at)

    each_slice(kernel.shape[1], columns)


def _mlp_kernel(streams, vectors, weights, o_ref, h_ref, hidden_ref, *, eps):
    (x_ref,), (shift, scale, *gate) = streams, vectors
    kernel1, bias1, kernel2, bias2 = weights
    _keep(h_ref, slice(None), _modulated(x_ref, shift, scale, eps=eps))

    def hidden(at):
        y = dot(_kept(h_ref), kernel1[:, at]) + bias1[:, at]
        _keep(hidden_ref, at, jax.nn.gelu(y, approximate=True).astype(x_ref.dtype))

    def columns(at):
        _add_gated(x_ref, gate, dot(_kept(hidden_ref), kernel2[:, at]) + bias2[:, at], o_ref, at)

    each_slice(kernel1.shape[1], hidden)
    each_slice(kernel2.shape[1], columns)


def _add_gated(x_ref, gate, y, o_ref, at):
    """Some columns of x + gate y; gate: a list of none or one."""
    y = y.reshape(*x_ref.shape[1:3], -1)
    for vector in gate:
        y = y * vector[0, :, :, at]
    o_ref[0, :, :, at] = (x_ref[0, :, :, at].astype(jnp.float32) + y).astype(o_ref.dtype)


def _keep(ref, at, x):
    """Some columns. As words, held: the compiler would keep the products' operands in registers too, and spill them."""
    if ref.dtype == x.dtype:
        ref[:, at] = x
    else:
        hold(ref, (slice(None), at), x, unknown_zero(3))


def _kept(ref):
    return values_of(ref[...], jnp.bfloat16)


def _modulated(x_ref, shift=None, scale=None, *, eps):
    """[rows, C]."""
    if shift is None:
        return x_ref[...].reshape(-1, x_ref.shape[-1])
    x = x_ref[0].astype(jnp.float32)
    if scale is None:
        return (x + shift[0]).astype(x_ref.dtype).reshape(-1, x.shape[-1])
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return (x * (1 + scale[0]) + shift[0]).astype(x_ref.dtype).reshape(-1, x.shape[-1])


def each_slice(width: int, body) -> None:
    """body(columns), unrolled: one slice's products are scheduled beside the elementwise work of the one before."""
    for start in range(0, width, COLUMNS):
        body(slice(start, min(start + COLUMNS, width)))
