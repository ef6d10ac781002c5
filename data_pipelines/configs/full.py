r"""curate.py with scores from CLIP and captions from a server: what Open-Sora's data went through.

    python -m data_pipelines.run --config=data_pipelines/configs/full.py --input=VIDEOS --output=WORK \
        --config.aesthetic.clip_path=clip-vit-large-patch14 --config.aesthetic.aes_path=predictor.safetensors \
        --config.match.clip_path=clip-vit-large-patch14 \
        --config.caption.base_url=http://localhost:8000/v1 --config.caption.model=NAME

Thresholds: aesthetic 5 as in the data of 1.1; match 20 is where CLIP ViT-L/14 begins to see the caption in the picture.
The captioner sets the pace; two H100s with a 7B model do about five clips a second.
"""

import importlib.util
from pathlib import Path

import ml_collections

_spec = importlib.util.spec_from_file_location("curate", Path(__file__).with_name("curate.py"))
curate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(curate)


def get_config() -> ml_collections.ConfigDict:
    config = curate.get_config()
    config.steps = (
        *(step for step in config.steps if step != "pack"),
        "aesthetic",
        "beautiful",
        "caption",
        "caption_text",
        "match",
        "matching",
        "pack",
    )
    config.aesthetic = {"clip_path": "", "aes_path": ""}
    config.beautiful = {"stage": "filter", "keep": ("aes >= 5",)}
    config.caption = {"base_url": "http://localhost:8000/v1", "model": "", "frames": 4}
    config.caption_text = {"scores": "none"}
    config.match = {"clip_path": ""}
    config.matching = {"stage": "filter", "keep": ("len(text) > 0", "match >= 20")}
    return config
