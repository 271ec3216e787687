"""The TSV reader: what a cell may hold, where pictures go, and what is refused."""

import base64
import csv
import hashlib
import io
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from eval_tables import b64, picture, several, write_table
from PIL import Image

from mis_jax.evals.vlmevalkit.questions import image_suffix
from mis_jax.evals.vlmevalkit.tsv import file_md5, read_tsv


def row(index: object = 0, **cells: object) -> dict[str, Any]:
    """A row that is sound in every column."""
    sound = {"question": "Which?", "A": "one", "B": "two", "answer": "A", "image": b64(picture(1))}
    return {"index": index} | sound | cells


def test_a_row(tmp_path: Path) -> None:
    cells = {"hint": "Look up.", "C": "three\nlines", "category": "sky", "l2-category": "blue"}
    (question,) = read_tsv(write_table(tmp_path / "t.tsv", [row(7, **cells)]))
    assert (question.index, question.text, question.answer) == ("7", "Which?", "A")
    assert question.options == {"A": "one", "B": "two", "C": "three\nlines"}
    assert (question.hint, question.category, question.sub_category) == ("Look up.", "sky", "blue")
    assert (question.split, question.pair) == (None, None)
    assert question.images[0].read_bytes() == picture(1)


def test_a_picture_file_holds_what_was_put_in(tmp_path: Path) -> None:
    """Pillow reads from disk the colours that Pillow drew, in both formats."""
    rows = [row(k, image=b64(picture(40, kind=kind))) for k, kind in enumerate(("PNG", "JPEG"))]
    questions = read_tsv(write_table(tmp_path / "t.tsv", rows))
    png, jpeg = (question.images[0] for question in questions)
    assert (png.suffix, jpeg.suffix) == (".png", ".jpg")
    with Image.open(png) as image:
        assert image.getpixel((0, 0)) == (40, 90, 160)
    assert jpeg.read_bytes() == picture(40, kind="JPEG")  # not compressed once more


def test_lists_and_references(tmp_path: Path) -> None:
    rows = [row(5, image="6"), row(6, image=several(1, 2, 3)), row(8, image=several(4))]
    first, second, third = read_tsv(write_table(tmp_path / "t.tsv", rows))
    contents = [path.read_bytes() for path in second.images]
    assert contents == [picture(1), picture(2), picture(3)]
    assert first.images == second.images
    assert [path.read_bytes() for path in third.images] == [picture(4)]


def test_a_reference_has_at_most_64_characters(tmp_path: Path) -> None:
    rows = [row("r" * 64), row(1, image="r" * 64)]
    first, second = read_tsv(write_table(tmp_path / "t.tsv", rows))
    assert second.images == first.images
    rows = [row("r" * 65), row(1, image="r" * 65)]
    with pytest.raises(ValueError, match="row 2, column 'image' is not base64"):
        read_tsv(write_table(tmp_path / "t.tsv", rows))


def test_base64_in_lines(tmp_path: Path) -> None:
    lines = base64.encodebytes(picture(3, size=(90, 90))).decode()
    assert lines.count("\n") > 1
    (question,) = read_tsv(write_table(tmp_path / "t.tsv", [row(image=lines)]))
    assert question.images[0].read_bytes() == picture(3, size=(90, 90))


def test_the_same_picture_is_one_file(tmp_path: Path) -> None:
    read_tsv(write_table(tmp_path / "t.tsv", [row(0), row(1), row(2, image=several(1, 1))]))
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_cells_that_pandas_takes_for_missing(tmp_path: Path) -> None:
    cells = {"C": "N/A", "D": "None", "E": "nan", "F": "None of them", "G": " ", "H": ""}
    (question,) = read_tsv(write_table(tmp_path / "t.tsv", [row(0, **cells, hint="NaN")]))
    assert question.options == {"A": "one", "B": "two", "F": "None of them", "G": " "}
    assert question.hint is None


