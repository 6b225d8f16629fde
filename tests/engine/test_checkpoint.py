"""Weights that do not fit are refused, what does fit is loaded, and what is saved is whole."""

import pickle
import re
import resource
import zipfile

import pytest
import torch
from detectron2.utils import comm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from detectors import make_cfg, make_model
from retinanet_ext.engine import Checkpointer, export_weights, launch
from retinanet_ext.engine.find_checkpoint import find_weights, last_checkpoint
from retinanet_ext.errors import InputError
from training import no_cuda

CLS_SCORE = "head.cls_score.weight"


@pytest.fixture(scope="module")
def weights():
    return make_model(num_classes=4).state_dict()


@pytest.fixture
def model():
    return make_model(num_classes=4)


def save(content, path):
    torch.save(content, path)
    return str(path)


def backbone_pkl(weights, path, **changed):
    """A file as Detectron2's ImageNet backbones are: arrays under names without a prefix."""
    prefix = "backbone.bottom_up."
    arrays = {
        name.removeprefix(prefix): tensor.numpy()
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }
    content = {"model": arrays | changed, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return str(path)


def test_detectron2_weights_fill_the_model(model, tmp_path):
    stock = make_model("MODEL.META_ARCHITECTURE", "RetinaNet", num_classes=4)
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    path = save(stock.state_dict(), tmp_path / "stock.pth")
    Checkpointer(model, complete=True).load(path)
    loaded = model.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_other_shape_is_refused(weights, tmp_path):
    path = save({"model": weights}, tmp_path / "four.pth")
    checkpointer = Checkpointer(make_model(num_classes=3))
    with pytest.raises(InputError) as raised:
        checkpointer.load(path)
    message = str(raised.value)
    # 9 anchors a cell.
    for text in (path, CLS_SCORE, "(36, 32, 3, 3)", "(27, 32, 3, 3)", "1 more", "REINIT"):
        assert text in message


def test_other_shape_starts_anew_where_asked(weights, tmp_path, caplog):
    model = make_model(num_classes=3)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in weights.items()}
    path = save({"model": weights}, tmp_path / "four.pth")
    Checkpointer(model, reinit_mismatched=True).load(path)
    assert "start anew: head.cls_score.weight is (36, 32, 3, 3)" in caplog.text
    loaded = model.state_dict()
    assert torch.equal(loaded[CLS_SCORE], fresh[CLS_SCORE])
    name = "head.bbox_pred.weight"
    assert torch.equal(loaded[name], weights[name])


def test_resuming_never_starts_layers_anew(weights, tmp_path):
    path = save({"model": weights, "trainer": {}}, tmp_path / "four.pth")
    checkpointer = Checkpointer(
        make_model(num_classes=3), reinit_mismatched=True, trainer=nn.Linear(1, 1)
    )
    with pytest.raises(InputError, match="resume with the config"):
        checkpointer.load(path)


def test_resuming_with_another_optimizer_is_refused(weights, model, tmp_path):
    saved = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1).state_dict()
    path = save({"model": weights, "optimizer": saved}, tmp_path / "run.pth")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match=r"run\.pth do not load: .*parameter group.*resuming"):
        Checkpointer(model, optimizer=optimizer).load(path)


def test_backbone_alone_trains_but_does_not_evaluate(weights, model, tmp_path):
    weights = {name: tensor + 1 for name, tensor in weights.items()}
    path = backbone_pkl(weights, tmp_path / "R-18.pkl")
    Checkpointer(model).load(path)
    name = "backbone.bottom_up.res3.0.conv1.weight"
    assert torch.equal(model.state_dict()[name], weights[name])
    with pytest.raises(InputError, match=r"lack \d+ tensors .* such as backbone\.fpn"):
        Checkpointer(model, complete=True).load(path)


