"""Captions made clean, and scores put into words for training.

    python -m data_pipelines.caption_text --input=WORK/table.parquet --output=DIR --clean=true --scores=numbers

`clean` takes away what language models wrap around a caption ("The video shows …"), links, leftover markup and broken
last sentences. `scores` appends what Open-Sora trained with: camera (1.1: "The camera is panning left."), numbers (1.2:
"aesthetic score: 5.5, motion score: 10.0, camera motion: pan left."), words (1.3: "the motion strength is fair."), fps
(2.0: "24 FPS, 7 motion score."). A score that a row lacks is left out. The tables of words are those with which 1.3 reads
prompts.

`words` counts the words of the result, and `text_len` its tokens when a `tokenizer` is named, as the originals' column
of that name. A text encoder reads so many and no more (1.0: 120, 1.1: 200, 1.2 and 1.3: 300, 2.0: 512).
"""

import bisect
import dataclasses
import hashlib
import re
import sys
import threading

import pyarrow as pa

from data_pipelines import entry
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError
from opensora_jax.common.prompts import text_preprocessing
from opensora_jax.text.tokenizers import load_tokenizer

SUBJECTS = r"(?:video|clip|footage|image|picture|photo(?:graph)?|frame|scene|sequence|animation)s?"
VERBS = (
    r"(?:shows?|showing|depicts?|depicting|features?|featuring|captures?|capturing|presents?|displays?|is of|"
    r"begins with|opens with|starts with|portrays?|showcases?)"
)
PREFIXES = (
    r"(?:sure|certainly|of course|okay|ok)[,!.:]\s+",
    r"here(?:'s| is)(?: a| the)?(?: \w+){0,3} (?:caption|description)[^:]{0,40}:\s*",
    r"(?:caption|description|answer|assistant)\s*:\s*",
    rf"in (?:the|this) {SUBJECTS},?\s+(?:we (?:can )?see\s+|there (?:is|are)\s+)?",
    rf"(?:the|this|a|an) (?:\w+ )?{SUBJECTS} (?:appears? to |seems? to )?{VERBS}\s+(?:us\s+|that\s+)?",
    r"(?:we|you) (?:can )?see\s+",
)
OPENERS = re.compile("^(?:" + "|".join(PREFIXES) + ")", re.IGNORECASE)
LINKS = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+\.\w+")
SENTENCES = re.compile(r"(?<=[.!?])\s+")
MARKS = re.compile(r"<[^<>]{1,40}>|\*{1,3}|#{2,}|`+")

AESTHETIC = ((4, 4.5, 5, 5.5, 6, 6.5), ("terrible", "very poor", "poor", "fair", "good", "very good", "excellent"))
MOTION = ((0.5, 2, 5, 10, 20), ("very low", "low", "fair", "high", "very high", "extremely high"))
CAMERA = {
    "static": "static",
    "pan left": "panning left",
    "pan right": "panning right",
    "tilt up": "tilting up",
    "tilt down": "tilting down",
    "zoom in": "zooming in",
    "zoom out": "zooming out",
}
# Every suffix that `scores` writes, so that one run can undo another; but the camera's, which a captioner may have written.
SUFFIX = re.compile(
    r"(?:[.,]?\s+(?:(?:the )?aesthetic score(?::| is) [\w. ]*?\w|"
    r"(?:the )?motion (?:score|strength)(?::| is) [\w. ]*?\w|camera motion: [\w +/]+|\d+(?:\.\d+)? FPS|\d+ motion score)\.?)+$",
    re.IGNORECASE,
)


