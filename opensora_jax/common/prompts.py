"""What users write into prompts, and what text encoders of the 1.x line expect to be given.

Caption cleaning (the recipe published with DeepFloyd IF, applied twice), score suffixes, `|0|…|2|…` prompts that change
along a long video, and a JSON suffix with references. Strings in, strings and numbers out.
"""

import html.entities
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import unquote_plus

from opensora_jax.common.errors import UserError

IMAGE_FPS = 120  # how networks are told that a "video" is a still image

_DOMAINS = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_SYMBOLS = r"#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*"
# In this order. Before the text is repaired by ftfy:
_LINKS = [
    ("<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAINS}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAINS}))", ""),
]
_MARKS = [
    (r"@[\w\d]+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # CJK
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),  # file names
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (f"[{_SYMBOLS}]{{1,}}", " "),
    (r"\s+\.\s+", " "),
]
# After it:
_NOISE = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes such as 1920x1080
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
]
_ENDS = [
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
]


def text_preprocessing(text: str, *, clean: bool = True) -> str:
    """What the 1.x text encoder sees: the caption cleaned twice, or only lower-cased."""
    return clean_caption(clean_caption(text)) if clean else text.lower().strip()


def clean_caption(caption: str) -> str:
    """One pass of the cleaning that T5 was used with: links, tags, CJK, file names, article numbers and noise go."""
    caption = unquote_plus(str(caption)).strip().lower()
    caption = _strip_tags(_replace(caption, _LINKS))
    caption = _replace(caption, _MARKS)
    if len(re.findall(r"[-_]", caption)) > 3:  # this-is-how-some-captions-are-spelt
        caption = re.sub(r"[-_]", " ", caption)
    caption = _replace(basic_clean(caption), _NOISE)
    return _replace(caption, _ENDS).strip()


def basic_clean(text: str) -> str:
    """Repairs broken Unicode and resolves entities, up to two layers of them."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _replace(text: str, table) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(HTMLParser):
    """The text between tags, as a browser would show it: entities resolved, comments, scripts and styles dropped."""

    HIDDEN = ("script", "style", "template")

    def __init__(self):
        super().__init__(convert_charrefs=False)  # an entity without its semicolon then stays as it is
        self.parts, self.hidden = [], 0

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in self.HIDDEN

    def handle_endtag(self, tag):
        self.hidden -= tag in self.HIDDEN and self.hidden > 0

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)

    def handle_entityref(self, name):
        self.handle_data(html.entities.html5.get(f"{name};", f"&{name}"))

    def handle_charref(self, name):
        self.handle_data(html.unescape(f"&#{name};"))

    def unknown_decl(self, data):
        if data.startswith("CDATA["):
            self.handle_data(data[6:])


def _strip_tags(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


# Score suffixes

_AESTHETIC = ((4, "terrible"), (4.5, "very poor"), (5, "poor"), (5.5, "fair"), (6, "good"), (6.5, "very good"))
_MOTION = ((0.5, "very low"), (2, "low"), (5, "fair"), (10, "high"), (20, "very high"))


def append_scores(
    prompt: str,
    *,
    aes: float | str | None = None,
    flow: float | str | None = None,
    camera_motion: str | None = None,
    fps: float | None = None,
    version: str = "1.2",
) -> str:
    """Adds what the networks of 1.2 (numbers), 1.3 (words) or 2.0 (frame rate and motion) were trained to read; what the
    prompt says already stays."""
    if version not in ("1.2", "1.3", "2.0"):
        raise UserError(f"scores of version {version!r} are unknown; choose 1.2, 1.3 or 2.0")
    if version == "2.0":
        prompt = prompt.strip()
        prompt += "" if prompt.endswith(".") else "."
        for words, value in (("FPS.", fps), ("motion score.", flow)):
            said = f"{value:g} {words}" if isinstance(value, float) else f"{value} {words}"
            prompt += "" if value is None or prompt.endswith(said) else f" {said}"
        return prompt
    if version == "1.3":
        aes, flow = _word(aes, _AESTHETIC, "excellent"), _word(flow, _MOTION, "extremely high")
        parts = [("The aesthetic score is", aes), ("The motion strength is", flow)]
    else:
        parts = [("aesthetic score:", _one_decimal(aes)), ("motion score:", _one_decimal(flow))]
    for words, value in [*parts, ("camera motion:", camera_motion)]:
        if value is not None and words not in prompt:
            prompt = f"{prompt} {words} {value}."
    return prompt


def _word(value, scale, top: str) -> str | None:
    """A score as a word; a word stays as it is."""
    number = _number(value)
    if number is None:
        return value
    return next((word for limit, word in scale if number < limit), top)


def _one_decimal(value) -> str | None:
    if value is None:
        return None
    number = _number(value)
    if number is None:
        raise UserError(f"scores of 1.2 are numbers, got {value!r} (words belong to 1.3)")
    return f"{number:.1f}"


def _number(value) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


# Prompts that change along a long video


def split_prompt(prompt: str) -> tuple[list[str], list[int] | None]:
    """`|0|a day|2|a night` → (["a day", "a night"], [0, 2]); an ordinary prompt → ([prompt], None)."""
    segments = _segments(prompt)
    if segments is None:
        return [prompt], None
    return [text.strip() for _, text in segments], [loop for loop, _ in segments]


def merge_prompt(texts: Sequence[str], loops: Sequence[int] | None) -> str:
    """The inverse of `split_prompt`."""
    return texts[0] if loops is None else "".join(f"|{loop}|{text}" for loop, text in zip(loops, texts))


def prompt_for_loop(prompt: str, loop: int) -> str:
    """What a prompt says in the given loop of a long video."""
    segments = _segments(prompt)
    if segments is None:
        return prompt
    return [text for start, text in segments if start <= loop][-1]


def prompts_per_loop(prompt: str, num_loops: int, *, clean: bool = True) -> list[str]:
    """1.1's form: the cleaned text of every loop; a segment that begins beyond the last loop is an error."""
    segments = _segments(prompt) or [(0, prompt)]
    if segments[-1][0] > num_loops:
        raise UserError(f"prompt {prompt!r} speaks of loop {segments[-1][0]}, but there are {num_loops} loops")
    return [text_preprocessing(prompt_for_loop(prompt, loop), clean=clean) for loop in range(num_loops)]