def test_an_open_question_may_have_any_answer(tmp_path: Path) -> None:
    (question,) = read_tsv(write_table(tmp_path / "t.tsv", [row(A="", B="", answer="None")]))
    assert (question.options, question.answer) == ({}, "None")


def test_a_row_without_a_picture_is_left_out(tmp_path: Path) -> None:
    questions = read_tsv(write_table(tmp_path / "t.tsv", [row(0), row(1, image=""), row(2)]))
    assert [question.index for question in questions] == ["0", "2"]


def test_a_split(tmp_path: Path) -> None:
    rows = [row(0, split="dev"), row(1, split="validation", image="0")]
    path = write_table(tmp_path / "t.tsv", rows)
    (question,) = read_tsv(path, split="validation")
    assert question.index == "1"
    assert question.images[0].read_bytes() == picture(1)  # of a row of the other split
    with pytest.raises(ValueError, match="holds no questions of split 'test'"):
        read_tsv(path, split="test")
    with pytest.raises(ValueError, match="lacks the column\\(s\\) split"):
        read_tsv(write_table(tmp_path / "u.tsv", [row(0)]), split="validation")


def test_a_cell_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (300, 300), os.urandom(300 * 300 * 3))
    stream = io.BytesIO()
    noise.save(stream, "PNG")
    before = csv.field_size_limit()
    assert len(b64(stream.getvalue())) > before
    path = write_table(tmp_path / "t.tsv", [row(image=b64(stream.getvalue()))])
    (question,) = read_tsv(path)
    assert question.images[0].read_bytes() == stream.getvalue()
    assert csv.field_size_limit() == before


