"""Write the small world as files in the published formats: MIS training and test, InternVL jsonl.

All pictures are 112 x 112 RGB PNG files; every picture file belongs to one row of one set (the
two control sets of labels share the pictures and questions of `mini_train.json`).
"""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.mini import world
from mis_jax.mini.icons import draw_scene
from mis_jax.mini.language import REFUSAL
from mis_jax.storage.files import make_folder, write_text
from mis_jax.storage.folders import finished_folder

Row = dict[str, Any]

TRAIN_ROWS = 2400
EASY_ROWS, HARD_ROWS, BENIGN_ROWS, RECOGNITION_ROWS = 100, 200, 200, 400
GENERAL_ROWS = 600
_CATEGORY = "Household"


def _generator(seed: int, set_number: int) -> np.random.Generator:
    """Each set has its own stream, so that a change in one leaves the others' bytes alone."""
    return np.random.default_rng([seed, set_number])


def _draw(
    folder: Path, where: str, objects: tuple[str, ...], rng: np.random.Generator
) -> list[str]:
    """Draw the objects into folder/where/object<k>.png; returns the paths relative to folder."""
    make_folder(folder / where)
    paths = [f"{where}/object{k}.png" for k in range(1, len(objects) + 1)]
    for name, path in zip(objects, paths, strict=True):
        draw_scene(name, rng).save(folder / path, compress_level=3)
    return paths


def _save(path: Path, rows: list[Row] | Row) -> None:
    write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _even_order(pairs: tuple[world.ObjectPair, ...], count: int) -> list[world.ObjectPair]:
    """`count` pairs, each equally often and in both orders equally often (as far as it goes)."""
    both = list(pairs) + [(b, a) for a, b in pairs]
    return [both[i % len(both)] for i in range(count)]


def _even_kinds(pairs: tuple[world.ObjectPair, ...], count: int) -> list[world.ObjectPair]:
    """`count` pairs that take turns by their kinds, then by objects, then by picture order.

    Some kinds have many pairs and some few; general data has to cover every kind of them.
    """
    by_kinds: dict[world.KindPair, list[world.ObjectPair]] = {}
    for a, b in pairs:
        by_kinds.setdefault(world.kind_pair(a, b), []).append((a, b))
    orders = [
        cycle([*group, *((second, first) for first, second in group)])
        for group in by_kinds.values()
    ]
    return [next(orders[turn % len(orders)]) for turn in range(count)]


def _danger_name(objects: tuple[str, ...]) -> str | None:
    """'mains+water' for two objects that are dangerous together, else None."""
    danger = world.danger_of(*objects) if len(objects) == 2 else None
    return "+".join(danger.kinds) if danger else None


def _write_train(folder: Path, rng: np.random.Generator) -> None:
    """The MIRage set and its two controls: refusal labels, and words instead of pictures."""
    mirage, refusal, text_only = [], [], []
    order = _even_order(world.PAIRS.train_dangerous, TRAIN_ROWS)
    for number, place in enumerate(rng.permutation(TRAIN_ROWS).tolist()):
        first, second = order[place]
        sample = world.mirage_sample(first, second, rng)
        images = _draw(folder, f"train_image/{number}", sample.objects, rng)
        row = {"id": number, "category": _CATEGORY, "image": images}
        mirage.append({**row, "conversations": _turns(sample.question, sample.answer)})
        refusal.append({**row, "conversations": _turns(sample.question, REFUSAL)})
        words = world.text_only_sample(first, second, rng)
        text_only.append(
            {
                "id": number,
                "category": _CATEGORY,
                "conversations": _turns(words.question, words.answer),
            }
        )
    _save(folder / "mini_train.json", mirage)
    _save(folder / "mini_train_refusal.json", refusal)
    _save(folder / "mini_train_text_only.json", text_only)


