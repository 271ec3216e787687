"""Exports opened by plain transformers: tokenizer, processor, template, model."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from published_tokenizers import LAYOUTS, QWEN_TEMPLATE, Published, added_entry, write_json
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ImageProcessingMixin,
    ProcessorMixin,
    processing_utils,
)

from mis_jax.checkpoint.hf.config_writer import native_json, published_json
from mis_jax.checkpoint.hf.files import write_companions
from mis_jax.data.processor import Processor
from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig
from mis_jax.tokenizer.files import CONTROL_TOKENS, tokenizer_problems
from mis_jax.tokenizer.tokenizer import load_tokenizer

pytest.importorskip("torch")  # transformers' image processing returns its tensors

TEXT = "What is  this?\n\n你好 🎉 \t ☕ <box> it's  "


@pytest.fixture(scope="module")
def published() -> Published:
    return Published()


@pytest.fixture(autouse=True)
def _videos_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """InternVLProcessor opens only beside torchvision, for its videos: stand in for that part."""
    if importlib.util.find_spec("torchvision"):
        return

    class NoVideos(ImageProcessingMixin):
        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            return cls()

    mapping = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING
    known = {name: mapping[name] for name in ("tokenizer", "image_processor")}
    monkeypatch.setattr(
        processing_utils, "MODALITY_TO_AUTOPROCESSOR_MAPPING", known | {"video_processor": NoVideos}
    )
    check = ProcessorMixin.check_argument_for_proper_class
    monkeypatch.setattr(
        ProcessorMixin,
        "check_argument_for_proper_class",
        lambda self, name, value: isinstance(value, NoVideos) or check(self, name, value),
    )


def model_config(folder: Path, **changes: Any) -> InternVLConfig:
    """A tiny network for a tokenizer: 4 tokens a tile."""
    tokenizer = load_tokenizer(folder)
    text = dict(
        kind="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=6, mlp_size=40,
    )  # fmt: skip
    return InternVLConfig(
        vision=VisionConfig(hidden_size=16, num_layers=2, num_heads=2, mlp_size=24, image_size=56),
        text=TextConfig(**(text | changes)),
        image_token_id=tokenizer.img_context_id,
        max_tiles=4,
    )


def export(source: Path, config: InternVLConfig, folder: Path, kind: str = "hf") -> Path:
    folder.mkdir()
    write_companions(source, folder, config, kind)
    raw = (
        json.loads((source / "config.json").read_text())
        if (source / "config.json").exists()
        else {}
    )
    if kind == "native":
        content = native_json(config, raw)
    else:
        content = published_json(config, kind, raw, "float32")
    write_json(folder / "config.json", content)
    return folder


def mark(folder: Path, model_type: str) -> None:
    """Say in config.json which layout a folder is of."""
    write_json(folder / "config.json", {"model_type": model_type})


def picture(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(width).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def conversation(images: list[Any]) -> list[dict[str, Any]]:
    shown = [{"type": "image", **({"image": i} if i else {})} for i in images]
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": TEXT}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A  bottle. "}]},
        {"role": "user", "content": "Sure?"},
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_opens_every_layout(layout, published, tmp_path):
    source = published(layout, tmp_path / "source")
    mark(source, "internvl_chat")
    config = model_config(source)
    out = export(source, config, tmp_path / "hf")
    own, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(source)
    assert len(own) == config.text.vocab_size  # transformers added no token of its own
    assert {token: own.convert_tokens_to_ids(token) for token in ours.added} == dict(ours.added)
    start = [] if ours.bos_id is None else [ours.bos_id]
    for text in (TEXT, " lead", "trail ", "\n\n", "你好，世界！", "        "):
        assert own.encode(text) == start + ours.encode_text(text)
        assert own.decode(ours.encode_text(text)) == ours.decode(ours.encode_text(text), False)
    ids = [*start, ours.im_start_id, ours.im_end_id, ours.img_context_id]
    assert own.decode(ids, skip_special_tokens=True) == ""
    assert own.model_input_names == ["input_ids", "attention_mask"]
    assert own.padding_side == "left"
    listed = json.loads((out / "tokenizer_config.json").read_text("utf-8"))["added_tokens_decoder"]
    assert {entry["content"]: int(i) for i, entry in listed.items()} == dict(ours.added)

    again = load_tokenizer(out)
    for name in ("added", "special", "bos_id", "eos_id", "pad_id", "stop_ids", "vocab_size"):
        assert getattr(again, name) == getattr(ours, name), name
    assert again.encode_text(TEXT) == ours.encode_text(TEXT)
    assert tokenizer_problems(out, config) == []
    # a second export changes nothing
    twice = export(out, config, tmp_path / "twice")
    for path in out.glob("*.json"):
        assert json.loads((twice / path.name).read_text("utf-8")) == json.loads(
            path.read_text("utf-8")
        )
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (twice / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [[], [(112, 56)], [(56, 56), (60, 170)]], ids=len)
def test_processor_gives_our_ids_and_pixels(layout, sizes, published, tmp_path):
    source = published(layout, tmp_path / "source")
    config = model_config(source)
    processor = AutoProcessor.from_pretrained(export(source, config, tmp_path / "hf"))
    assert type(processor).__name__ == "InternVLProcessor"
    pictures = [picture(*size) for size in sizes]
    theirs = processor.apply_chat_template(
        conversation(pictures),
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    ours = Processor.from_folder(source, config).example(
        conversation([None] * len(sizes)), pictures, system="none", max_tiles_per_image=4
    )
    # transformers takes a typed `<box>` for the token, as we do, and no other token is typed
    np.testing.assert_array_equal(theirs["input_ids"][0], ours.input_ids)
    assert set(theirs) == {"input_ids", "attention_mask"} | ({"pixel_values"} if sizes else set())
    if sizes:
        mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        pixels = (ours.tiles.astype(np.float32) / 255 - mean) / std
        difference = np.abs(theirs["pixel_values"].numpy() - pixels.transpose(0, 3, 1, 2))
        assert difference.max() < 0.05  # a step or two of 1/255: torchvision resizes otherwise


@pytest.mark.parametrize("layout", ["internlm2", "qwen3 vocab"])
def test_model_reads_what_the_processor_gives(layout, published, tmp_path):
    source = published(layout, tmp_path / "source")
    config = model_config(source)
    out = export(source, config, tmp_path / "hf")
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(out))
    model.save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(out / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(out)
    tokenizer = load_tokenizer(source)
    assert set(model.generation_config.eos_token_id) == set(tokenizer.stop_ids)
    assert model.generation_config.pad_token_id == tokenizer.pad_id
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor.apply_chat_template(
        [conversation([picture(112, 56)]), [{"role": "user", "content": "Hi"}]],
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    assert inputs["attention_mask"][:, -1].all()  # padded on the left
    answers = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert answers.shape[1] > inputs["input_ids"].shape[1]


def test_one_bos_however_the_prompt_is_made(published, tmp_path):
    source = published("internlm2", tmp_path / "source")
    out = export(source, model_config(source), tmp_path / "hf")
    processor, tokenizer = AutoProcessor.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    messages = conversation([])
    options = dict(tokenize=True, add_generation_prompt=True, return_dict=True)
    ids = processor.apply_chat_template(messages, **options)["input_ids"][0]
    assert tokenizer.apply_chat_template(messages, **options)["input_ids"] == ids
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.startswith("<s><|im_start|>user\n")
    assert text.endswith("Sure?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(text, add_special_tokens=False) == ids  # as vLLM does
    assert ids.count(1) == 1
    # a system turn is the caller's to give
    system = [{"role": "system", "content": "Be careful."}, {"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(system) == (
        "<s><|im_start|>system\nBe careful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    with pytest.raises(Exception, match="must be text, image or video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "smell"}]}])


def test_template_of_the_language_model_is_not_carried(published, tmp_path):
    source = published("qwen2.5 json", tmp_path / "source")
    mark(source, "internvl_chat")
    (source / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    write_json(source / "chat_template.json", {"chat_template": QWEN_TEMPLATE})
    config = model_config(source)
    native = export(source, config, tmp_path / "native", "native")
    for number, folder in enumerate((source, native)):  # made native in between, it is as wrong
        out = export(folder, config, tmp_path / f"hf{number}")
        for opened in (AutoTokenizer.from_pretrained(out), AutoProcessor.from_pretrained(out)):
            text = opened.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
            assert text == "<|im_start|>user\nHi<|im_end|>\n"
        assert not any("You are Qwen" in path.read_text() for path in out.iterdir())


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_what_was_made_for_transformers_keeps_template_and_class(place, published, tmp_path):
    source = published("llama json", tmp_path / "source")
    mark(source, "internvl")
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    template = "{{ 'mine: ' + messages[0]['content'] }}"
    if place == path.name:
        settings["chat_template"] = template
    else:
        (source / place).write_text(template)
    write_json(path, settings | {"padding_side": "right"})
    config = model_config(source)
    native = export(source, config, tmp_path / "native", "native")
    for number, folder in enumerate((source, native)):
        out = export(folder, config, tmp_path / f"hf{number}")
        opened = AutoTokenizer.from_pretrained(out)
        assert opened.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
            "mine: Hi"
        )
        assert type(opened).__name__ == "LlamaTokenizer"
        assert opened.padding_side == "right"
        assert len(opened) == config.text.vocab_size


def test_no_token_beyond_the_embedding(published, tmp_path):
    """transformers' own conversion adds `<video>` behind the last row."""
    source = published("llama json", tmp_path / "source")
    mark(source, "internvl")
    config = model_config(source)
    rows = config.text.vocab_size
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"].append(added_entry(rows, "<video>"))
    write_json(source / "tokenizer.json", content)
    path = source / "tokenizer_config.json"
    named = {"video_token": "<video>", "context_image_token": "<IMG_CONTEXT>"}
    settings = json.loads(path.read_text()) | named
    settings |= {"additional_special_tokens": ["<ref>", "<video>"], "model_max_length": 8192}
    write_json(path, settings | {"extra_special_tokens": named})
    assert tokenizer_problems(source, config) == [
        f"tokenizer has {rows + 1} ids, embedding {rows} rows"
    ]
    out = export(source, config, tmp_path / "hf")
    assert tokenizer_problems(out, config) == []
    processor = AutoProcessor.from_pretrained(out)
    assert len(processor.tokenizer) == rows
    assert processor.tokenizer.model_max_length == 8192
    assert processor.video_token == "<|plugin|>"
    assert max(processor(text=["a <video> b"])["input_ids"][0]) < rows
    # transformers would add any token that the vocabulary lacks; an image is no video
    settings |= {"sep_token": "<sep>", "video_token": "<IMG_CONTEXT>", "x_token": "<x>"}
    named = {"new_token": "<new>", "box_token": "<box>"}
    write_json(path, settings | {"extra_special_tokens": named})
    processor = AutoProcessor.from_pretrained(export(source, config, tmp_path / "hf1"))
    assert len(processor.tokenizer) == rows
    assert processor.tokenizer.box_token == "<box>"
    assert processor.video_token == "<|plugin|>"
    write_json(path, settings | {"extra_special_tokens": ["<new>", "<box>"]})
    own = AutoTokenizer.from_pretrained(export(source, config, tmp_path / "hf2"))
    assert len(own) == rows
    assert {"<ref>", "<box>"} <= set(own.all_special_tokens)