def test_list_cells_run_nothing(tmp_path: Path) -> None:
    harmless = f"[open({str(tmp_path / 'made')!r}, 'w').name, {'x' * 70!r}]"
    path = write_table(tmp_path / "t.tsv", [row(image=harmless)])
    with pytest.raises(ValueError, match="row 1, column 'image' is not a list of pictures"):
        read_tsv(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(0)], r"column 'index': '0' occurs twice"),
        ([row(""), row(1)], r"row 1, column 'index' is empty"),
        ([row(0), row(1, answer="")], r"row 2, column 'answer' is empty"),
        ([row(0, answer="one")], r"row 1, column 'answer': 'one' is not the letter"),
        ([row(0, answer="a")], r"row 1, column 'answer': 'a' is not the letter"),
        ([row(0, question=" ")], r"row 1, column 'question' is empty"),
        ([row(0, image="5")], r"row 1, column 'image' is '5', which is not the index"),
        ([row(0, image="1"), row(1, image="0")], r"row 1, column 'image' is '1'"),
        ([row(0, image="?" * 80)], r"row 1, column 'image' is not base64"),
        ([row(0, image=b64(picture(1))[:-1])], r"row 1, column 'image' is not base64"),
        ([row(0, image=b64(b"text " * 20))], r"row 1, column 'image': the 100 bytes there are no"),
        ([row(0, image=str(["x" * 80, 3]))], r"column 'image' is not a list of base64 texts"),
        ([row(0, image="[" + " " * 80 + "]")], r"column 'image' is not a list of base64 texts"),
    ],
)
def test_bad_cells_name_file_row_column_and_remedy(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_tsv(write_table(tmp_path / "t.tsv", rows))
    assert "t.tsv" in str(error.value)
    assert "download the file again" in str(error.value)


@pytest.mark.parametrize("column", ["index", "image", "question", "answer", "A", "B"])
def test_a_missing_column(tmp_path: Path, column: str) -> None:
    cells = row()
    del cells[column]
    with pytest.raises(ValueError, match=rf"t\.tsv lacks the column\(s\) {column} \(it has "):
        read_tsv(write_table(tmp_path / "t.tsv", [cells]))


def test_a_file_cut_short_anywhere_in_its_last_row(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.tsv", [row(0), row(1)])
    whole = path.read_bytes()
    # The picture is the last column, so that every cut leaves either fewer cells or half of it.
    assert whole.splitlines()[0].endswith(b"image")
    begin = whole.rindex(b"\n1\t") + 2
    for end in range(begin, len(whole) - 1, 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"t\.tsv, row 2"):
            read_tsv(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"lacks the column\(s\) index, image, question, answer, A, B \(it has none\)"),
        (b"index\timage\tquestion\tanswer\tA\tB\n", "holds no questions; download"),
        (b"<html><body>Not found</body></html>", r"lacks the column\(s\)"),
        (b"index\timage\tquestion\tanswer\tA\tB\n0\t\xff\xfe\tq\tA\t1\t2\n", "is not UTF-8 text"),
    ],
)
def test_what_is_no_such_table(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tsv(tmp_path / "t.tsv")


def test_a_row_with_too_many_cells(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.tsv", [row(0)])
    path.write_text(path.read_text().rstrip("\n") + "\tmore\n")
    with pytest.raises(ValueError, match="row 1, column 'image': the row has 7 cells"):
        read_tsv(path)


def test_the_md5_is_that_of_hashlib(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.tsv", [row(0)])
    assert file_md5(path) == hashlib.md5(path.read_bytes()).hexdigest()


# Extraction


def test_a_second_reading_writes_nothing(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.tsv", [row(0)])
    (first,) = read_tsv(path)
    os.utime(first.images[0], (1, 1))
    (second,) = read_tsv(path)
    assert second.images == first.images
    assert second.images[0].stat().st_mtime == 1


def test_a_kill_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "t.tsv", [row(0), row(1, image=b64(picture(2)))])
    replace, calls = os.replace, []

    def killed(source: str, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        read_tsv(path)
    assert [file.read_bytes() for file in (tmp_path / "pictures").iterdir()] == [picture(1)]
    monkeypatch.undo()
    questions = read_tsv(path)
    assert [q.images[0].read_bytes() for q in questions] == [picture(1), picture(2)]


def test_a_file_that_lost_its_bytes_is_written_again(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.tsv", [row(0)])
    (first,) = read_tsv(path)
    first.images[0].write_bytes(b"")
    read_tsv(path)
    assert first.images[0].read_bytes() == picture(1)


def test_a_changed_table_does_not_meet_an_old_picture(tmp_path: Path) -> None:
    (old,) = read_tsv(write_table(tmp_path / "t.tsv", [row(0)]))
    (new,) = read_tsv(write_table(tmp_path / "t.tsv", [row(0, image=b64(picture(9)))]))
    assert (old.images[0].read_bytes(), new.images[0].read_bytes()) == (picture(1), picture(9))


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table in whose folder nothing can be made (root writes through modes, so by a file)."""
    path = write_table(tmp_path / "data" / "t.tsv", [row(0)])
    (path.parent / "pictures").write_text("a file in the folder's place")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return path


def test_a_read_only_data_root(read_only: Path, tmp_path: Path) -> None:
    (question,) = read_tsv(read_only)
    assert question.images[0].is_relative_to(tmp_path / "temporary")
    assert question.images[0].read_bytes() == picture(1)
    (private,) = (tmp_path / "temporary").iterdir()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert read_tsv(read_only)[0].images == question.images


def test_a_temporary_folder_that_others_can_write_to(read_only: Path, tmp_path: Path) -> None:
    read_tsv(read_only)
    (private,) = (tmp_path / "temporary").iterdir()
    private.chmod(0o777)
    with pytest.raises(ValueError, match="is open to others"):
        read_tsv(read_only)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("PNG", ".png"), ("JPEG", ".jpg"), ("GIF", ".gif"), ("BMP", ".bmp"), ("WEBP", ".webp")],
)
def test_formats_are_known_by_their_first_bytes(kind: str, suffix: str) -> None:
    assert image_suffix(picture(1, kind=kind)) == suffix
    assert image_suffix(b"%PDF-1.7") is None