def test_backbone_of_another_width_is_refused(weights, model, tmp_path):
    other = {"res5.0.conv1.weight": torch.zeros(8, 8, 3, 3).numpy()}
    path = backbone_pkl(weights, tmp_path / "R-18.pkl", **other)
    with pytest.raises(InputError, match=r"res5\.0\.conv1\.weight is \(8, 8, 3, 3\), the model's"):
        Checkpointer(model).load(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_pickle_protocol_are_read(protocol, weights, model, tmp_path):
    arrays = {name: (tensor + 1).numpy() for name, tensor in weights.items()}
    content = {"model": arrays, "__author__": "test", "step": arrays[CLS_SCORE].sum()}
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    Checkpointer(model).load(str(path))
    assert all(torch.equal(model.state_dict()[name], weights[name] + 1) for name in weights)


class Payload:
    """Makes a file when it is unpickled, by a function that harmless pickles of old files name."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return getattr, (self.file, "touch")


def test_a_pickle_of_arrays_runs_no_code(model, tmp_path):
    path = tmp_path / "weights.pkl"
    content = {"model": {CLS_SCORE: Payload(tmp_path / "ran")}, "__author__": "test"}
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"weights\.pkl are damaged, or hold Python objects"):
        Checkpointer(model).load(str(path))


@pytest.mark.parametrize("channels", [3, 4])
def test_caffe2_names(channels, model, tmp_path):
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps({"conv1_w": torch.ones(64, channels, 7, 7).numpy()}))
    if channels == 3:
        Checkpointer(model).load(str(path))
        assert model.backbone.bottom_up.stem.conv1.weight.eq(1).all()
    else:
        with pytest.raises(InputError, match=r"stem\.conv1\.weight is \(64, 4, 7, 7\)"):
            Checkpointer(model).load(str(path))


def test_weights_of_nothing_in_the_model_are_refused(model, tmp_path):
    path = save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(InputError, match=r"linear\.pth hold no tensor of this model"):
        Checkpointer(model).load(path)


def test_evaluation_refuses_a_deeper_model(model, tmp_path):
    """R-18's names and shapes are among R-34's: nothing is missing."""
    path = save(make_model(depth=34).state_dict(), tmp_path / "R34.pth")
    with pytest.raises(InputError, match=r"no place for, such as backbone\.bottom_up\.res"):
        Checkpointer(model, complete=True).load(path)


def test_evaluation_takes_old_files_with_pixel_mean(weights, model, tmp_path):
    old = weights | {"pixel_mean": torch.zeros(3, 1, 1)}
    Checkpointer(model, complete=True).load(save(old, tmp_path / "old.pth"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint",
        pickle.dumps({"model": {}}),
        "truncated",
        [1, 2],
        {"model": 3},
        {"model": {"name": "text"}},
        None,
    ],
    ids=["empty", "text", "pickle", "truncated", "list", "model is 3", "text in it", "missing"],
)
def test_damaged_file(content, weights, model, tmp_path):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        save({"model": weights}, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif content is not None:
        save(content, path)
    with pytest.raises(InputError, match=r"model\.pth") as raised:
        Checkpointer(model).load(str(path))
    assert "\n" not in str(raised.value)


def test_exported_weights_are_detectron2s(weights, tmp_path):
    checkpoint = save({"model": weights, "trainer": {"iteration": 3}}, tmp_path / "run.pth")
    output = tmp_path / "weights.pth"
    export_weights(checkpoint, output)
    stock = make_model("MODEL.META_ARCHITECTURE", "RetinaNet", num_classes=4)
    exported = torch.load(output)
    assert list(exported) == ["model"]
    assert list(exported["model"]) == list(stock.state_dict())
    stock.load_state_dict(exported["model"])
    before = output.read_bytes()
    with pytest.raises(InputError, match="exists"):
        export_weights(checkpoint, output)
    assert output.read_bytes() == before


FIRST, SECOND = "model_0000004.pth", "model_0000009.pth"


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, small ones, as a run writes them."""
    model = nn.Linear(4, 3)
    checkpointer = Checkpointer(model, str(tmp_path))
    for iteration in (4, 9):
        nn.init.constant_(model.bias, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return tmp_path


def bias_after_resuming(folder):
    """Load the run as resuming does and return the iteration that the weights are of."""
    model = nn.Linear(4, 3)
    checkpointer = Checkpointer(model, str(folder))
    content = checkpointer.resume_or_load("", resume=True)
    assert model.bias.eq(content["iteration"]).all()
    return content["iteration"]


def test_the_last_checkpoint_is_the_newest(run):
    assert (run / "last_checkpoint").read_text() == SECOND
    assert last_checkpoint(run) == str(run / SECOND)
    assert {path.name for path in run.iterdir()} == {FIRST, SECOND, "last_checkpoint"}
    assert bias_after_resuming(run) == 9


def test_a_full_disk_costs_no_checkpoint(run):
    """The limit stands in for the disk: both end a write in the middle."""
    before = {path: path.read_bytes() for path in run.iterdir()}
    checkpointer = Checkpointer(nn.Linear(100, 100), str(run))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError) as raised:
            checkpointer.save("model_0000014")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = f"{run / 'model_0000014.pth'} cannot be written: File too large"
    assert str(raised.value) == message
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_what_a_kill_left_is_passed_over_and_written_over(run):
    (run / ".unfinished_checkpoint").write_bytes((run / SECOND).read_bytes()[:700])
    assert last_checkpoint(run) == str(run / SECOND)
    Checkpointer(nn.Linear(4, 3), str(run)).save("model_0000014")
    assert not (run / ".unfinished_checkpoint").exists()
    assert last_checkpoint(run) == str(run / "model_0000014.pth")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_checkpoint_is_found_or_means_the_same(run, data):
    whole = (run / SECOND).read_bytes()
    if data.draw(st.booleans()):
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
        expected = {4}
    else:
        position = data.draw(st.integers(0, len(whole) * 8 - 1))
        content = bytearray(whole)
        content[position // 8] ^= 1 << position % 8
        expected = {4, 9}  # a bit of an entry's date changes nothing
    (run / SECOND).write_bytes(content)
    try:
        assert bias_after_resuming(run) in expected
    finally:
        (run / SECOND).write_bytes(whole)


def load_in_one_of_two_processes(folder):
    """Write down how often this process compared checksums, and what it loaded."""
    compared, testzip = [], zipfile.ZipFile.testzip
    zipfile.ZipFile.testzip = lambda archive: compared.append(archive.filename) or testzip(archive)
    iteration = bias_after_resuming(folder)
    (folder / f"rank{comm.get_rank()}").write_text(f"{len(compared)} {iteration}")


def test_the_first_process_of_a_machine_verifies_for_all(run, monkeypatch):
    """The damaged checkpoint and the one before are each verified once, and all pass it over."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (run / SECOND).write_bytes(damaged_tensor(run / SECOND))
    with no_cuda():
        assert launch(load_in_one_of_two_processes, 2, args=(run,)) == 0
    assert [(run / f"rank{rank}").read_text() for rank in (0, 1)] == ["2 4", "0 4"]


def test_a_flipped_bit_in_a_tensor_is_found_in_any_weights(weights, model, tmp_path):
    """torch itself loads such a file."""
    path = save({"model": weights}, tmp_path / "model.pth")
    content = bytearray((tmp_path / "model.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.pth").write_bytes(content)
    torch.load(path)
    with pytest.raises(InputError, match=r"model\.pth are damaged"):
        Checkpointer(model).load(path)


@pytest.mark.parametrize(
    ("lost", "spoilt", "expected"),
    [
        ([SECOND], [], f"names .*{SECOND}, which is missing; .*{FIRST} is used"),
        (["last_checkpoint"], [], f"last_checkpoint is missing; .*{SECOND} is used"),
        (["last_checkpoint", SECOND], [], f"last_checkpoint is missing; .*{FIRST} is used"),
        ([], [SECOND], f"{SECOND} are damaged.*; .*{FIRST} is used"),
    ],
)
def test_the_checkpoint_before_is_used_and_said_so(lost, spoilt, expected, run, caplog):
    for name in lost:
        (run / name).unlink()
    for name in spoilt:
        (run / name).write_bytes(b"PK")
    bias_after_resuming(run)
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(messages) == 1 and re.search(expected, messages[0])


def test_a_damaged_file_that_is_named_in_the_config_is_refused(run):
    """Only ``--resume`` may use another checkpoint than the one that is named."""
    (run / SECOND).write_bytes(b"PK")
    for checkpointer in (Checkpointer(nn.Linear(4, 3)), Checkpointer(nn.Linear(4, 3), str(run))):
        with pytest.raises(InputError, match=f"{SECOND} are damaged"):
            checkpointer.load(str(run / SECOND), checkpointables=[])


def test_a_name_that_is_none_is_passed_over(run, caplog):
    (run / "last_checkpoint").write_bytes(b"model\x00\xff")
    assert bias_after_resuming(run) == 9
    assert "last_checkpoint is damaged" in caplog.text


def test_a_checkpoint_after_the_named_one_is_left_alone(run):
    """A person who names an earlier one has a reason to."""
    (run / "model_final.pth").write_bytes((run / SECOND).read_bytes())
    (run / "last_checkpoint").write_text(FIRST)
    assert last_checkpoint(run) == str(run / FIRST)
    (run / FIRST).write_bytes(b"")
    with pytest.raises(InputError, match=f"{FIRST} are damaged"):
        bias_after_resuming(run)


def test_the_end_of_a_run_before_it_was_extended_is_gone_back_to(run, caplog):
    (run / SECOND).rename(run / "model_final.pth")
    Checkpointer(nn.Linear(4, 3), str(run)).save("model_0000014", iteration=14)
    (run / "model_0000014.pth").write_bytes(b"PK")
    assert bias_after_resuming(run) == 9
    # And from that one to the checkpoint of the same iteration.
    (run / SECOND).write_bytes((run / "model_final.pth").read_bytes())
    (run / "last_checkpoint").write_text("model_final.pth")
    for content in (damaged_tensor(run / SECOND), b"PK"):
        (run / "model_final.pth").write_bytes(content)
        assert bias_after_resuming(run) == 9
        assert caplog.records[-1].getMessage().endswith(f"{SECOND} is used")


def damaged_tensor(path):
    """The bytes of a checkpoint with a bit of its bias flipped, whose iteration can be read."""
    bias = torch.load(path)["model"]["bias"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(bias)] ^= 1
    return bytes(content)


def test_all_damaged_checkpoints_are_named(run):
    for name in (FIRST, SECOND):
        (run / name).write_bytes(b"PK")
    with pytest.raises(InputError) as raised:
        bias_after_resuming(run)
    message = str(raised.value)
    assert "\n" not in message and "another OUTPUT_DIR" in message
    assert f"{SECOND} are damaged" in message and f"{FIRST} are damaged" in message


def test_what_is_loaded_without_a_run(tmp_path):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path))
    assert last_checkpoint(tmp_path) == ""
    with pytest.raises(InputError, match="which holds none"):
        find_weights(cfg, resume=True, eval_only=True)
    (tmp_path / "last_checkpoint").write_text("model_9.pth")
    with pytest.raises(InputError, match=r"names .*model_9\.pth, which is missing: no checkpoint"):
        find_weights(cfg, resume=True, eval_only=False)
