"""Tables are read strictly: each is read by one reader, and what is ambiguous is rejected with its line and the fix."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tables import write_lines

from batteries.core.errors import UserError
from batteries.core.tables import read_table
from batteries.data.image_files import ImageFiles
from batteries.data.splits import SplitFile
from batteries.data.table_paths import strip_invisible, suggest_path
from batteries.evaluation.predictions import read_predictions

ROWS = [f"{number}.jpg,cat,good" for number in range(120)]
UNICODE_FORM = "in the same Unicode form as the name of the file, or rename that"
UNENCLOSED = "has a quotation mark that does not enclose a whole cell"
ENCLOSE = "remove it, or enclose the whole cell and double the marks inside it"


def with_rows(changes: dict[int, str]) -> bytes:
    """Return a table of which the rows with these numbers, from 0, are replaced."""
    rows = [changes.get(number, row) for number, row in enumerate(ROWS)]
    return ("\n".join(["path,label,note", *rows]) + "\n").encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_rows({70: '70.jpg,cat,"5 inch lens'}), f"line 72 {UNENCLOSED}"),
        (with_rows({70: '70.jpg,cat,"5 inch" lens'}), f"line 72 {UNENCLOSED}; {ENCLOSE}"),
        (with_rows({70: '70.jpg,"cat,5 inch', 90: '90.jpg,"dog",good'}), f"line 72 {UNENCLOSED}"),
        (with_rows({119: '"119.jpg,cat,good'}), f"line 121 {UNENCLOSED}"),
        (
            with_rows({70: '70.jpg,cat,"5 inch lens', 90: '90.jpg,cat,5 inch"'}),
            f"line 72 has a quotation mark that is closed in line 92 only, with whole rows between them; {ENCLOSE}",
        ),
        (
            with_rows({70: '70.jpg,"cat,good', 71: '71.jpg,cat",good'}),
            "line 72 has a quotation mark that is closed in line 73 only, with",
        ),
        (
            with_rows({70: '"70.jpg,cat,good', 71: '71.jpg",cat,good'}),
            "line 72 has a quotation mark that is closed in line 73 only, with",
        ),
        (with_rows({70: f'70.jpg,cat,"{"x" * 200_000}"'}), "line 72 has a cell of more than 131,072 characters; close"),
        (with_rows({70: '70.jpg,cat,"good' + "x" * 200_000}), "line 72 has a cell of more than 131,072 characters"),
        (with_rows({70: "70.jpg,cat,good,5 inch"}), "line 72 has 4 cells for 3 columns (path, label, note); write one"),
        (with_rows({70: "70.jpg,cat"}), "line 72 has 2 cells for 3 columns (path, label, note); write one"),
        (with_rows({70: '70.jpg,"a\nb",cat,good', 80: "80.jpg"}), "line 72 has 4 cells for 3 columns"),
        (with_rows({70: "70.jpg,c\0t,good"}), "line 72 has a NUL character, as in a damaged file or in UTF-16"),
        ("path,label\na.jpg,Käse\n".encode("utf-16-le"), "line 1 has a NUL character, as in a damaged file"),
        ("path,label\na.jpg,Käse\n".encode("utf-16"), "is encoded as UTF-16; save it as UTF-8, such as with iconv -f"),
        ("path,label\na.jpg,Katze\nb.jpg,Käse\n".encode("latin-1"), "line 3 has the byte 0xe4, which is not UTF-8"),
        (b"path,label\r\na.jpg,Katze\r\nb.jpg,K\x80se\r\n", "line 3 has the byte 0x80, which is not UTF-8"),
        (b"path;label\na.jpg;cat\n", "has one column, 'path;label', which looks like several columns separated by s"),
        (
            b"path\tlabel\na.jpg\tcat\n",
            r"has one column, 'path\tlabel', which looks like several columns separated by t",
        ),
        (b"path,label,label\na,b,c\n", "has more than one column label; keep one."),
        (b"path,label,,\na,b,,\n", "has more than one column without a name; keep one."),
    ],
)
def test_an_ambiguous_table_is_rejected_with_its_line(tmp_path, content, message):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} {message}")) as error:
        read_table(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('"a, b.jpg","the ""cat""",5" lens\n', [(2, ["a, b.jpg", 'the "cat"', '5" lens'])]),
        ('a,b,"1\n2, 2\n3"\n\nc,d,\n', [(2, ["a", "b", "1\n2, 2\n3"]), (6, ["c", "d", ""])]),
        ('"a\nb.jpg",cat,good\n', [(2, ["a\nb.jpg", "cat", "good"])]),
        ("a.jpg,cat,good\r\n,,\r\n\r\n", [(2, ["a.jpg", "cat", "good"])]),
        ("a.jpg, cat ,\\n", [(2, ["a.jpg", " cat ", "\\n"])]),
        ("", []),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_sound_table_is_read_with_its_lines(tmp_path, text, rows, mark):
    path = tmp_path / "x.csv"
    path.write_bytes(f"{mark}path,label,note\n{text}".encode())
    table = read_table(path)
    assert table.columns == ["path", "label", "note"]
    assert [tuple(row) for row in table.rows] == rows


