"""Class names of any script, with the fonts that matplotlib brings and without any."""

from pathlib import Path

import pytest
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font

from retinanet_ext.evaluation import fonts
from retinanet_ext.evaluation.fonts import DEFAULT_FONT, Label, label_classes

OTHER_FONT = str(Path(get_data_path(), "fonts/ttf/STIXGeneral.ttf"))


def characters(file):
    return set(FT2Font(file).get_charmap())


@pytest.fixture
def other_name():
    """A name that needs the other font: text, letters of it alone and some of both."""
    only_other = sorted(characters(OTHER_FONT) - characters(DEFAULT_FONT))
    return "cell " + "".join([chr(code) for code in only_other if chr(code).isprintable()][:3])


def install(monkeypatch, *files):
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: list(files))


def test_a_name_is_written_in_the_font_that_has_it(other_name, monkeypatch, caplog):
    install(monkeypatch, OTHER_FONT)
    assert label_classes(["Zelle", "клетка", other_name]) == [
        Label("Zelle", "Zelle", DEFAULT_FONT),
        Label("клетка", "клетка", DEFAULT_FONT),
        Label(other_name, other_name, OTHER_FONT),
    ]
    assert not caplog.records


def test_a_name_without_a_font_is_numbered_and_escaped(monkeypatch, caplog):
    install(monkeypatch)
    cjk = "红cell"
    with caplog.at_level("WARNING", "retinanet_ext.evaluation.fonts"):
        assert label_classes(["RBC", cjk])[1] == Label(
            "class 1", r"class 1: \u7ea2cell", DEFAULT_FONT
        )
    (record,) = caplog.records
    assert cjk in record.getMessage() and "fonts-noto-cjk" in record.getMessage()
    assert "RBC" not in record.getMessage()


def test_a_name_of_several_lines_is_one_line(monkeypatch):
    install(monkeypatch)
    assert label_classes(["a\nb"]) == [Label(r"a\nb", r"a\nb", DEFAULT_FONT)]


def test_a_font_that_cannot_be_read_is_passed_over(other_name, monkeypatch, tmp_path):
    damaged = tmp_path / "A-Regular.ttf"
    damaged.write_bytes(b"font")
    install(monkeypatch, str(damaged), OTHER_FONT)
    assert label_classes([other_name])[0].font == OTHER_FONT


def test_regular_fonts_without_serifs_come_first(monkeypatch):
    install(monkeypatch, "/f/NotoSerif-Regular.ttf", "/f/A-Bold.ttf", "/f/NotoSans-Regular.ttf")
    assert fonts._system_fonts()[0] == "/f/NotoSans-Regular.ttf"