def test_settings_of_remote_code_are_not_carried(published, tmp_path):
    source = published("internlm2", tmp_path / "source")
    path = source / "tokenizer_config.json"
    remote = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    settings = {"auto_map": remote, "tokenizer_class": "InternLM2Tokenizer"}
    settings |= {"model_max_length": 8192, "chat_template": "{{ 'InternLM2' }}"}
    write_json(path, json.loads(path.read_text()) | settings)
    (source / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    write_json(source / "added_tokens.json", {"<img>": load_tokenizer(source).img_start_id})
    out = export(source, model_config(source), tmp_path / "hf")
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert "auto_map" not in written
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    # the default in transformers 5, not in 4
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert written["model_max_length"] == 8192
    assert {path.name for path in out.iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", "preprocessor_config.json",
        "processor_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip


def test_what_is_copied(published, tmp_path):
    source = published("qwen2.5 vocab", tmp_path / "source")
    mark(source, "internvl_chat")
    kept = ["generation_config.json", "preprocessor_config.json", "special_tokens_map.json"]
    for name in [*kept, "adapter_config.json", ".hidden.json", "model.safetensors.index.json"]:
        write_json(source / name, {})
    write_json(source / "INCOMPLETE.json", {})
    for name in ("modeling_internvl_chat.py", "model.safetensors", "adapter_model.bin", "x.md"):
        (source / name).write_text("")
    config = model_config(source)
    carried = {"vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", *kept}
    for kind in ("native", "internvl"):
        out = export(source, config, tmp_path / kind, kind)
        names = {path.name for path in out.iterdir()}
        assert names == carried | {"config.json", "modeling_internvl_chat.py"}
        assert all((out / n).read_bytes() == (source / n).read_bytes() for n in carried)
    out = export(source, config, tmp_path / "hf")
    assert {path.suffix for path in out.iterdir()} == {".json", ".txt", ".jinja"}
    assert json.loads((out / "preprocessor_config.json").read_text())["max_patches"] == 4


def test_generation_settings_where_there_are_none(published, tmp_path):
    for kind in ("internvl", "hf"):
        source = published("internlm2", tmp_path / f"{kind}.i")
        tokenizer = load_tokenizer(source)
        out = export(source, model_config(source), tmp_path / f"{kind}.io", kind)
        assert json.loads((out / "generation_config.json").read_text()) == {
            "bos_token_id": 1, "eos_token_id": [tokenizer.im_end_id, 2], "pad_token_id": 2,
        }  # fmt: skip
        source = published("qwen3 bare", tmp_path / f"{kind}.q")
        tokenizer = load_tokenizer(source)
        out = export(source, model_config(source), tmp_path / f"{kind}.qo", kind)
        assert json.loads((out / "generation_config.json").read_text()) == {
            "eos_token_id": [tokenizer.im_end_id, tokenizer.pad_id],
            "pad_token_id": tokenizer.pad_id,
        }
    source = published("internlm2", tmp_path / "n")
    im_end = load_tokenizer(source).im_end_id
    export(source, model_config(source), tmp_path / "no", "native")
    assert not (tmp_path / "no" / "generation_config.json").exists()
    for own, ends in ((2, [2, im_end]), ([7, im_end], [7, im_end, 2]), (None, [im_end, 2])):
        write_json(source / "generation_config.json", {"eos_token_id": own, "top_p": 0.5})
        out = export(source, model_config(source), tmp_path / f"hf of {own}")
        written = json.loads((out / "generation_config.json").read_text())
        assert written == {"eos_token_id": ends, "top_p": 0.5}


def test_without_a_tokenizer(published, tmp_path):
    config = model_config(published("internlm2", tmp_path / "t"))
    (tmp_path / "bare").mkdir()
    write_json(tmp_path / "bare" / "added_tokens.json", {"<IMG_CONTEXT>": 5})
    for number, source in enumerate((None, tmp_path / "bare")):
        out = tmp_path / str(number)
        out.mkdir()
        write_companions(source, out, config, "hf")
        assert {path.name for path in out.iterdir()} == {
            "preprocessor_config.json",
            "processor_config.json",
        }


def test_problems_of_a_tokenizer_are_told(published, tmp_path):
    source = published("qwen2.5 json", tmp_path / "source")
    config = model_config(source)
    assert tokenizer_problems(source, config) == []
    tokenizer = load_tokenizer(source)
    rows = config.text.vocab_size
    small = model_config(source, vocab_size=tokenizer.img_end_id)
    assert tokenizer_problems(source, small) == [
        f"tokenizer has {rows} ids, embedding {tokenizer.img_end_id} rows",
        f"token </img> has id {tokenizer.img_end_id}, embedding {tokenizer.img_end_id} rows",
        f"token <IMG_CONTEXT> has id {tokenizer.img_context_id}, embedding "
        f"{tokenizer.img_end_id} rows",
    ]
    with pytest.raises(ValueError, match=r"source: token </img> has id .*tokenizer files of this"):
        export(source, small, tmp_path / "small")

    path = source / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    kept = [entry for entry in content["added_tokens"] if entry["content"] not in CONTROL_TOKENS]
    write_json(path, content | {"added_tokens": kept})
    config_path = source / "tokenizer_config.json"
    settings = json.loads(config_path.read_text())
    del settings["added_tokens_decoder"]
    write_json(config_path, settings)
    write_json(source / "added_tokens.json", {"<IMG_CONTEXT>": 3, "<img>": tokenizer.img_start_id})
    assert tokenizer_problems(source, config) == [
        "tokenizer has no token <|im_start|>",
        "tokenizer has no token <|im_end|>",
        "tokenizer has no token </img>",
        f"<IMG_CONTEXT> has id 3 in the tokenizer and {tokenizer.img_context_id} in config.json",
    ]
    path.write_text("{")
    assert [line.split(": ")[1] for line in tokenizer_problems(source, config)] == [
        "not valid JSON (Expecting property name enclosed in double quotes"
    ]
    assert tokenizer_problems(tmp_path, config)[0].startswith("no tokenizer (tokenizer.json, ")


def test_a_video_needs_a_token_that_prompts_do_not_use(published, tmp_path):
    source = published("qwen3 bare", tmp_path / "source")
    path = source / "added_tokens.json"
    table = json.loads(path.read_text())
    config = model_config(source)
    out = export(source, config, tmp_path / "hf")
    assert AutoProcessor.from_pretrained(out).video_token == "<|video_pad|>"
    renamed = {"<|video_pad|>": "<|a|>", "<quad>": "<|b|>"}
    write_json(path, {renamed.get(token, token): i for token, i in table.items()})
    with pytest.raises(ValueError, match=r"source: .*stands for a video.*add one of them"):
        export(source, config, tmp_path / "none")