class CaptionText(Stage):
    columns_in = ("text",)
    columns_out = {"text": pa.string(), "words": pa.int64(), "text_len": pa.int64()}
    resources = Resources(num_cpus=0.5)
    batch_size = 2048

    @dataclasses.dataclass(frozen=True)
    class Config:
        clean: bool = True  # openings such as "The video shows", links, markup and broken ends go
        drop_sentences: str = ""  # a regular expression; sentences in which it is found go
        scores: str = "none"  # camera (1.1), numbers (1.2), words (1.3), fps (2.0), undo (takes them away)
        drop_share: float = 0.0  # of score phrases left out, chosen by id; 1.3 used 0.2 with words
        camera: bool = True  # append the camera motion too
        append: str = ""  # words behind every caption
        t5_clean: bool = False  # as sampling from 1.x cleans a prompt: small letters, no marks
        tokenizer: str = ""  # a folder or a repository; text_len counts its tokens
        empty: str = "keep"  # or error: rows whose caption is empty after cleaning fail

    @classmethod
    def check(cls, config):
        if config.scores not in ("none", "camera", "numbers", "words", "fps", "undo"):
            raise UserError(
                f"caption_text.scores must be none, camera, numbers, words, fps or undo, not {config.scores}"
            )
        try:
            re.compile(config.drop_sentences)
        except re.error as error:
            raise UserError(f"caption_text.drop_sentences is no regular expression: {error}") from error
        if config.tokenizer:
            load_tokenizer(config.tokenizer, 1)

    @classmethod
    def prepare(cls, table, config):
        """Columns of scores are optional: those that are missing count as unknown."""
        for name in optional(config):
            if name not in table.column_names:
                kind = pa.string() if name == "cmotion" else pa.float64()
                table = table.append_column(name, pa.nulls(table.num_rows, kind))
        return table

    @classmethod
    def inputs(cls, config):
        return ("text", *optional(config))

    def __init__(self, config):
        super().__init__(config)
        self.tokenizer = load_tokenizer(config.tokenizer, 1) if config.tokenizer else None
        self.lock = threading.Lock()  # transformers' tokenizers keep their settings in themselves

    def rows(self, rows):
        made = super().rows(rows)
        texts = [row for row in made if row.get("text")]
        if self.tokenizer and texts:
            with self.lock:
                counts = self.tokenizer.count([row["text"] for row in texts])
            for row, count in zip(texts, counts):
                row["text_len"] = count
        return made

    def row(self, row):
        config, text = self.config, row["text"] or ""
        text = clean(text) if config.clean else text
        if config.drop_sentences:
            text = " ".join(part for part in SENTENCES.split(text) if not re.search(config.drop_sentences, part))
        if not text and config.empty == "error":
            raise ValueError("the caption is empty")
        if config.scores != "none" and text:  # scores alone are no caption
            text = SUFFIX.sub("", text)
            text = with_scores(text, row, config)
        if config.append and text:
            text = f"{text.rstrip()} {config.append}"
        text = text_preprocessing(text) if config.t5_clean else text
        return {"text": text, "words": len(text.split())}


def optional(config) -> tuple[str, ...]:
    if config.scores in ("none", "undo"):
        return ()
    if config.scores == "camera":
        return ("cmotion",)
    return (
        ("flow", "fps") if config.scores == "fps" else ("aes", "flow", "cmotion") if config.camera else ("aes", "flow")
    )


def clean(text: str) -> str:
    """One tidy paragraph that starts with the subject and ends with a whole sentence."""
    text = MARKS.sub("", LINKS.sub("", text)).replace("\u201c", '"').replace("\u201d", '"')
    text = re.sub(r"\s+", " ", text).strip().strip('"').strip()
    while match := OPENERS.match(text):
        rest = text[match.end() :].lstrip(" ,:")
        if not rest:
            break
        text = rest
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    if text and text[-1] not in ".!?\"'" and re.search(r"[.!?] ", text):  # cut off by the token limit
        text = re.match(r".*[.!?](?= )", text).group()
    text = text[:1].upper() + text[1:]
    return text if not text or text[-1] in ".!?\"'" else text.rstrip(",;: ") + "."


def with_scores(text: str, row: dict, config) -> str:
    phrases = []
    aes, flow, camera = row.get("aes"), row.get("flow"), row.get("cmotion") if config.camera else None
    camera = None if camera == "undetermined" else camera
    if config.scores == "camera":
        said = f"The camera is {CAMERA.get(camera, '')}"
        return text if said.rstrip(".") in text or camera not in CAMERA else joined(text, [said])
    if config.scores == "numbers":
        phrases += [f"aesthetic score: {aes:.1f}"] if aes is not None else []
        phrases += [f"motion score: {flow:.1f}"] if flow is not None else []
        phrases += [f"camera motion: {camera}"] if camera else []
        return joined(text, [", ".join(phrases)] if phrases else [])
    if config.scores == "words":
        phrases += [f"the aesthetic score is {word(aes, AESTHETIC)}"] if aes is not None else []
        phrases += [f"the motion strength is {word(flow, MOTION)}"] if flow is not None else []
        phrases = [p for k, p in enumerate(phrases) if draw(row["id"], k) >= config.drop_share]
        phrases += [f"camera motion: {camera}"] if camera and draw(row["id"], 2) >= config.drop_share else []
        return joined(text, phrases)
    if config.scores == "fps":
        phrases += [f"{round(row['fps'])} FPS"] if row.get("fps") else []
        phrases += [f"{int(flow + 0.5)} motion score"] if flow is not None else []
        return joined(text, [", ".join(phrases)] if phrases else [])
    return text


def joined(text: str, phrases: list[str]) -> str:
    text = text.rstrip()
    if text and text[-1] not in ".!?":
        text += "."
    return " ".join([text, *(phrase + "." for phrase in phrases)]).strip()


def word(value: float, table) -> str:
    return table[1][bisect.bisect_right(table[0], value)]


def draw(name: str, number: int) -> float:
    """A uniform number fixed by the row: a resumed run drops the same phrases."""
    return int.from_bytes(hashlib.sha1(f"{name}:{number}".encode()).digest()[:6], "big") / 2**48


STAGE = CaptionText

if __name__ == "__main__":
    sys.exit(entry.stage(CaptionText))
