"""In which language a caption is written, and how likely it is in the one that is wanted.

    python -m data_pipelines.language --input=WORK/table.parquet --output=DIR --wanted=en

The counting model that ships inside py3langid (5 MB, 0.7 ms a caption) names `language`; `language_match` is its
probability of the wanted one. A caption of two words may be anything, so `language == 'en'` loses good rows;
`language_match >= 0.02` loses what is surely something else. Put caption_text behind it: scores in words are English.
"""

import dataclasses
import sys

import pyarrow as pa

from data_pipelines import entry
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError


class Language(Stage):
    columns_in = ("text",)
    columns_out = {"language": pa.string(), "language_match": pa.float64()}
    resources = Resources(num_cpus=1)
    batch_size = 2048

    @dataclasses.dataclass(frozen=True)
    class Config:
        wanted: str = "en"  # as in ISO 639

    @classmethod
    def check(cls, config):
        known = identifier().labels
        if config.wanted not in known:
            raise UserError(f"language.wanted must be one of {', '.join(sorted(known))}, not {config.wanted}")

    def __init__(self, config):
        super().__init__(config)
        self.identifier = identifier()

    def row(self, row):
        if not (row["text"] or "").strip():
            return {}
        ranked = self.identifier.rank(row["text"])
        return {"language": ranked[0][0], "language_match": dict(ranked)[self.config.wanted]}


def identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError('the language stage needs py3langid: pip install "opensora-jax[data]"') from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


STAGE = Language

if __name__ == "__main__":
    sys.exit(entry.stage(Language))