def open_split(path: Path) -> SplitFile:
    return SplitFile(path, SimpleNamespace(ids=[], classes=None), lambda _: None)


@pytest.mark.parametrize(
    ("read", "header"),
    [
        (read_predictions, "id,cat"),
        (lambda path: ImageFiles(path, 3), "path,note"),
        (open_split, "id,fold"),
    ],
)
def test_every_table_is_read_strictly(tmp_path, read, header):
    path = write_lines(tmp_path / "x.csv", header, "1,0", '2,"0', "3,0")
    with pytest.raises(UserError, match=r"x\.csv line 3 has a quotation mark that does not enclose a whole cell"):
        read(path)
    path.write_bytes(path.read_bytes().replace(b'"', b"\xe4"))
    with pytest.raises(UserError, match=r"x\.csv line 3 has the byte 0xe4, which is not UTF-8"):
        read(path)


@pytest.mark.parametrize(
    ("name", "correction"),
    [
        ("images/t0.jpg ", "images/t0.jpg (without invisible characters at its ends)"),
        ("images/t0.jpg\u200b", "images/t0.jpg (without invisible characters at its ends)"),
        ("images\\t0.jpg", "images/t0.jpg (with / for \\)"),
        ("images/t0", "images/t0.jpg (with its suffix)"),
        ("t0", "images/t0.jpg (relative to {}, with its suffix)"),
        ("t0.jpg", "images/t0.jpg (relative to {})"),
        ("data/images/t0.jpg", "images/t0.jpg (relative to {})"),
        ("/kaggle/input/data\\images/t0", "images/t0.jpg (with / for \\, relative to {}, with its suffix)"),
        ("images/T0.JPG", "images/t0.jpg (in the same upper and lower case)"),
        ("images/K\u00e4se.png", f"images/Ka\u0308se.png ({UNICODE_FORM})"),
        ("Ka\u0308se", "images/Ka\u0308se.png (relative to {}, with its suffix)"),
        ("images/t2.jpg", None),
        ("other/t0.jpg", None),
        ("0.jpg", None),
        ("both.jpg", None),
        ("", None),
    ],
)
def test_the_correction_of_a_path_is_suggested(tmp_path, name, correction):
    for file in ("images/t0.jpg", "images/t1.jpg", "images/Ka\u0308se.png", "a/both.jpg", "b/both.jpg"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    expected = "" if correction is None else f"for {name}, write {correction.format(tmp_path)}"
    assert suggest_path(tmp_path, name) == expected


def test_a_table_of_images_names_the_correction_of_a_path(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/t0.jpg").touch()
    table = write_lines(tmp_path / "x.csv", "path", "images\\t0.jpg")
    with pytest.raises(UserError, match=re.escape("; for images\\t0.jpg, write images/t0.jpg (with / for \\).")):
        ImageFiles(table, 3)


def test_invisible_characters_are_removed_at_both_ends():
    assert strip_invisible("\ufeff a\u200b b\u00a0\u200b\t") == "a\u200b b"
    assert strip_invisible(" \u200b") == ""
