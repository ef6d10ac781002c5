"""The recorded tables of every version: buckets, masks, prompts."""

import pytest

from tests.checks import check_case

CASES = [f"v1{minor}_{table}" for minor in (1, 2, 3) for table in ("buckets", "prompt_utils")]


@pytest.mark.parametrize("name", [*CASES, "v11_mask_generator", "v12_mask_generator"])
def test_recorded(goldens, name):
    check_case(goldens, name)
