"""`caption_local` end to end on a tiny vision-language model with random weights: it needs torch, as its users do."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import pipeline, synthetic
from data_pipelines.decode import frames_at, spread
from data_pipelines.pipeline import Options
from tests.data_pipelines.steps import step

pytestmark = pytest.mark.parity
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "USER:",
    "ASSISTANT:",
    *["a", "the", "red", "hill", "cat", "walks", "over", "under"],
]
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llava of a few thousand parameters, saved as the Hub has them."""
    torch = pytest.importorskip("torch")
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llava")
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = hf.LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = hf.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=4, vision_feature_select_strategy="default"
        )
    )
    with torch.no_grad():
        for value in made.parameters():
            value.mul_(12)  # so that pictures sway the words
    made.generation_config.suppress_tokens = list(range(7))  # words only
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    synthetic.plain(str(folder), 3)
    paths = [*(str(p) for p in sorted(folder.iterdir())), str(folder / "gone.mp4")]
    return pa.table({"id": list("abcd"), "path": paths, "num_frames": [24] * 4})


def captioner(model, **options):
    return step(
        "caption_local", model=str(model), device="cpu", **({"frames": 2, "side": 48, "max_tokens": 6} | options)
    )


def test_captions_are_the_models_own_words(model, clips, tmp_path):
    import torch
    import transformers as hf

    options = Options(str(tmp_path), quiet=True)
    made = pipeline.run([captioner(model, prompt="the red cat")], clips, options).to_pylist()
    rejected = pq.read_table(tmp_path / "rejected" / "00_caption_local.parquet").to_pylist()
    assert [row["id"] for row in rejected] == ["d"] and "gone.mp4" in rejected[0]["error"]
    processor = hf.AutoProcessor.from_pretrained(model)
    network = hf.AutoModelForImageTextToText.from_pretrained(model).eval()
    for row in made:
        pictures = [Image.fromarray(image) for image in frames_at(row["path"], spread(24, 2), longer=48)]
        asked = "USER: <image> <image> the red cat ASSISTANT:"
        inputs = processor(images=pictures, text=asked, return_tensors="pt")
        with torch.no_grad():
            tokens = network.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        words = processor.decode(tokens, skip_special_tokens=True).strip()
        assert row["text"] == words and row["caption_model"] == str(model)
    assert any(row["text"] for row in made) and set(" ".join(r["text"] for r in made).split()) <= set(WORDS)
