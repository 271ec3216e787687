"""Sizes told before any picture is decoded, kept in a file, made again when anything changed."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from tiny_world import picture, run_config, sample

from mis_jax.data import measure as module
from mis_jax.data.loader import make_preprocess
from mis_jax.data.measure import save, survey
from mis_jax.data.mixture import read_sources


@pytest.fixture
def folder(tmp_path):
    """Samples of many sizes, two of them bad, as samples.jsonl."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(14):
        names = [f"{index}-{k}.png" for k in range(index % 4)]
        for name in names:
            picture(tmp_path / name, *(int(n) for n in rng.integers(20, 300, 2)), index)
        rows.append(sample(index, names))
        rows[-1]["conversations"][1]["value"] = "A cup is safe. " * (1 + index)
    rows[3]["conversations"][1]["value"] = " "
    (tmp_path / "6-0.png").write_text("no picture")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def made(tiny_checkpoint, tiny_processor, folder):
    """Rows of the folder and how they are rendered; settings can be changed."""

    def make(**changes):
        settings = dict(data__max_length=2048, data__max_tiles=6) | changes
        config = run_config(tiny_checkpoint, folder, folder / "run", **settings)
        return read_sources(config.data.sources, 0), make_preprocess(config, tiny_processor)

    return make


def test_sizes_are_those_of_the_rendered_samples(made):
    rows, render = made()
    found = survey(rows, render)
    assert found.good.tolist() == [i for i in range(14) if i not in (3, 6)]
    for i in found.good:
        example = render(rows[i])
        assert found.tokens[i] == len(example.input_ids)
        assert found.loss_tokens[i] == example.loss_mask.sum()
        assert found.tiles[i] == len(example.tiles) == sum(example.tiles_per_image)
    assert len(set(found.tiles.tolist())) > 4
    assert found.problems.keys() == {3, 6}
    path = rows[3].where.removesuffix(", line 4")  # the place once, as an editor counts
    assert found.problems[3].startswith(f"{path}, line 4: conversations[1].value is an empty")
    assert "line 7: " in found.problems[6] and "6-0.png" in found.problems[6]


def test_no_picture_is_decoded(made, monkeypatch):
    rows, render = made()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert len(survey(rows, render).good) == 12


def test_truncation_is_counted(made):
    rows, render = made(data__max_length=90, data__too_long="truncate", data__max_tiles=1)
    found = survey(rows, render)
    cut = np.flatnonzero(found.cut)
    assert len(cut) and (found.tokens[cut] == 90).all()
    for i in found.good:
        example = render(rows[i])
        assert len(example.input_ids) == found.tokens[i] <= 90
        assert example.loss_mask.sum() == found.loss_tokens[i] > 0


def test_a_saved_survey_is_taken(made, folder, monkeypatch):
    rows, render = made()
    first = survey(rows, render)
    save(first, folder / "survey.npz")
    monkeypatch.setattr(module, "in_order", lambda *_: pytest.fail("looked again"))
    again = survey(rows, render, saved=folder / "survey.npz")
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def change_answer(folder, processor):
    text = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(text.replace("A cup is safe. A", "A mug is safe. A", 1))


def change_picture(folder, processor):
    os.utime(folder / "1-0.png", ns=(1, 1))


def mend_picture(folder, processor):
    shutil.copy(folder / "1-0.png", folder / "6-0.png")


@pytest.mark.parametrize("change", [change_answer, change_picture, mend_picture])
def test_what_changed_is_looked_at_again(made, folder, change):
    rows, render = made()
    first = survey(rows, render)
    save(first, folder / "survey.npz")
    change(folder, render.processor)
    rows, render = made()
    assert survey(rows, render, saved=folder / "survey.npz").key != first.key


@pytest.mark.parametrize("name", ["max_tiles", "max_length", "truncate"])
def test_settings_are_part_of_the_key(made, name):
    rows, render = made()
    other = dataclasses.replace(render, **{name: 1000 if name == "max_length" else 1})
    assert survey(rows, other).key != survey(rows, render).key


@pytest.mark.parametrize("damage", ["", "PK\x03\x04 torn", "{}"])
def test_a_damaged_file_is_made_again(made, folder, damage):
    rows, render = made()
    (folder / "survey.npz").write_text(damage)
    assert len(survey(rows, render, saved=folder / "survey.npz").good) == 12


def test_progress(made):
    rows, render = made()
    seen: list[tuple[int, int]] = []
    survey(rows, render, progress=lambda *at: seen.append(at))
    assert seen == [(i + 1, 14) for i in range(14)]


@pytest.mark.slow
def test_worker_processes_find_the_same(made, monkeypatch):
    monkeypatch.setattr(module, "_FEW", 0)
    rows, render = made()
    a, b = survey(rows, render), survey(rows, render, workers=2)
    assert np.array_equal(a.tokens, b.tokens) and a.problems == b.problems


def test_a_kept_problem_has_the_line_of_today(made, folder):
    """A blank line in front moves every sample of the file by one."""
    first = survey(*made())
    save(first, folder / "survey.npz")
    path = folder / "samples.jsonl"
    path.write_text("\n" + path.read_text())
    again = survey(*made(), saved=folder / "survey.npz")
    assert ", line 5: " in again.problems[3] and ", line 4: " in first.problems[3]
