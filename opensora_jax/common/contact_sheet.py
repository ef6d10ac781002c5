"""Videos made visible: several as one picture, a row each with its caption above; small ones enlarged."""

import numpy as np


def contact_sheet(videos, captions=None, *, columns: int = 6, height: int = 96, titles=None) -> np.ndarray:
    """videos: uint8 [T, H, W, 3] each → one uint8 image."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    margin, gap, label = 10, 4, 20 if captions else 0
    width = max(round(video.shape[2] * height / video.shape[1]) for video in videos)
    shown = min(columns, max(len(video) for video in videos))
    sheet_width = 2 * margin + shown * width + (shown - 1) * gap
    sheet_height = 2 * margin + len(videos) * (height + label + gap)
    sheet = Image.new("RGB", (sheet_width, sheet_height), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for row, video in enumerate(videos):
        top = margin + row * (height + label + gap)
        if captions:
            draw.text(
                (margin, top + 2),
                _fit(draw, captions[row], font, sheet_width - 2 * margin),
                fill=(40, 40, 40),
                font=font,
            )
        picks = np.unique(np.linspace(0, len(video) - 1, shown).round().astype(int))
        for column, index in enumerate(picks):
            frame = Image.fromarray(video[index])
            frame = frame.resize((round(frame.width * height / frame.height), height), Image.Resampling.LANCZOS)
            sheet.paste(frame, (margin + column * (width + gap), top + label))
    return np.asarray(sheet)


def enlarged(video: np.ndarray, height: int = 192) -> np.ndarray:
    """Frames repeated pixel by pixel until they are about this high; larger ones as they are."""
    factor = max(1, height // video.shape[1])
    return video.repeat(factor, axis=1).repeat(factor, axis=2)


def save_png(path, image: np.ndarray) -> None:
    """Local or remote path."""
    import io

    from etils import epath
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    epath.Path(path).write_bytes(buffer.getvalue())


def _fit(draw, text: str, font, width: int) -> str:
    while draw.textlength(text, font=font) > width and len(text) > 4:
        text = text[:-4].rstrip() + "…"
    return text
