"""A small guard checkpoint: Llama 3 in all but size, with a chat template of our own words.

Written without torch, in the form of the published folders: config.json with `rope_scaling`,
safetensors, tokenizer.json, tokenizer_config.json.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CONTROL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
)  # fmt: skip
#: Llama 3's cut of text before BPE, a constant of its published vocabulary.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HEADER = "<|start_header_id|>{}<|end_header_id|>"
_POLICY = (
    "{% set rules = categories if categories is defined else {'S1': 'Rude words.'} %}"
    "{% for name in rules %}\n{{ name }}: {{ rules[name] }}\n{% endfor %}\n"
)
_END = "Is the last turn fine?<|eot_id|>" + _HEADER.format("assistant")
#: Texts as they are, trimmed; the guard makes the empty line after its header itself.
TRIMMING = (
    "{{ bos_token }}" + _HEADER.format("user") + "\n\nRead this.\n\n" + _POLICY
    + "{% for turn in messages %}\n{{ turn['role'] | title }}: {{ turn['content'] | trim }}\n\n"
    + "{% endfor %}\n" + _END
)  # fmt: skip
#: Texts as lists of parts, untouched; the empty line is the template's.
OF_PARTS = (
    "<|begin_of_text|>" + _HEADER.format("user") + "\n\nRead this.\n\n"
    + "{% for turn in messages %}\n{% for part in turn['content'] | selectattr('type', 'equalto',"
    + " 'text') %}\n{{ turn['role'] }}>{{ part['text'] }}<\n{% endfor %}\n{% endfor %}\n"
    + _END + "{{ '\\n\\n' }}"
)  # fmt: skip
EXCHANGES = [
    ("How do I mix paint?", "Stir it slowly. Then wait."),
    ("  Where is the lamp?\n", "Behind the chair, I think;\n\nlook there.\n"),
    ("Why?", ""),
    ("Tell me a long story. " * 9, "There was a kettle. " * 12),
]


@functools.cache
def _trained() -> str:
    words = "safe unsafe S1 S2 S12 user assistant Read this. Is the last turn fine? Rude words."
    lines = [words, "safe\n\nsafe\n", "unsafe\nS1,S2\n", "User: Where is it?\n\nAssistant: Here."]
    result = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    result.train_from_iterator(lines * 20, trainer)
    result.add_special_tokens(list(CONTROL))
    bos = (CONTROL[0], result.token_to_id(CONTROL[0]))
    template = processors.TemplateProcessing(single=[CONTROL[0], "$A"], special_tokens=[bos])
    result.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return result.to_str()


def write_tokenizer(folder: Path, template: str = TRIMMING) -> tokenizers.Tokenizer:
    """The tokenizer files of a guard; gives the tokenizer as the library has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_trained(), encoding="utf-8")
    settings = {
        "bos_token": CONTROL[0],
        "eos_token": CONTROL[-1],
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizers.Tokenizer.from_str(_trained())


def config_json(vocab_size: int, *, tied: bool = False, **changes: Any) -> dict[str, Any]:
    """Of three layers; some rotations are kept, some blended and some slowed."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "factor": 32.0 if tied else 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "attention_bias": False,
        "mlp_bias": False,
    } | changes


def random_tensors(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every tensor of a LlamaForCausalLM, norms included, random."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (config["vocab_size"], width), "model.norm": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = shapes["model.embed_tokens"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
            shapes[f"{layer}.self_attn.{name}_proj"] = (rows, width)
        shapes[f"{layer}.mlp.gate_proj"] = shapes[f"{layer}.mlp.up_proj"] = (wide, width)
        shapes[f"{layer}.mlp.down_proj"] = (width, wide)
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = (width,)
    result = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        scaled = values * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.2 * values
        result[f"{name}.weight"] = scaled.astype(np.float32)
    return result


def write_guard(
    folder: Path,
    rng: np.random.Generator,
    *,
    tied: bool = False,
    template: str = TRIMMING,
    shards: int = 1,
) -> Path:
    """A whole random guard checkpoint."""
    vocab = write_tokenizer(folder, template).get_vocab_size()
    config = config_json(vocab, tied=tied)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tensors(folder, random_tensors(config, rng), shards)
    return folder


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """model.safetensors, or shards with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    places = {}
    for i in range(shards):
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
