"""The model that lmms-eval drives, against a stand-in of lmms-eval 0.7.3's surface.

lmms-eval is not installed here. The stand-in has the names and signatures that the wheel has;
`docs/evaluate.md` says how the real program is called.
"""

import abc
import importlib.metadata
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from mis_jax import generate, load

ROOT = Path(__file__).resolve().parent.parent
OURS = "mis_jax.cli.lmms_eval_model"


class _Lmms(abc.ABC):
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass(frozen=True)
class _ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class _TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class _GenerationResult:
    text: str
    token_counts: _TokenCounts | None = None


@dataclass
class _Instance:
    """A request: context, messages of a document, generation_kwargs, document, task, split."""

    args: tuple


@pytest.fixture
def entry(monkeypatch):
    """What the entry point of pyproject.toml gives, and our module with it."""
    stand_in = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": _Lmms},
        "lmms_eval.api.instance": {
            "GenerationResult": _GenerationResult, "TokenCounts": _TokenCounts,
        },
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": _ModelManifest},
    }  # fmt: skip
    for name, content in stand_in.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = project["entry-points"]["lmms_eval.models"].items()
    yield importlib.metadata.EntryPoint(*found, "lmms_eval.models").load()
    sys.modules.pop(OURS, None)


@pytest.fixture
def model_class(entry) -> Any:
    """The class by the path that lmms-eval is given."""
    module, name = entry.chat_class_path.rsplit(".", 1)
    return getattr(sys.modules[module], name)


def test_the_entry_point_names_a_chat_class(entry, model_class):
    assert isinstance(entry, _ModelManifest) and entry.model_id == "mis_jax"
    assert issubclass(model_class, _Lmms) and model_class.is_simple is False
    assert not model_class.__abstractmethods__


def _messages(document):
    pictures = [{"type": "image", "url": picture} for picture in document["pictures"]]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": document["text"]}]}]


def _requests(model, documents, settings):
    """A request for each document, as lmms-eval makes them; `settings` are by document."""
    model.task_dict["drawn"] = {"test": documents}
    return [
        _Instance(("", _messages, dict(settings[place]), place, "drawn", "test"))
        for place in range(len(documents))
    ]


def test_it_answers_as_generate_does(model_class, tiny_checkpoint, tmp_path, monkeypatch):
    """In the order asked, though requests that differ in decoding are answered apart."""
    monkeypatch.setattr(sys.modules[OURS], "_BATCHES_AT_ONCE", 1)
    red, blue = (Image.new("RGB", (90, 60), color) for color in ("red", "blue"))
    blue.save(tmp_path / "blue.png")
    documents = [
        {"pictures": [red, str(tmp_path / "blue.png")], "text": "Which <image> is red?"},
        {"pictures": [red], "text": "Which colour?"},
        {"pictures": [], "text": "Which colour?"},
    ]
    model = model_class(
        pretrained=str(tiny_checkpoint), max_tiles_per_image=2, system="none", batch_size="1"
    )
    greedy = {"until": ["\n\n"], "do_sample": False, "temperature": 0.7, "top_p": 0}
    settings = [greedy | {"max_new_tokens": 6}, greedy | {"max_new_tokens": 3}]
    got = model.generate_until(_requests(model, documents, [settings[k] for k in (0, 1, 0)]))

    alone, processor = load(tiny_checkpoint)
    conversations = [
        [{"role": "user", "content": [*[{"type": "image"}] * len(d["pictures"]), text]}]
        for d in documents
        for text in [{"type": "text", "text": d["text"]}]
    ]
    for place, tokens in enumerate((6, 3, 6)):
        (expected,) = generate(
            alone, processor, [conversations[place]], [documents[place]["pictures"]],
            max_new_tokens=tokens, max_tiles_per_image=2, system="none",
        )  # fmt: skip
        assert got[place].text == expected
        assert got[place].token_counts.output_tokens == tokens
    # 4 tokens a tile, 2 tiles and the thumbnail a picture; <image> in the question is text.
    first, second = (got[place].token_counts.input_tokens for place in (0, 1))
    assert first - second > 4 * 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0, 1, 1024, ())),
        ({"temperature": 0, "do_sample": True, "until": None}, (0, 1, 1024, ())),
        ({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7}, (0.5, 0.9, 7, ())),
        ({"temperature": 0.5, "do_sample": False, "num_beams": 1}, (0, 1, 1024, ())),
        ({"do_sample": True, "top_p": None}, (1, 1, 1024, ())),
        ({"until": ["\n\n", "ASSISTANT:", ""]}, (0, 1, 1024, ("ASSISTANT:",))),
        ({"until": "###"}, (0, 1, 1024, ("###",))),
    ],
)
def test_generation_settings(model_class, settings, expected):
    found = sys.modules[OURS].decoding_of(settings)
    sampling = found.sampling
    assert (sampling.temperature, sampling.top_p, found.max_new_tokens, found.stop) == expected


def test_what_it_cannot_do_is_refused(model_class, tiny_checkpoint):
    ours = sys.modules[OURS]
    with pytest.raises(ValueError, match="--gen_kwargs num_beams=1"):
        ours.decoding_of({"num_beams": 5})
    film = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(ValueError, match="shows video"):
        ours.conversation_of(film)
    with pytest.raises(ValueError, match="--batch_size auto"):
        model_class(pretrained=str(tiny_checkpoint), batch_size="auto")
    with pytest.raises(ValueError, match="JAX_PLATFORMS"):
        model_class(pretrained=str(tiny_checkpoint), device="cuda:0")
    model = object.__new__(model_class)
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
