import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.common.errors import UserError
from opensora_jax.models import stdit3_v13
from opensora_jax.nn.attention import SelfAttention
from opensora_jax.nn.positions import rope_3d, rope_frequencies
from tests import checks
from tests.models import denoisers

TINY = dict(
    in_channels=4, caption_channels=8, model_max_length=5, kernel_size=(2, 2, -1), use_spatial_rope=True, drop_path=0.2
)


def test_recorded(goldens):
    checks.check_case(goldens, "v13_stdit3_window_a")


def test_manifest(goldens):
    checks.check_manifest(goldens, "STDiT3-XL_2_v1.3", "models", "stdit3_v13", preset="STDiT3-XL/2-v1.3")


def test_a_bare_state_dict_is_taken_for_the_released_windows():
    _, table = checks.modules("models", "stdit3_v13")
    shapes = {
        "x_embedder.proj.weight": (144, 16, 1, 2, 2),
        "spatial_blocks.0.mlp.fc1.weight": (576, 144),
        "y_embedder.y_embedding": (300, 4096),
        "y_embedder.y_proj.fc1.weight": (144, 4096),
        "final_layer.linear.weight": (128, 144),
    }
    windowed = table.config_from(shapes | {"rope.freqs": (12,)}, {})
    assert (windowed["kernel_size"], windowed["num_heads"]) == ((8, 8, -1), 2)
    axial = table.config_from(shapes | {"rope.freqs": (36,)}, {})
    assert ("kernel_size" not in axial, axial["num_heads"], axial["skip_temporal"]) == (True, 2, True)


def test_gradients():
    denoisers.gradients_reach_everything("stdit3_v13", **TINY)


def test_scan():
    denoisers.scan_equals_unrolled("stdit3_v13", **TINY)


def test_dropped_text():
    denoisers.dropped_text_is_null("stdit3_v13", **TINY)


def test_given_frames_read_the_null_caption():
    """Without temporal blocks frames are independent, so one can tell who read what."""
    options = TINY | dict(skip_temporal=True, depth=1)
    _, network, params, given, _ = denoisers.tiny("stdit3_v13", **options)
    run = jax.jit(lambda given: network(params, **given))
    given = given | {"y_null": given["y"], "mask_index": jnp.array([1])}
    null = params["y_embedder"]["null"][: given["y"].shape[1]]
    default = run({k: v for k, v in given.items() if k != "y_null"})
    stated = run(given | {"y_null": jnp.broadcast_to(null, given["y"].shape)})
    np.testing.assert_allclose(default, stated, rtol=1e-5, atol=1e-5)
    same = run(given)  # y_null is y: as if no frame were given
    np.testing.assert_allclose(same[:, [0, 2]], stated[:, [0, 2]], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(same[:, 1] - stated[:, 1]).max()) > 1e-2


@pytest.fixture
def attention():
    attn = SelfAttention(24, 2, qk_norm=True, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    attn.qkv.bias[...] = jax.random.normal(jax.random.key(1), attn.qkv.bias.shape)  # padding would be seen through it
    return attn


def test_a_window_larger_than_the_grid_is_full_attention(attention):
    grid, window, frequencies = (2, 3, 5), (2, 4, 8), rope_frequencies(4)
    x = jax.random.normal(jax.random.key(0), (2, 2, 15, 24))
    out = stdit3_v13.windowed(attention, x, grid, window, rope_3d(window, frequencies, 0.7))
    flat = attention(x.reshape(2, 1, 30, 24), mode="spatial", rope=rope_3d(grid, frequencies, 0.7))
    np.testing.assert_allclose(out, flat.reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_windows_see_only_themselves(attention):
    grid, window = (2, 4, 6), (2, 2, 2)
    rope = rope_3d(window, rope_frequencies(4))
    x = jax.random.normal(jax.random.key(0), (1, 2, 24, 24))
    changed = x.at[0, 1, 3 * 6 + 4].add(1.0)  # second frame, row 3, column 4
    difference = jnp.abs(
        stdit3_v13.windowed(attention, x, grid, window, rope)
        - stdit3_v13.windowed(attention, changed, grid, window, rope)
    )
    touched = np.argwhere(np.asarray(difference.max(-1).reshape(grid)) > 1e-6)
    assert {tuple(map(int, at)) for at in touched} == {(t, h, w) for t in (0, 1) for h in (2, 3) for w in (4, 5)}


def test_mistakes_are_named():
    with pytest.raises(UserError, match="needs kernel_size"):
        stdit3_v13.Config(use_spatial_rope=True)
    with pytest.raises(UserError, match="multiple of 6"):
        stdit3_v13.Config(hidden_size=64, num_heads=4, kernel_size=(8, 8, -1))
