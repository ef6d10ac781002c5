"""Tokenizers: a local folder or a repository's name → int32 ids and masks of fixed length. Only here is transformers
imported, and only when a tokenizer is loaded; it needs neither PyTorch nor, for a local folder, a network.

    tokenizer = load_tokenizer("pipeline/tokenizer", max_length=300)
    ids, mask = tokenizer(["a red ball rolls left", ""])      # [2, 300] each; mask: 1 = keep
"""

import math
import os
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora_jax.common.errors import UserError

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # T5's ids 0, 1, 2


@dataclass(frozen=True)
class Tokenizer:
    inner: Any  # a transformers tokenizer
    max_length: int

    def __call__(self, texts: str | Sequence[str], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """ids [B, L] and mask [B, L] int32; longer texts are cut, and still end as the tokenizer ends a text."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = max_length or self.max_length
        if not texts:
            return np.zeros((0, length), np.int32), np.zeros((0, length), np.int32)
        out = self.inner(texts, padding="max_length", truncation=True, max_length=length)
        return np.asarray(out["input_ids"], np.int32), np.asarray(out["attention_mask"], np.int32)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, its end included, however long it is."""
        return [len(ids) for ids in self.inner(list(texts))["input_ids"]]

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs, special tokens included."""
        return len(self.inner)

    def decode(self, ids) -> str:
        return self.inner.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def save(self, folder) -> None:
        self.inner.save_pretrained(str(folder))


def load_tokenizer(source: str | os.PathLike, max_length: int, subfolder: str = "") -> Tokenizer:
    """From a folder (tokenizer.json, spiece.model or vocab.json + merges.txt), else from a model repository."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell that PyTorch is absent, at every start
    folder = Path(source) / subfolder
    if folder.is_dir():
        return Tokenizer(_from_folder(folder), max_length)
    if os.path.isabs(source) or str(source).startswith(".") or str(source).count("/") != 1:
        raise UserError(f"there is no tokenizer folder {folder}")
    from transformers import AutoTokenizer

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(str(source), subfolder=subfolder), max_length)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the tokenizer {source} is neither a folder nor could it be downloaded: {reason}") from None


def _from_folder(folder: Path):
    from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

    has = lambda *names: all((folder / name).exists() for name in names)
    try:
        if has("tokenizer_config.json"):
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if has("spiece.model"):
            return T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
        if has("vocab.json", "merges.txt"):
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        if has("tokenizer.json"):
            special = dict(pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    except Exception as error:
        raise UserError(f"{folder} holds a tokenizer that cannot be read: {str(error).splitlines()[0]}") from None
    raise UserError(f"{folder} holds no tokenizer: wanted tokenizer.json, spiece.model, or vocab.json and merges.txt")


def train_tokenizer(captions: Iterable[str], folder, *, vocab_size: int = 512, max_length: int = 64) -> Tokenizer:
    """A small tokenizer of T5's kind (unigram pieces, word starts marked, texts end in </s>), saved to `folder`.

    Its pieces are the most frequent words and every printable ASCII character, so any English prompt can be spelt.
    The subword search of the usual trainers finds nothing in a few hundred captions of a few dozen words."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Trainable
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    splitter = pre_tokenizers.Metaspace()
    counts = Counter(
        word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)) if word
    )
    special = [PAD, EOS, UNKNOWN]
    characters = sorted({*map(chr, range(33, 127)), *"".join(counts), "▁"} - {*string.ascii_uppercase})
    room = vocab_size - len(special) - len(characters)
    if room < 0:
        raise UserError(f"a vocabulary of {vocab_size} has no room for {len(characters)} characters; make it larger")
    words = [(word, count) for word, count in counts.most_common() if word not in characters][:room]
    total = sum(counts.values())
    scored = [(word, math.log(count / total)) for word, count in words]
    last_resort = min((score for _, score in scored), default=0.0) - 1.0  # two characters cost more than any word
    tokenizer = Trainable(
        models.Unigram([*((name, 0.0) for name in special), *scored, *((c, last_resort) for c in characters)], unk_id=2)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, special.index(EOS))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, model_max_length=max_length
    )
    wrapped.save_pretrained(str(folder))
    return Tokenizer(wrapped, max_length)
