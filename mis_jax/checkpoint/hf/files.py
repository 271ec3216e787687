"""The files of a checkpoint beside its weights and config.json, for each of the three formats.

A folder in the Hugging Face format opens in plain transformers, without a manual step and without
code of its own: `AutoTokenizer`, `AutoProcessor` and `AutoModelForImageTextToText`. Its processor
needs torchvision, as transformers' InternVL does everywhere.
"""

from pathlib import Path
from typing import Any

from mis_jax.checkpoint.hf.config import Format
from mis_jax.checkpoint.hf.config_writer import processor_files
from mis_jax.model.config import InternVLConfig
from mis_jax.storage.files import copy_file, write_text
from mis_jax.storage.json_files import read_json, write_json
from mis_jax.tokenizer.files import (
    CONTROL_TOKENS,
    IM_END,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    STANDARD_TOKENS,
    TokenizerFiles,
    content,
    control_token_problems,
    read_tokenizer_files,
)
from mis_jax.tokenizer.tokenizer_json import tokenizer_json

#: By what transformers' InternVLProcessor knows the tokens of an image.
_IMAGE_TOKENS = {
    "start_image_token": IMG_START,
    "end_image_token": IMG_END,
    "context_image_token": IMG_CONTEXT,
}
#: InternVLProcessor also asks for a token that stands for a video in a template and is replaced
#: before the model sees it. transformers' conversion adds `<video>` for it, whose id lies beyond
#: the embedding table. A token the language model came with and InternVL never prompts with does
#: as well: Qwen has one for this very use, InternLM2 has two for calling tools.
_VIDEO_TOKENS = ("<video>", "<|video_pad|>", "<|plugin|>", "<|interpreter|>", "<quad>")

