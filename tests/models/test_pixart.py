import jax
import numpy as np
import pytest
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.models import pixart
from opensora_jax.nn.attention import SelfAttention
from opensora_jax.nn.params import Network
from opensora_jax.weights import engine
from tests import checks
from tests.models import denoisers

TEXT = dict(caption_channels=8, model_max_length=5)
SIGMA = dict(kv_compress_layers=(1,), kv_compress_factor=2, micro_condition=True, drop_path=0.2, **TEXT)


@pytest.mark.parametrize("case", ["v10_pixart_a", "v10_pixartms_a", "pixart_orig"])
def test_recorded(goldens, case):
    checks.check_case(goldens, case)


@pytest.mark.parametrize(
    "name, preset",
    [
        ("PixArt-XL_2_1x256x256", "PixArt-XL/2-256"),
        ("PixArt-XL_2_1x512x512", "PixArt-XL/2-512"),
        ("PixArtMS-XL_2_1x1024", "PixArtMS-XL/2-1024"),
    ],
)
def test_manifest(goldens, name, preset):
    checks.check_manifest(goldens, name, "models", "pixart", preset=preset)


def test_gradients():
    denoisers.gradients_reach_everything("pixart", **SIGMA)


def test_scans_of_every_run_of_layers():
    denoisers.scan_equals_unrolled("pixart", **SIGMA)


def test_dropped_text():
    denoisers.dropped_text_is_null("pixart", **SIGMA)


@pytest.mark.parametrize("preset", [name for name in pixart.PRESETS if "alpha" in name or "Sigma" in name])
def test_released_presets_follow_from_a_bare_state_dict(preset):
    """Names out and back; the position table, which we drop, tells the size of training."""
    _, table = checks.modules("models", "pixart")
    cfg = pixart.PRESETS[preset]
    network = Network.of(lambda rngs: pixart.build(cfg, rngs=rngs))
    hollow = lambda path: np.broadcast_to(np.int8(0), checks.ours(network)[path])
    names = engine.reference_arrays(checks.ours(network), hollow, table.RULES)
    shapes = {name: array.shape for name, array in names} | {"pos_embed": (1, cfg.base_size**2, cfg.hidden_size)}
    assert table.recognise(shapes, {})
    assert pixart.Config(**table.config_from(shapes, {})) == cfg
    engine.plan(shapes, checks.ours(network), table.RULES)


def test_compression_without_parameters_is_the_config_s():
    _, table = checks.modules("models", "pixart")
    stated = {"kv_compress_config": {"sampling": "uniform", "scale_factor": 2, "kv_compress_layer": [1]}}
    assert table.compression({}, stated)["kv_compress_sampling"] == "uniform"
    assert table.compression({}, {"kv_compress_config": {"sampling": None, "scale_factor": 1}}) == {}


@pytest.fixture
def attn():
    return SelfAttention(8, 2, qk_norm=True, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("sampling", pixart.SAMPLING)
def test_compressed_attention_is_its_definition(attn, sampling):
    """Against loops in numpy, on two frames of 3 x 5 tokens: the rest beside whole squares has no key."""
    factor, grid = 2, (2, 3, 5)
    compressor = pixart.Compressor(8, factor, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (1, 1, 30, 8))
    compress = compressor if sampling == "conv" else lambda kv: pixart.strided(kv, factor, sampling)
    out = pixart.attend_compressed(attn, x, grid, factor, compress)

    qkv = np.asarray(attn.qkv(x), np.float64)[0, 0].reshape(30, 3, 8)
    kept = []
    for part in (qkv[:, 1], qkv[:, 2]):
        a = part.reshape(*grid, 8)
        if sampling == "uniform_every":
            kept.append(part[::factor])
            continue
        squares = [(t, h, w) for t in range(2) for h in range(0, 2, 2) for w in range(0, 4, 2)]
        if sampling == "conv":  # begins as the average, then a norm
            mean = np.stack([a[t, h : h + 2, w : w + 2].mean((0, 1)) for t, h, w in squares])
            centred = mean - mean.mean(-1, keepdims=True)
            kept.append(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5))
        else:
            kept.append(np.stack([a[at] for at in squares]))
    heads = lambda a: a.reshape(len(a), 2, 4).transpose(1, 0, 2)
    norm = lambda a: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)
    q, k, v = norm(heads(qkv[:, 0])), norm(heads(kept[0])), heads(kept[1])
    logits = q @ k.transpose(0, 2, 1) / 2.0
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    attended = (weights / weights.sum(-1, keepdims=True)) @ v
    expected = attended.transpose(1, 0, 2).reshape(30, 8) @ np.asarray(attn.proj.kernel[...]) + attn.proj.bias[...]
    np.testing.assert_allclose(out[0, 0], expected, rtol=2e-5, atol=2e-5)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="exceed the depth"):
        pixart.Config(kv_compress_layers=(28,))
    with pytest.raises(UserError, match="choose one of conv"):
        pixart.Config(kv_compress_sampling="mean")
    _, table = checks.modules("models", "pixart")
    with pytest.raises(UserError, match="window"):
        table.config_from({}, {"window_size": 14})
