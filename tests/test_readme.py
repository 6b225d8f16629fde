"""Every command of the README is run: here on the project's smallest data, or by .ci/run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger

from detectors import make_model
from retinanet_ext import cli
from runs import make_run
from training import no_cuda, run_train_net

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/fixtures/bccd_mini"
README = (ROOT / "README.md").read_text()
COMMANDS = [
    " ".join(line.split())
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]
BY_CI = ["make demo", "make test"]  # .ci/run runs these
SMALL = [
    *("INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "128", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "[96]", "INPUT.MAX_SIZE_TRAIN", "128"),
    *("SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"),
]


def command(start):
    """Return the one command of the README that begins like this, as arguments."""
    (found,) = [c for c in COMMANDS if c.startswith(start)]
    return found.split()


def run(arguments, cwd, *more):
    """Run a command in a process of its own."""
    program, *rest = arguments
    start = {"python": [], "retinanet-ext": ["-m", "retinanet_ext"]}[program]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(cwd / "datasets")}  # fmt: skip
    return subprocess.run(
        [sys.executable, *start, *rest, *more], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.fixture
def run_here(folder, monkeypatch, capfd, restore_logging):
    """Run a command in this process, which has imported torch, and return what it prints."""

    def run(arguments, *more):
        program, *rest = arguments
        setup_logger.cache_clear()  # it would keep the stdout of an earlier test
        monkeypatch.chdir(folder)
        with no_cuda():
            if program == "python":
                code = run_train_net(*rest[1:], *more)
            else:
                code = cli.main([*rest, *more])
        output, errors = capfd.readouterr()
        assert code == 0, errors
        return output

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the README's reader has it: the checkout, and data of their own in mine/."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "train_net.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "mine").mkdir()
    (folder / "mine/images").symlink_to(DATA / "images")
    (folder / "mine/train.json").symlink_to(DATA / "instances_train_raw.json")
    (folder / "mine/val.json").symlink_to(DATA / "instances_val.json")
    return folder


def test_every_command_is_known_here():
    known = [*BY_CI, "source .venv/bin/activate", "python train_net.py", "retinanet-ext "]
    for text in COMMANDS:
        assert any(text.startswith(start) for start in known), text
    assert len(COMMANDS) == 20
    ci = (ROOT / ".ci/run").read_text()
    assert all(re.search(rf"^{text}\b", ci, re.M) for text in BY_CI)


def test_own_data_then_evaluation_then_export_and_analysis(folder, run_here):
    """The backbone's weights cannot be had here: random ones take their place."""
    backbone = folder / "backbone.pth"
    torch.save(timm.create_model("mobilenetv2_100").state_dict(), backbone)
    mine = command("python train_net.py --config-file configs/small_mobilenetv2_FPN.yaml")
    run_here(mine, *SMALL, "MODEL.TIMM.WEIGHTS", str(backbone))
    for name in ("model_final.pth", "metrics.json", "log.txt", "detections.png"):
        assert (folder / "output/mine" / name).is_file(), name
    assert "AP50" in run_here(command("python train_net.py --config-file output/mine"))
    assert "5 images, " in run_here(command("retinanet-ext predict"))
    assert len([*folder.glob("output/mine/predictions/*/drawn/*.jpg")]) == 5

    # After one iteration no score is high.
    evaluate = command("retinanet-ext evaluate output/mine --save-thresholds")
    assert "Wrote" in run_here(evaluate, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    assert len(list(folder.glob("output/mine/evaluation/evaluation_*.html"))) == 1
    assert (folder / "output/mine/thresholds.json").is_file()

    run_here(command("retinanet-ext export-weights"))
    weights = torch.load(folder / "output/mine/detectron2.pth")["model"]
    assert "head.cls_score.weight" in weights
    assert not any(name.startswith("criterion") for name in weights)

    exporting = command("retinanet-ext export output")
    assert "Wrote " in run_here(exporting, "--format", "torchscript")  # which is the fastest

    assert "hardest 20 %" in run_here(command("retinanet-ext analyze-loss"))
    assert (folder / "output/mine/loss_cdf-test/loss_cdf.svg").is_file()


def test_fine_tuning_from_published_weights(stock, folder, run_here):
    tuning = command("python train_net.py --config-file configs/finetune_R50_FPN.yaml")
    run_here(tuning, *SMALL, "MODEL.WEIGHTS", stock)
    classes = torch.load(folder / "output/finetuned/model_final.pth")["class_names"]
    assert classes == ["RBC", "WBC", "Platelets"]


def test_runs_are_compared(tmp_path, monkeypatch, capsys, restore_logging):
    """Runs of random weights take the place of the two trainings."""
    _, name, *folders = command("retinanet-ext compare")
    for seed, run in enumerate(folders):
        make_run(tmp_path / run, "DATASETS.CUSTOM.TEST_JSON", str(DATA / "instances_val.json"),
                 "DATASETS.CUSTOM.TEST_IMAGES", str(DATA / "images"), seed=seed)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main([name, *folders]) == 0
    assert "Wrote output/mine/evaluation/compare_finetuned/" in capsys.readouterr().out


def test_own_data_are_checked(run_here):
    assert "Training takes these data" in run_here(command("retinanet-ext check-data"))


def test_curves(folder, run_here):
    run_here(command("retinanet-ext plot-losses"))
    assert (folder / "output/figures/losses.svg").is_file()


def test_list_of_experiments(folder):
    listed = run(command("retinanet-ext experiments list"), folder)
    assert listed.returncode == 0 and "table 1d, section 5.3" in listed.stdout


@pytest.mark.parametrize(
    ("start", "row", "opts"),
    [
        (
            *("--table prior --preset quick", "pi.01"),
            ("DATASETS.SAMPLE.NUM_TRAIN", "4", "DATASETS.SAMPLE.NUM_VAL", "2"),
        ),
        ("--table 1b --preset small", "gamma2.0", ()),
    ],
)
def test_experiments_end_with_a_report(start, row, opts, folder, run_here):
    """One row and one seed of the command, on small images for one iteration."""
    program, name, what, *rest = command(f"retinanet-ext experiments run {start}")
    printed = run_here([program, name, what, "--row", row, "--seeds", "1", *rest, *SMALL, *opts])
    *_, markdown, page = printed.split()
    assert (folder / page).name == "report.html" and (folder / page).stat().st_size > 10_000
    assert "| --- |" in (folder / markdown).read_text()


def test_experiments_on_coco_say_what_is_missing(folder):
    start = "retinanet-ext experiments run --table 1b --preset paper"
    coco = run(command(start), folder)
    assert coco.returncode == 2 and "Traceback" not in coco.stderr
    assert "instances_train2017.json" in coco.stderr
    assert not list(folder.glob("output/experiments/paper-*"))


def test_coco_on_eight_gpus_says_what_is_missing(folder):
    eight = command("python train_net.py --config-file configs/retinanet_R101")
    assert eight[-2:] == ["--num-gpus", "8"]
    coco = run([*eight[:-1], "1"], folder)  # which is started sooner
    assert coco.returncode == 2 and "Traceback" not in coco.stderr
    path = folder / "datasets/coco/annotations/instances_train2017.json"
    assert str(path) in coco.stderr and "DETECTRON2_DATASETS" in coco.stderr


@pytest.fixture(scope="module")
def stock(folder):
    """The published weights cannot be had here: a stock model's take their place."""
    model = make_model("MODEL.META_ARCHITECTURE", "RetinaNet", depth=50, num_classes=80)
    torch.save({"model": model.state_dict()}, folder / "stock.pth")
    return "stock.pth"


def test_published_weights_on_coco_of_one_image(stock, folder):
    coco = folder / "datasets/coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val2017").symlink_to(ROOT / "tests/fixtures/bccd_mini/images")
    content = json.loads((ROOT / "tests/fixtures/bccd_mini/instances_val.json").read_text())
    metadata = MetadataCatalog.get("coco_2017_val")
    ids = metadata.thing_dataset_id_to_contiguous_id
    content["categories"] = [{"id": i, "name": metadata.thing_classes[k]} for i, k in ids.items()]
    (coco / "annotations/instances_val2017.json").write_text(json.dumps(content))
    published = command("python train_net.py --config-file configs/retinanet_R50_FPN")
    assert published[-5].startswith("detectron2://COCO-Detection/retinanet_R_50_FPN_3x/")
    evaluated = run(published, folder, "MODEL.WEIGHTS", stock, *SMALL[:6])
    assert evaluated.returncode == 0, evaluated.stderr
    assert "Finished." in evaluated.stdout