def _segments(prompt: str) -> list[tuple[int, str]] | None:
    if not prompt.startswith("|0|"):
        return None
    parts = prompt.split("|")[1:]
    try:
        segments = [(int(loop), text) for loop, text in zip(parts[::2], parts[1::2], strict=True)]
    except ValueError:
        raise UserError(
            f"prompt {prompt!r}: expected |0|text|LOOP|text…, with whole numbers between the bars"
        ) from None
    if any(after <= before for (before, _), (after, _) in pairwise(segments)):
        raise UserError(f"prompt {prompt!r}: loop numbers must rise")
    return segments


# References: a JSON suffix (the grammar of mask_strategy is in diffusion/mask_strategy.py)


def split_json(prompt: str, *, opening: str = "{") -> tuple[str, dict]:
    """`text{"reference_path": …, "mask_strategy": …}` → (text, the object). 1.1 also takes a `[` for the beginning."""
    parts = re.split(f"(?=[{re.escape(opening)}])", prompt)
    if len(parts) == 1:
        return prompt, {}
    if len(parts) > 2:
        raise UserError(f"prompt {prompt!r} holds more than one JSON object")
    try:
        extra = json.loads(parts[1])
    except ValueError as error:
        raise UserError(f"prompt {prompt!r}: its JSON suffix cannot be read: {error}") from None
    if not isinstance(extra, dict):
        raise UserError(f"prompt {prompt!r}: its suffix must be a JSON object")
    for key in extra:
        if key not in ("reference_path", "mask_strategy"):
            raise UserError(
                f"prompt {prompt!r}: unknown key {key!r} in its JSON suffix; reference_path or mask_strategy"
            )
    return parts[0], extra


# Names and sizes


def pixel_frames(latent_frames: int) -> int:
    """Frames that latent frames of 1.2's VAE stand for, which come in blocks of five for seventeen."""
    if latent_frames % 5:
        raise UserError(f"{latent_frames} latent frames are no whole number of blocks of 5 (17 frames each)")
    return latent_frames // 5 * 17


def save_name(
    prompt: str = "",
    *,
    name: str | None = None,
    index: int | None = None,
    sample: int | None = None,
    num_samples: int = 1,
    prompt_as_name: bool = False,
) -> str:
    """The stem of an output file: sample_0003, sample_0003-1, or the beginning of the prompt."""
    if prompt_as_name:
        stem = (name or "") + prompt.replace("/", "_")[:50]
    else:
        stem = f"{name or 'sample'}" + ("" if index is None else f"_{index:04d}")
    return stem if num_samples == 1 else f"{stem}-{sample}"


def size_conditions(
    size: tuple[int, int], num_frames: int, fps: float | None, *, batch: int = 1, kind: str = "stdit"
) -> dict:
    """Lists of what a network is told of a video's size: height, width, num_frames, ar, fps; PixArt-MS: ar and hw."""
    height, width = size
    if kind == "pixart_ms":
        return {"ar": [[height / width]] * batch, "hw": [[height, width]] * batch}
    told = {"height": height, "width": width, "num_frames": num_frames, "ar": height / width}
    told["fps"] = fps if num_frames > 1 else IMAGE_FPS
    return {key: [value] * batch for key, value in told.items()}
