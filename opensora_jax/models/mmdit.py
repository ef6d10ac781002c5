"""MMDiT, the denoiser of Open-Sora 2.0 (11B) and of FLUX.1: text and video tokens meet in joint attention, first in
double blocks (a set of weights each), then in single blocks (one set, attention and MLP in parallel).

Open-Sora 2.0 technical report (arXiv 2503.09642), section 3; Stable Diffusion 3 (arXiv 2403.03206) for double blocks.
It predicts noise - data for times in [0, 1], 1 = noise.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.common.packing import pack, position_ids, unpack
from opensora_jax.common.shapes import LatentShape
from opensora_jax.kernels.full import full_attention, pad_to_shares, shares
from opensora_jax.nn.embeddings import TimestepEmbedder
from opensora_jax.nn.linear import Linear, fan_in_uniform, zeros
from opensora_jax.nn.mlp import MLP, gelu_tanh
from opensora_jax.nn.modulate import gated, modulate
from opensora_jax.nn.norms import LayerNorm, RMSNorm
from opensora_jax.nn.positions import apply_rope_halves, apply_rope_interleaved, rope_angles
from opensora_jax.nn.stack import run_stack, stack
from opensora_jax.nn.taps import tap
from opensora_jax.parallel.shard import constrain


@dataclass(frozen=True)
class Config:
    in_channels: int = 64  # of a token: latent channels times patch_size squared
    patch_size: int = 2
    vec_in_dim: int = 768  # CLIP's pooled vector
    context_in_dim: int = 4096  # T5
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # rotary channels of a head for time, height, width
    theta: float = 10000.0
    qkv_bias: bool = True  # of double blocks; single blocks always have one
    guidance_embed: bool = False  # a distilled guidance scale comes in as a number
    cond_embed: bool = True  # a mask and given frames come in beside the noise
    fused_qkv: bool = False
    rope: str = "halves"  # a rotated pair is (k, k + d/2), as Open-Sora 2.0 has it; "pairs": (2k, 2k + 1), as FLUX.1
    remat: str = "none"
    remat_layers: tuple[int, int] | None = None  # only the first so many double and single blocks; None: all
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        head_dim, rest = divmod(self.hidden_size, self.num_heads)
        if rest or sum(self.axes_dim) != head_dim:
            raise UserError(
                f"mmdit: axes_dim {self.axes_dim} must sum to hidden_size / num_heads = {self.hidden_size}/{self.num_heads}"
            )
        if self.rope not in ("halves", "pairs"):
            raise UserError(f"mmdit: rope={self.rope!r} is unknown; choose halves or pairs")

    @property
    def latent_channels(self) -> int:
        return self.in_channels // self.patch_size**2


FLUX = Config(cond_embed=False, fused_qkv=True, rope="pairs")
PRESETS = {
    "opensora2_mmdit_11b": Config(),
    "opensora2_mmdit_11b_dcae": Config(in_channels=128, patch_size=1),
    "flux-dev": Config(**(vars(FLUX) | {"guidance_embed": True})),
    "flux-schnell": FLUX,
}
REPOSITORIES = {
    "opensora2_mmdit_11b": "hpcai-tech/Open-Sora-v2/Open_Sora_v2.safetensors",
    "opensora2_mmdit_11b_dcae": "hpcai-tech/Open-Sora-v2-Video-DC-AE/Open_Sora_v2_Video_DC_AE.safetensors",
    "flux-dev": "black-forest-labs/FLUX.1-dev/flux1-dev.safetensors",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell/flux1-schnell.safetensors",
}


def build(cfg: Config, *, rngs: nnx.Rngs) -> "MMDiT":
    return MMDiT(cfg, rngs=rngs)


def inputs(cfg: Config, shape: LatentShape) -> dict[str, jax.ShapeDtypeStruct]:
    array = lambda *dims: jax.ShapeDtypeStruct((shape.batch, *dims), "float32")
    video = (shape.frames, shape.height, shape.width)
    given = {
        "x": array(*video, cfg.latent_channels),
        "t": array(),
        "y": array(shape.text_tokens, cfg.context_in_dim),
        "y_vec": array(cfg.vec_in_dim),
    }
    if cfg.cond_embed:
        given["cond"] = array(*video, 1 + cfg.latent_channels)
    if cfg.guidance_embed:
        given["guidance"] = array()
    return given


class Projections(nnx.Module):
    """q, k and v of one stream: q and k normalised over a head; and the way out of attention."""

    def __init__(self, cfg: Config, **kwargs):
        width = cfg.hidden_size
        self.heads = cfg.num_heads
        into = lambda n: Linear(width, n * width, ("embed", "heads"), bias=cfg.qkv_bias, init=fan_in_uniform, **kwargs)
        self.qkv = into(3) if cfg.fused_qkv else None
        self.q_proj, self.k_proj, self.v_proj = (None if cfg.fused_qkv else into(1) for _ in range(3))
        self.query_norm, self.key_norm = (
            RMSNorm(width // cfg.num_heads, param_dtype=cfg.param_dtype) for _ in range(2)
        )
        self.proj = Linear(width, width, ("heads", "embed"), init=fan_in_uniform, **kwargs)

    def project(self, x):
        if self.qkv is not None:
            q, k, v = jnp.split(self.qkv(x), 3, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (_heads(part, self.heads) for part in (q, k, v))
        return self.query_norm(q), self.key_norm(k), v


class Stream(nnx.Module):
    """What text and video each own in a double block."""

    def __init__(self, cfg: Config, **kwargs):
        width = cfg.hidden_size
        self.mod = Linear(width, 6 * width, ("embed", None), init=fan_in_uniform, **kwargs)
        self.attn = Projections(cfg, **kwargs)
        self.mlp = MLP(width, int(width * cfg.mlp_ratio), init=fan_in_uniform, **kwargs)
        self.norm = LayerNorm(width, affine=False)

    def modulation(self, vec):
        """Shift, scale, gate of attention, then of the MLP: six [B, 1, C]."""
        return jnp.split(self.mod(vec)[:, None], 6, -1)

    def project(self, x, rows):
        return self.attn.project(modulate(self.norm(x), rows[0], rows[1]))

    def finish(self, x, attended, rows):
        x = x + gated(self.attn.proj(attended), rows[2])
        return x + gated(self.mlp(modulate(self.norm(x), rows[3], rows[4])), rows[5])


class DoubleBlock(nnx.Module):
    def __init__(self, cfg: Config, **kwargs):
        self.img = Stream(cfg, **kwargs)
        self.txt = Stream(cfg, **kwargs)

    def __call__(self, img, txt, vec, attend):
        """img [B, N, C], txt [B, L, C]; vec [B, C] after its SiLU; attend: q, k, v of all tokens → what they attended."""
        img_rows, txt_rows = self.img.modulation(vec), self.txt.modulation(vec)
        streams = zip(self.txt.project(txt, txt_rows), self.img.project(img, img_rows))
        q, k, v = (weave(*parts) for parts in streams)
        of_txt, of_img = unweave(attend(q, k, v), txt.shape[1])
        img, txt = self.img.finish(img, of_img, img_rows), self.txt.finish(txt, of_txt, txt_rows)
        return constrain(img, "batch", "tokens", None), constrain(txt, "batch", "tokens", None)


class SingleBlock(nnx.Module):
    """Attention and MLP side by side on text and video together, one projection in and one out."""

    def __init__(self, cfg: Config, **kwargs):
        width, hidden = cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_ratio)
        self.heads, self.width = cfg.num_heads, width
        into = lambda outputs: Linear(width, outputs, ("embed", "mlp"), init=fan_in_uniform, **kwargs)
        self.linear1 = into(3 * width + hidden) if cfg.fused_qkv else None
        self.q_proj, self.k_proj = (None if cfg.fused_qkv else into(width) for _ in range(2))
        self.v_mlp = None if cfg.fused_qkv else into(width + hidden)
        self.linear2 = Linear(width + hidden, width, ("mlp", "embed"), init=fan_in_uniform, **kwargs)
        self.query_norm, self.key_norm = (
            RMSNorm(width // cfg.num_heads, param_dtype=cfg.param_dtype) for _ in range(2)
        )
        self.modulation = Linear(width, 3 * width, ("embed", None), init=fan_in_uniform, **kwargs)
        self.norm = LayerNorm(width, affine=False)

    def __call__(self, x, vec, attend):
        shift, scale, gate = jnp.split(self.modulation(vec)[:, None], 3, -1)
        h = modulate(self.norm(x), shift, scale)
        if self.linear1 is not None:
            q, k, v, hidden = jnp.split(self.linear1(h), [self.width, 2 * self.width, 3 * self.width], -1)
        else:
            q, k = self.q_proj(h), self.k_proj(h)
            v, hidden = jnp.split(self.v_mlp(h), [self.width], -1)
        q, k, v = (_heads(part, self.heads) for part in (q, k, v))
        attended = attend(self.query_norm(q), self.key_norm(k), v)
        out = self.linear2(jnp.concatenate([attended, gelu_tanh(hidden)], -1))
        return constrain(x + gated(out, gate), "batch", "tokens", None)


class FinalLayer(nnx.Module):
    def __init__(self, cfg: Config, **kwargs):
        self.norm = LayerNorm(cfg.hidden_size, affine=False)
        self.adaln = Linear(cfg.hidden_size, 2 * cfg.hidden_size, ("embed", None), init=fan_in_uniform, **kwargs)
        self.linear = Linear(cfg.hidden_size, cfg.in_channels, ("embed", None), init=fan_in_uniform, **kwargs)

    def __call__(self, x, vec):
        shift, scale = jnp.split(self.adaln(vec)[:, None], 2, -1)
        return self.linear(modulate(self.norm(x), shift, scale))


class MMDiT(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kwargs = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)
        width = cfg.hidden_size
        into = lambda inputs, init=fan_in_uniform: Linear(inputs, width, (None, "embed"), init=init, **kwargs)
        self.img_in, self.txt_in = into(cfg.in_channels), into(cfg.context_in_dim)
        self.cond_in = into(cfg.in_channels + cfg.patch_size**2, zeros) if cfg.cond_embed else None
        self.time_in = TimestepEmbedder(width, init=fan_in_uniform, **kwargs)
        self.guidance_in = TimestepEmbedder(width, init=fan_in_uniform, **kwargs) if cfg.guidance_embed else None
        self.vector_in = MLP(cfg.vec_in_dim, width, width, act=jax.nn.silu, init=fan_in_uniform, **kwargs)
        self.double_blocks = stack(lambda r: DoubleBlock(cfg, **(kwargs | {"rngs": r})), cfg.depth, rngs=rngs)
        self.single_blocks = stack(
            lambda r: SingleBlock(cfg, **(kwargs | {"rngs": r})), cfg.depth_single_blocks, rngs=rngs
        )
        self.final_layer = FinalLayer(cfg, **kwargs)

    def __call__(
        self, x, t, y, y_vec, cond=None, guidance=None, *, drop_text=None, drop_vec=None, null_y=None, null_y_vec=None
    ):
        """x [B, T, H, W, C] latents; t [B] in [0, 1]; y [B, L, D] T5 features; y_vec [B, D] CLIP's pooled vector;
        cond [B, T, H, W, 1 + C]: mask (1 = given) and given latents, zeros when absent; guidance [B]: the scale that a
        distilled network wants. drop_text, drop_vec [B] bool: these samples take null_y and null_y_vec, the encoders'
        outputs for an empty prompt. Returns noise - data, [B, T, H, W, C] float32."""
        video, patch = x.shape[1:4], self.cfg.patch_size
        y, y_vec = _dropped(y, drop_text, null_y), _dropped(y_vec, drop_vec, null_y_vec)
        if cond is None and self.cfg.cond_embed:
            cond = jnp.zeros((*x.shape[:-1], 1 + x.shape[-1]), x.dtype)
        out = self.packed(
            pack(x, patch),
            position_ids(1, video, patch),
            y,
            jnp.zeros((1, y.shape[1], len(self.cfg.axes_dim)), jnp.float32),
            t,
            y_vec,
            cond=None if cond is None else pack(cond, patch),
            guidance=guidance,
        )
        return unpack(out, video, patch)

    def packed(self, img, img_ids, txt, txt_ids, t, y_vec, *, cond=None, guidance=None):
        """The network on tokens: img [B, N, in_channels], cond [B, N, in_channels + p p] with the mask first; ids
        [B or 1, N or L, 3]. Returns [B, N, in_channels] float32."""
        cfg = self.cfg
        given = lambda a: a.astype(cfg.dtype)
        vec = self._vector(t, y_vec, guidance)
        img = tap("img_in", self.img_in(given(img)))
        _agree("cond", cfg.cond_embed, cond)
        if cond is not None:
            img = img + tap("cond_in", self.cond_in(given(cond)))
        count, txt = img.shape[1], tap("txt_in", self.txt_in(given(txt)))
        (txt, txt_visible), (img, img_visible) = pad_to_shares(txt, 1), pad_to_shares(img, 1)
        img, txt = constrain(img, "batch", "tokens", None), constrain(txt, "batch", "tokens", None)
        visible = weave(txt_visible[None], img_visible[None])[0]
        ids = weave(*(pad_to_shares(ids, 1)[0] for ids in (txt_ids, img_ids)))
        rotate = self._rotation(tap("rope_angles", rope_angles(ids, cfg.axes_dim, cfg.theta)))
        attend = lambda q, k, v: _merge(full_attention(rotate(q), rotate(k), v, visible=visible))

        def double(streams, block):
            img, txt = block(*streams, vec, attend)
            return tap("double_img", img), tap("double_txt", txt)

        first_double, first_single = cfg.remat_layers or (cfg.depth, cfg.depth_single_blocks)
        img, txt = self._run(double, (img, txt), self.double_blocks, first_double)
        joint = constrain(weave(txt, img), "batch", "tokens", None)
        single = lambda x, block: tap("single", block(x, vec, attend))
        joint = self._run(single, joint, self.single_blocks, first_single)
        _, img = unweave(joint, txt.shape[1])
        return self.final_layer(img, vec)[:, :count].astype(jnp.float32)

    def _vector(self, t, y_vec, guidance):
        """What modulates every block, after its SiLU: time, pooled text and guidance."""
        vec = tap("time_in", self.time_in(t.astype(jnp.float32) * 1000))
        _agree("guidance", self.cfg.guidance_embed, guidance)
        if guidance is not None:
            vec = vec + tap("guidance_in", self.guidance_in(guidance.astype(jnp.float32) * 1000))
        return jax.nn.silu(vec + tap("vector_in", self.vector_in(y_vec.astype(self.cfg.dtype))))

    def _rotation(self, angles):
        """The rotary embedding of heads [B, L, heads, d]; the two layouts belong to differently permuted weights."""
        cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
        if self.cfg.rope == "halves":
            cos, sin = (jnp.concatenate([table, table], -1) for table in (cos, sin))
            return lambda x: apply_rope_halves(x, cos, sin)
        cos, sin = jnp.repeat(cos, 2, -1), jnp.repeat(sin, 2, -1)
        return lambda x: apply_rope_interleaved(x, cos, sin)

    def _run(self, body, x, layers, rematerialised: int):
        depth = jax.tree.leaves(layers)[0].shape[0]
        if self.cfg.remat == "none" or rematerialised >= depth:
            return run_stack(body, x, layers, remat=self.cfg.remat)
        part = lambda first, last: jax.tree.map(lambda leaf: leaf[first:last], layers)
        x = run_stack(body, x, part(0, rematerialised), remat=self.cfg.remat)
        return run_stack(body, x, part(rematerialised, depth))


def weave(txt, img):
    """Text before video, [B, L + N, ...]. Where tokens are shared out, on each device its text before its video, so
    that joining moves nothing; attention does not care for the order."""
    cut = lambda x: x.reshape(x.shape[0], shares(), -1, *x.shape[2:])
    join = np.concatenate if isinstance(txt, np.ndarray) else jnp.concatenate
    return join([cut(txt), cut(img)], 2).reshape(txt.shape[0], -1, *txt.shape[2:])


def unweave(joint, of_text: int):
    """The first `of_text` tokens, those of text, and the rest."""
    cut = joint.reshape(joint.shape[0], shares(), -1, *joint.shape[2:])
    first = of_text // shares()
    return tuple(part.reshape(part.shape[0], -1, *part.shape[3:]) for part in (cut[:, :, :first], cut[:, :, first:]))


def _dropped(value, drop, null):
    if drop is None:
        return value
    if null is None:
        raise UserError(
            "mmdit: dropping text needs null_y and null_y_vec, the text encoders' outputs for an empty prompt"
        )
    return jnp.where(drop.reshape(-1, *[1] * (value.ndim - 1)), null.astype(value.dtype), value)


def _agree(name: str, wanted: bool, value):
    if wanted != (value is not None):
        raise UserError(f"mmdit: {name}_embed is {wanted}, but {name} is {'absent' if wanted else 'given'}")


def _heads(x, heads: int):
    return x.reshape(*x.shape[:-1], heads, -1)


def _merge(x):
    return x.reshape(*x.shape[:-2], -1)
