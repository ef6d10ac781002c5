import pytest

from tests import checks
from tests.models import denoisers

TINY = dict(caption_channels=8, model_max_length=5)


def test_recorded(goldens):
    checks.check_case(goldens, "v12_stdit3_a")


@pytest.mark.parametrize("size", ["XL", "3B"])
def test_manifest(goldens, size):
    checks.check_manifest(goldens, f"STDiT3-{size}_2_v1.2", "models", "stdit3", preset=f"STDiT3-{size}/2")


def test_gradients():
    denoisers.gradients_reach_everything("stdit3", **TINY)


def test_scan():
    denoisers.scan_equals_unrolled("stdit3", **TINY)


def test_dropped_text():
    denoisers.dropped_text_is_null("stdit3", **TINY)
