"""The command line as a whole; each command is tried where what it calls is tested."""

import re
import subprocess
import sys

import pytest

from retinanet_ext.cli import COMMANDS, main


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_lists_the_commands_and_imports_no_torch():
    program = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--help']; "
    run_module = "runpy.run_module('retinanet_ext', run_name='__main__')"
    shown = run("-c", program + run_module)
    assert shown.returncode == 0, shown.stderr
    listed = re.findall(r"^    ([a-z-]+)(?:  |$)", shown.stdout, re.M)
    assert listed == list(COMMANDS)
    assert "train_net.py" in shown.stdout


@pytest.mark.parametrize("command", ["check_data", "train", ""])
def test_unknown_command_is_refused_with_the_known_ones(command):
    refused = run("-m", "retinanet_ext", command)
    assert refused.returncode == 2 and not refused.stdout
    *_, line = refused.stderr.splitlines()
    assert line.startswith(f"retinanet-ext: error: argument COMMAND: invalid choice: '{command}'")
    assert all(name in line for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_under_its_own_name(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: retinanet-ext {command} [-h]")


def test_argument_errors_and_input_errors_look_the_same(tmp_path, capsys):
    assert main(["experiments", "list", "--table", "9"]) == 2
    assert main(["export-weights", str(tmp_path / "none.pth"), str(tmp_path / "out.pth")]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["replay"])
    assert ended.value.code == 2
    tables, export, _, replay = capsys.readouterr().err.splitlines()
    assert tables.startswith("retinanet-ext experiments: error: there is no table '9'; there are ")
    assert export.startswith("retinanet-ext export-weights: error: ") and "none.pth" in export
    assert replay == "retinanet-ext replay: error: the following arguments are required: file"


def test_a_full_disk_is_one_line_and_a_defect_is_not(tmp_path, monkeypatch, capsys):
    def write(parser, argv):
        with open(argv[0], "w") as file:
            file.write("more than there is room for")

    monkeypatch.setitem(COMMANDS, "predict", write)
    assert main(["predict", "/dev/full"]) == 2
    line = "a file cannot be written: No space left on device"
    assert capsys.readouterr().err == f"retinanet-ext predict: error: {line}\n"
    with pytest.raises(FileNotFoundError):
        main(["predict", str(tmp_path / "no/folder")])


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def cut_off(parser, argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "predict", cut_off)
    assert main(["predict"]) == 130
    assert capsys.readouterr().err == "retinanet-ext predict: cut off\n"