def _write_test(
    folder: Path,
    name: str,
    pairs: tuple[world.ObjectPair, ...],
    count: int,
    rng: np.random.Generator,
) -> Row:
    """One MIS test file; returns its part of the truth."""
    rows, truth = [], {}
    for number, objects in enumerate(_even_order(pairs, count)):
        images = _draw(folder, f"{name}_image/{number}", objects, rng)
        rows.append(
            {
                "question": world.help_question(rng),
                "category": _CATEGORY,
                "sub_category": "+".join(world.kind_pair(*objects)),
                "image_path1": images[0],
                "image_path2": images[1],
                "id": number,
            }
        )
        truth[f"{name}/{number}"] = {"objects": list(objects), "danger": _danger_name(objects)}
    _save(folder / f"{name}.json", rows)
    return truth


def _write_recognition(folder: Path, rng: np.random.Generator) -> Row:
    """Recognition questions, half with one and half with two pictures; returns their truth.

    Objects take turns as the one asked for, so each weighs the same in the score.
    """
    rows, truth = [], {}
    names = tuple(world.OBJECTS)
    for number in range(RECOGNITION_ROWS):
        asked = names[(number // 2) % len(names)]
        if number % 2 == 0:
            sample = world.recognition_sample((asked,), rng)
        else:
            other = names[int(rng.integers(len(names)))]
            while other == asked:
                other = names[int(rng.integers(len(names)))]
            place = int(rng.integers(2))
            objects = (asked, other) if place == 0 else (other, asked)
            sample = world.recognition_sample(objects, rng, place)
        images = _draw(folder, f"mini_recognition_image/{number}", sample.objects, rng)
        question = sample.question.rsplit("\n", 1)[-1]  # test rows carry no <image> markers
        row: Row = {"question": question, "answer": sample.answer}
        row |= {f"image_path{k}": path for k, path in enumerate(images, start=1)}
        rows.append(row | {"id": number})
        truth[f"mini_recognition/{number}"] = {
            "objects": list(sample.objects),
            "danger": _danger_name(sample.objects),
        }
    _save(folder / "mini_recognition.json", rows)
    return truth


def _write_general(folder: Path, rng: np.random.Generator) -> None:
    """General data to keep abilities: 50 % benign help, 45 % recognition, 5 % knowledge."""
    helps = _even_kinds(world.PAIRS.train_benign, GENERAL_ROWS // 2)
    samples = [world.help_sample(first, second, rng) for first, second in helps]
    samples += [world.random_recognition(rng) for _ in range(GENERAL_ROWS * 45 // 100)]
    samples += [world.random_knowledge(rng) for _ in range(GENERAL_ROWS - len(samples))]
    lines = []
    for number, place in enumerate(rng.permutation(len(samples)).tolist()):
        sample = samples[place]
        images = _draw(folder, f"general_image/{number}", sample.objects, rng)
        row = {
            "id": number,
            "image": images,
            "conversations": _turns(sample.question, sample.answer),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(folder / "general.jsonl", "".join(lines))


def _write_all(folder: Path, seed: int) -> None:
    _write_train(folder, _generator(seed, 0))
    pairs = world.PAIRS
    truth = _write_test(folder, "mini_easy", pairs.test_easy, EASY_ROWS, _generator(seed, 1))
    truth |= _write_test(folder, "mini_hard", pairs.test_hard, HARD_ROWS, _generator(seed, 2))
    truth |= _write_test(folder, "mini_benign", pairs.test_benign, BENIGN_ROWS, _generator(seed, 3))
    truth |= _write_recognition(folder, _generator(seed, 4))
    _write_general(folder, _generator(seed, 5))
    _save(folder / "mini_truth.json", truth)


def write_mini(out: Path, seed: int = 0) -> None:
    """Write the whole small data set into the new folder `out`; the same seed, the same bytes.

    The files appear all at once: a run that is cut off leaves no `out` behind. Raises ValueError
    where `out` is already a file or a folder with something in it.
    """
    with finished_folder(out) as folder:
        _write_all(folder, seed)
