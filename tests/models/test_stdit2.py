import jax.numpy as jnp
import numpy as np

from tests import checks
from tests.models import denoisers

TINY = dict(caption_channels=8, model_max_length=5)


def test_recorded(goldens):
    checks.check_case(goldens, "v11_stdit2_a")


def test_manifest(goldens):
    checks.check_manifest(goldens, "STDiT2-XL_2_v1.1", "models", "stdit2", preset="STDiT2-XL/2")


def test_gradients():
    denoisers.gradients_reach_everything("stdit2", **TINY)


def test_scan():
    denoisers.scan_equals_unrolled("stdit2", **TINY)


def test_dropped_text():
    denoisers.dropped_text_is_null("stdit2", **TINY)


def test_every_number_of_the_video_matters():
    _, _, params, given, run = denoisers.tiny("stdit2", **TINY)
    out = run(params, given)[0]
    for name in ("height", "width", "ar", "num_frames", "fps"):
        other = run(params, given | {name: given[name] + 3})[0]
        assert float(jnp.abs(other - out).max()) > 1e-3, name


def test_norm_and_rotation_order_matters():
    """Per-dimension weights make the two orders different networks."""
    _, _, params, given, run = denoisers.tiny("stdit2", **TINY)
    _, _, _, _, modern = denoisers.tiny("stdit2", qk_norm_legacy=False, **TINY)
    assert not np.allclose(run(params, given)[0], modern(params, given)[0], atol=1e-3)
