"""The benchmarks' page agrees with the saved results, and device.py starts what it says."""

import argparse
import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest

from retinanet_ext.engine import load_config
from retinanet_ext.experiments.plan import plan

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_the_page_is_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(FOLDER)
    page = importlib.import_module("summarize").summarize()
    assert page == (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("results/*.json"):  # only the newest per setting is kept
        content = json.loads(path.read_text())
        assert f"{content['date']}, torch {content['torch']}, commit {content['commit']}" in page


class ParsedError(Exception):
    """A script has taken its arguments."""


@pytest.fixture
def device(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return pytest.importorskip("device")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_every_command_of_the_device_script_takes_its_arguments(
    options, device, monkeypatch, tmp_path
):
    """Options, config keys, tables and files: a minute on a GPU should not be lost to a typo."""
    root = FOLDER.parent
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after_parsing(parser, *args, **kwargs):
        parse_args(parser, *args, **kwargs)
        raise ParsedError

    args = device.argument_parser().parse_args(["--data", "data", "--out", str(tmp_path), *options])
    commands = [c for part in device.make_parts(args).values() for c in part.commands.values()]
    assert len(commands) > 10
    for script, *words in commands:
        if script == "train_net.py":
            load_config(words[1], words[2:])
        elif words[:2] == ["retinanet_ext", "experiments"] and words[2] == "run":
            tables = [words[i + 1] for i, word in enumerate(words) if word == "--table"]
            preset = words[words.index("--preset") + 1]
            assert plan(preset, tables=tables, root=root, output=tmp_path)[1]
        elif words[0] == "pytest":
            files = [word for word in words if word.endswith(".py")]
            assert files and all((root / file).is_file() for file in files)
        elif script.startswith("benchmarks/"):
            with monkeypatch.context() as patch, pytest.raises(ParsedError):
                patch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
                patch.setattr(sys, "argv", [script, *words])
                runpy.run_path(str(root / script), run_name="__main__")


def test_the_device_script_leaves_a_page_of_what_ran(device, tmp_path):
    args = device.argument_parser().parse_args(["--data", "data", "--out", str(tmp_path)])
    part = device.Part(
        {"fine": ["-c", "print('done')"], "slow": ["-c", "import time; time.sleep(60)"]}, 2
    )
    results = {"part": device.run(part, 2, args)}
    device.write_page(results, args)
    found = json.loads((tmp_path / "device.json").read_text())["parts"]["part"]
    assert [found[name]["exit_code"] for name in ("fine", "slow")] == [0, "cut off"]
    page = (tmp_path / "device.md").read_text()
    assert "## part: fine" in page and "\ndone\n" in page
