"""Captions from a local vision-language model through transformers (needs torch: pip install "opensora-jax[convert]").

    python -m data_pipelines.caption_local --input=WORK/table.parquet --output=DIR --model=/path/or/hub-id

Any model that AutoModelForImageTextToText loads and whose processor has a chat template. Frames go in as images.
"""

import dataclasses
import sys
import threading

import pyarrow as pa

from data_pipelines import entry
from data_pipelines.caption_prompts import PROMPTS
from data_pipelines.decode import frames_at, spread
from data_pipelines.stage import Resources, Stage
from opensora_jax.common.errors import UserError


class CaptionLocal(Stage):
    columns_in = ("path", "num_frames")
    columns_out = {"text": pa.string(), "caption_model": pa.string()}
    resources = Resources(num_cpus=2, max_workers=1)
    batch_size = 8
    pace = ("device", "num_gpus")

    @dataclasses.dataclass(frozen=True)
    class Config:
        model: str = ""  # a folder or a repository
        prompt: str = "video"  # a name from caption_prompts.py, or the words themselves
        frames: int = 4  # shown of each clip
        side: int = 336  # longer side of the frames
        max_tokens: int = 200  # of a caption
        device: str = "auto"  # cpu, cuda, cuda:1 …
        dtype: str = "auto"  # bfloat16, float32 …
        num_gpus: float = 0.0  # of a worker, under Ray

    @classmethod
    def check(cls, config):
        if not config.model:
            raise UserError(
                "caption_local has no weights: give --model=FOLDER or a hub id (config: caption_local.model)"
            )
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise UserError('caption_local needs torch: pip install "opensora-jax[convert]"') from error

    def __init__(self, config):
        super().__init__(config)
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(config.model)
            self.model = AutoModelForImageTextToText.from_pretrained(
                config.model, dtype=config.dtype, device_map=None if config.device == "cpu" else config.device
            ).eval()
        except (OSError, ValueError) as error:
            raise UserError(
                f"caption_local.model {config.model} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        self.lock = threading.Lock()

    def row(self, row):
        import torch
        from PIL import Image

        config = self.config
        images = frames_at(row["path"], spread(row["num_frames"], config.frames), longer=config.side)
        content = [{"type": "image", "image": Image.fromarray(image)} for image in images]
        content.append({"type": "text", "text": PROMPTS.get(config.prompt, config.prompt)})
        with self.lock, torch.no_grad():
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.model.device)
            made = self.model.generate(**inputs, max_new_tokens=config.max_tokens, do_sample=False)
        text = self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
        if not text:
            raise ValueError("the model answered nothing")
        return {"text": text, "caption_model": config.model}


STAGE = CaptionLocal

if __name__ == "__main__":
    sys.exit(entry.stage(CaptionLocal))
