import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checks
from tests.models import denoisers

TINY = dict(caption_channels=8, model_max_length=5, drop_path=0.5)


def test_recorded(goldens):
    checks.check_case(goldens, "v10_stdit_a")


@pytest.mark.parametrize("name", ["16x256x256", "16x512x512", "64x512x512"])
def test_manifest(goldens, name):
    checks.check_manifest(goldens, f"STDiT-XL_2_v1.0_{name}", "models", "stdit", preset=f"STDiT-XL/2-{name}")


def test_released_scales_follow_from_the_tables_of_a_bare_state_dict():
    _, table = checks.modules("models", "stdit")
    tables = lambda patches, frames: {"pos_embed": (1, patches, 8), "pos_embed_temporal": (1, frames, 8)}
    assert table.released_scales(tables(256, 16)) == {"space_scale": 0.5, "time_scale": 1.0}
    assert table.released_scales(tables(1024, 64)) == {"space_scale": 1.0, "time_scale": 2 / 3}


def test_gradients():
    denoisers.gradients_reach_everything("stdit", **TINY)


def test_scan():
    denoisers.scan_equals_unrolled("stdit", **TINY)


def test_dropped_text():
    denoisers.dropped_text_is_null("stdit", **TINY)


def test_generated_frames_of_an_all_true_mask_are_as_without_one():
    _, network, params, given, run = denoisers.tiny("stdit", **TINY)
    everything = given | {"x_mask": jnp.ones_like(given["x_mask"])}
    bare = jax.jit(lambda params, given: network(params, **given))(params, given | {"x_mask": None})
    np.testing.assert_allclose(run(params, everything)[0], bare, rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(params, given)[0], bare, atol=1e-2)