#: InternVL 2.5's turns as transformers' own InternVL checkpoints write them: no system turn unless
#: there is one in the messages, and a line break after every image.
_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- elif part['type'] == 'image' %}
                {{- '<IMG_CONTEXT>\\n' }}
            {%- elif part['type'] == 'video' %}
                {{- 'VIDEO\\n' }}
            {%- else %}
                {{- raise_exception('a part of a message must be text, image or video') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_TEXT_FILES = (".json", ".model", ".txt", ".jinja")
_WEIGHT_FILES = ("*.safetensors", "*.index.json", "*.bin", "*.pt")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
_UNFINISHED = (".*", "INCOMPLETE*")
_DIGESTS = ("digests.json",)  # of a native source's own files
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
#: Written anew for transformers, or (the last two) part of its tokenizer_config.json.
_NOT_FOR_HF = (
    "preprocessor_config.json",
    "processor_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
#: Fields of tokenizer_config.json that are decided here, or say where the source was read from.
_NOT_CARRIED = {
    "tokenizer_class",
    "auto_map",
    "chat_template",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
    "name_or_path",
    "is_local",
    "local_files_only",
}


def write_companions(
    source: Path | None, destination: Path, config: InternVLConfig, kind: Format
) -> None:
    """Write everything beside weights and config.json.

    The native and the original format carry what the source has. What the source does not have
    cannot be made: a `tokenizer.model` out of a tokenizer.json, and upstream's Python code.

    Args:
        source: the checkpoint folder it comes from, if any; one without a tokenizer gives none.
        destination: the folder being written.
        config: the model's.
        kind: the format of the destination.

    Raises:
        ValueError: a damaged tokenizer file, or, for the Hugging Face format, a tokenizer that
            lacks what an InternVL prompt is made of or is not the model's.
    """
    if source is None:
        copied, made_for_hf, files = set(), False, None
    else:
        made_for_hf = _is_hf(source)
        left_out = () if kind != "hf" else _NOT_FOR_HF + (() if made_for_hf else _TEMPLATES)
        copied = _copy(source, destination, left_out, code=kind != "hf")
        files = None if kind == "native" else read_tokenizer_files(source)
    if kind == "hf":
        # Enough for images and, as videos have no file of their own, for them.
        for name, settings in processor_files(config).items():
            write_json(destination / name, settings)
    if files is None:
        return
    path, ends = destination / "generation_config.json", _generation(files, config.text.vocab_size)
    if path.name not in copied:
        write_json(path, ends)
    elif kind == "hf":
        write_json(path, _with_ends(read_json(path), ends))
    if kind == "hf":
        has_template = not copied.isdisjoint(_TEMPLATES)
        _write_hf_tokenizer(files, destination, config, made_for_hf, has_template)


def _copy(source: Path, destination: Path, left_out: tuple[str, ...], *, code: bool) -> set[str]:
    """Copy what is readable, tokenizer, template and other small files, and tell their names.

    With `code` upstream's Python files go along. They are never run here.
    """
    suffixes = (*_TEXT_FILES, ".py") if code else _TEXT_FILES
    patterns = (*_WEIGHT_FILES, *_ADAPTER_FILES, *_UNFINISHED, *_DIGESTS, "config.json", *left_out)
    copied = set()
    for path in sorted(source.iterdir()):
        if path.suffix in suffixes and path.is_file() and not any(map(path.match, patterns)):
            copy_file(path, destination / path.name)
            copied.add(path.name)
    return copied


def _is_hf(source: Path) -> bool:
    """Whether a checkpoint was published in the Hugging Face format, even if native since.

    Its template is InternVL's own. The one of an original folder is that of the language model
    ("You are Qwen ..."), under which answers get worse (OpenGVLab/InternVL issue 1094).
    """
    path = source / "config.json"
    raw = read_json(path) if path.is_file() else {}
    published = (raw.get("source") or {}) if raw.get("format") == "mis_jax" else raw
    return published.get("model_type") == "internvl"


def _generation(files: TokenizerFiles, rows: int) -> dict[str, Any]:
    """generation_config.json: the end of a turn ends it, and any end the tokenizer knows."""
    named = _named_tokens(files, rows)
    ends = dict.fromkeys((IM_END, named.get("eos_token"), "<|endoftext|>"))
    ids = {
        "bos_token_id": files.find(named.get("bos_token")),
        "eos_token_id": [i for i in map(files.find, ends) if i is not None],
        "pad_token_id": files.find(named["pad_token"]),
    }
    return {name: value for name, value in ids.items() if value not in (None, [])}


def _with_ends(own: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """A source's generation_config.json, which may lack the end of a turn: transformers, which
    asks this file alone, would never stop."""
    listed = own.get("eos_token_id")
    listed = [i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)]
    return own | {"eos_token_id": list(dict.fromkeys([*listed, *ours["eos_token_id"]]))}


def _write_hf_tokenizer(
    files: TokenizerFiles,
    destination: Path,
    config: InternVLConfig,
    made_for_hf: bool,
    has_template: bool,
) -> None:
    """tokenizer.json, tokenizer_config.json and the template.

    What a source made for transformers says of its class and its template stays.
    """
    rows = config.text.vocab_size
    problems = control_token_problems(files, config)
    if problems:
        raise ValueError(
            f"{files.folder}: {'; '.join(problems)}; use the tokenizer files of this model's own "
            "checkpoint, added_tokens.json included"
        )
    text = tokenizer_json(files, rows)
    if text is not None:
        write_text(destination / "tokenizer.json", text)
    settings = _tokenizer_settings(files, rows)
    if made_for_hf:
        kept = ["chat_template", "padding_side"]
        kept += [] if files.settings.get("auto_map") else ["tokenizer_class"]
        settings |= {k: files.settings[k] for k in kept if files.settings.get(k)}
    added = read_json(destination / "tokenizer.json")["added_tokens"]
    settings["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in added}
    write_json(destination / "tokenizer_config.json", settings)
    if not has_template and "chat_template" not in settings:
        template = _CHAT_TEMPLATE.replace("VIDEO", settings["extra_special_tokens"]["video_token"])
        if files.bos is not None:
            # transformers adds no second one to a text that starts with it. Servers that encode
            # a rendered template as it is (vLLM) would add none at all.
            template = "{{- bos_token }}\n" + template
        write_text(destination / _TEMPLATES[0], template)


def _tokenizer_settings(files: TokenizerFiles, rows: int) -> dict[str, Any]:
    """tokenizer_config.json that AutoTokenizer opens, and InternVLProcessor after it.

    transformers adds every token that a field names and the vocabulary lacks, under a new id, so
    no field may name one that is not in the embedding table.
    """
    tokens = _named_tokens(files, rows)
    extra, listed = files.settings.get("extra_special_tokens") or {}, []
    if isinstance(extra, list):
        extra, listed = {}, extra
    extra = {k: v for k, v in tokens.items() if k not in STANDARD_TOKENS} | extra
    extra = {k: content(v) for k, v in extra.items() if _in_table(files, v, rows)} | _IMAGE_TOKENS
    extra["video_token"] = _video_token(files, extra.get("video_token"), rows)
    listed = [*(files.settings.get("additional_special_tokens") or []), *listed]
    carried = {
        name: value
        for name, value in files.settings.items()
        if name not in _NOT_CARRIED and not (name.endswith("_token") and content(value))
    }
    return {
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **carried,
        "padding_side": "left",  # what batched generation needs
        # Takes tokenizer.json as it is, in transformers 4 and 5; the classes of a language model
        # build their own pipeline around its vocabulary.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "InternVLProcessor",
        "additional_special_tokens": [content(v) for v in listed if _in_table(files, v, rows)],
        "extra_special_tokens": extra,
        **{name: token for name, token in tokens.items() if name in STANDARD_TOKENS},
    }


def _named_tokens(files: TokenizerFiles, rows: int) -> dict[str, str]:
    """Tokens by the fields that name them, `eos_token` and its like; end and padding always."""
    named = {k: content(v) for k, v in files.settings.items() if k.endswith("_token")}
    tokens = {k: v for k, v in named.items() if v and _in_table(files, v, rows)}
    if files.bos is not None:
        tokens["bos_token"] = files.bos
    tokens.setdefault("eos_token", IM_END)
    tokens.setdefault("pad_token", tokens["eos_token"])  # masked, so that any token will do
    return tokens


def _video_token(files: TokenizerFiles, own: str | None, rows: int) -> str:
    for token in (own, *_VIDEO_TOKENS):
        if token in files.added and token not in CONTROL_TOKENS and _in_table(files, token, rows):
            return token
    raise ValueError(
        f"{files.folder}: transformers' processor needs a token that stands for a video, and the "
        f"tokenizer has none of {', '.join(_VIDEO_TOKENS)}; add one of them to added_tokens.json "
        "under an id of the embedding table that is not in use"
    )


def _in_table(files: TokenizerFiles, token: Any, rows: int) -> bool:
    i = files.find(content(token))
    return i is not None and i < rows
