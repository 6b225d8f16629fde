"""Class names of any script, with the fonts that matplotlib brings and without any."""

from pathlib import Path

import pytest
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font

from retinanet_ext.evaluation import fonts
from retinanet_ext.evaluation.fonts import DEFAULT_FAMILY, choose_fonts

FOLDER = Path(get_data_path(), "fonts/ttf")
OTHER_FONT = str(FOLDER / "STIXGeneral.ttf")


@pytest.fixture
def other_name():
    """A name with characters that only the other font has."""
    default, other = (
        set(FT2Font(file).get_charmap()) for file in (str(FOLDER / "DejaVuSans.ttf"), OTHER_FONT)
    )
    return "cell " + "".join([chr(c) for c in sorted(other - default) if chr(c).isprintable()][:3])


@pytest.fixture
def install(monkeypatch):
    return lambda *files: monkeypatch.setattr(fonts, "findSystemFonts", lambda: list(files))


def test_a_font_that_has_the_characters_is_added(other_name, install, tmp_path, caplog):
    damaged = tmp_path / "A-Regular.ttf"
    damaged.write_bytes(b"font")
    install(str(damaged), OTHER_FONT)
    names = ["Zelle", "клетка", other_name]
    assert choose_fonts(names) == (names, [DEFAULT_FAMILY, "STIXGeneral"])
    assert choose_fonts(names[:2]) == (names[:2], [DEFAULT_FAMILY])
    assert not caplog.records


def test_a_name_without_a_font_is_numbered(install, caplog):
    install()
    with caplog.at_level("WARNING", "retinanet_ext.evaluation.fonts"):
        assert choose_fonts(["RBC", "红cell"]) == (["RBC", "class 1"], [DEFAULT_FAMILY])
    (record,) = caplog.records
    assert "红cell (class 1)" in record.getMessage() and "fonts-noto-cjk" in record.getMessage()
    assert "RBC" not in record.getMessage()


def test_a_name_of_several_lines_is_one_line():
    assert choose_fonts(["a\nb"])[0] == [r"a\nb"]


def test_regular_fonts_without_serifs_come_first():
    files = ["/f/NotoSerif-Regular.ttf", "/f/A-Bold.ttf", "/f/NotoSans-Regular.ttf"]
    assert min(files, key=fonts._rank) == "/f/NotoSans-Regular.ttf"
