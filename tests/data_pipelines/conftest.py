"""One corpus of known truth and one curated set for the whole folder."""

import pytest

from data_pipelines import pipeline, synthetic, tables
from data_pipelines.pipeline import Options
from tests.data_pipelines.steps import curation


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return str(folder), synthetic.corpus(str(folder))


@pytest.fixture(scope="session")
def curated(corpus, tmp_path_factory):
    """(output folder, finished table) of the local runner."""
    output = str(tmp_path_factory.mktemp("curated"))
    return output, pipeline.run(curation(), tables.read_input(corpus[0]), Options(output=output, quiet=True))
