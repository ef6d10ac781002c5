"""One small set of shards for all tests of this room."""

import pytest

from opensora_jax.data.shapes import write_shapes


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shapes(folder, count=48, records_per_shard=20, size=32)
    return folder
