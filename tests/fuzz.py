"""Random configs, annotations and checkpoints: each is used, or refused in one line, in time.

``python tests/fuzz.py --cases 10000`` prints the cases by kind; ``tests/test_fuzz.py`` tries a few.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import math
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet_ext.config_keys import all_keys, read_key
from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.findings import KINDS
from retinanet_ext.data.mapper import CheckedDatasetMapper
from retinanet_ext.data.validation_report import check_data
from retinanet_ext.engine import Checkpointer, load_config, main
from retinanet_ext.engine.config_check import check_config, use_cpu_without_cuda
from retinanet_ext.engine.config_warnings import config_warnings
from retinanet_ext.engine.launch import check_model
from retinanet_ext.engine.scaling import scale_schedule
from retinanet_ext.errors import InputError
from retinanet_ext.modeling import RetinaNetExt

ROOT = Path(__file__).parents[1]
# The time limits of a case. A machine may be busy, so waiting is given longer.
CPU_SECONDS = 30
WALL_SECONDS = 600
MEMORY = 16 << 30

# A detector of few weights, so that it is built and saved within a fraction of a second.
THIN = {
    "MODEL": {
        "META_ARCHITECTURE": "RetinaNetExt",
        "DEVICE": "cpu",
        "BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 50,
            "NORM": "BN",
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 8,
            "WIDTH_PER_GROUP": 4,
            "OUT_FEATURES": ["res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res3", "res4", "res5"], "OUT_CHANNELS": 8},
        "ANCHOR_GENERATOR": {"NAME": "OctaveAnchorGenerator", "ASPECT_RATIOS": [[0.5, 1.0, 2.0]]},
        "RETINANET": {"NUM_CONVS": 1},
    },
    "INPUT": {
        "MIN_SIZE_TRAIN": [32],
        "MAX_SIZE_TRAIN": 64,
        "MIN_SIZE_TEST": 32,
        "MAX_SIZE_TEST": 64,
    },
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 1, "WARMUP_ITERS": 0},
    "VERSION": 2,
}


class Bench:
    """A folder with a config and a small data set, and counts of how cases ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: Counter[str] = Counter()
        self.slowest = 0.0
        (folder / "images").mkdir()
        for index in range(2):
            picture = Image.effect_noise((48, 32), 60).convert("RGB")
            picture.save(folder / f"images/{index}.png")
        self.data: dict[str, Any] = {
            "info": {},
            "images": [
                {"id": i + 1, "file_name": f"{i}.png", "width": 48, "height": 32} for i in range(2)
            ],
            "categories": [{"id": 1, "name": "cell"}, {"id": 5, "name": "dot"}],
            "annotations": [
                {
                    "id": i + 1,
                    "image_id": 1 + i % 2,
                    "category_id": 1 + 4 * (i % 2),
                    "bbox": [4.0 * i, 3.0, 16.0, 12.5],
                    "area": 200.0,
                    "iscrowd": int(i == 3),
                }
                for i in range(4)
            ],
        }
        self.write("data.json", json.dumps(self.data).encode())
        custom = {
            f"{split}_{part}": str(folder / name)
            for split in ("TRAIN", "TEST")
            for part, name in (("JSON", "data.json"), ("IMAGES", "images"))
        }
        self.config = {**THIN, "DATASETS": {"CUSTOM": custom}, "OUTPUT_DIR": str(folder / "run")}
        self.config_file = str(folder / "config.yaml")
        self.write("config.yaml", yaml.safe_dump(self.config).encode())
        self.cfg = load_config(self.config_file)
        self.cfg.MODEL.RETINANET.NUM_CLASSES = 2
        self.model = RetinaNetExt(self.cfg)
        self.weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.checkpoint = {
            "model": self.weights,
            "iteration": 0,
            "trainer": {"iteration": 0, "_trainer": {"optimizer": optimizer.state_dict()}},
        }

    def write(self, name: str, content: bytes) -> str:
        (self.folder / name).write_bytes(content)
        return str(self.folder / name)

    def attempt(self, case: Callable[[], Any]) -> None:
        """Run a case, which must end in success or in one line, in time."""
        started = time.process_time()
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, _time_is_up)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            case()
            end = "used"
        except (InputError, FloatingPointError) as error:
            message = str(error)
            assert message.strip(), "an empty message"
            assert isinstance(error, FloatingPointError) or "\n" not in message.strip(), message
            end = "refused"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.ends[end] += 1
        self.slowest = max(self.slowest, time.process_time() - started)


class TimeIsUp(BaseException):
    """Not an Exception, which the code under test might catch."""


def _time_is_up(*_: Any) -> None:
    raise TimeIsUp(f"no end within {CPU_SECONDS} s of CPU time, or {WALL_SECONDS} s")


# Values of every kind -------------------------------------------------------------------------

SPECIAL = [-(10**400), -(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**64, 10**400]
SPECIAL_FLOATS = [-1.0, -0.0, 1e-300, 0.5, 1.0, 2.0, 1e30, math.inf, -math.inf, math.nan]
TEXTS = ["", "a", "None", "cpu", "../..", "/dev/null", "a\0b", "é\n", "[1", "{", "%s", "1e5", "BN"]
# Half of a surrogate pair may stand in JSON and YAML, and cannot be written.
HALF_PAIRS = st.text(st.sampled_from("B\ud800\udcff"), min_size=1, max_size=3)

texts = st.sampled_from(TEXTS) | st.text(max_size=8) | HALF_PAIRS
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(SPECIAL)
    | st.sampled_from(SPECIAL_FLOATS)
    | st.floats()
    | st.integers(-20, 200)
    | texts
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)

# Kept from the draw: where results go, whether code is generated (minutes), who reads images.
FIXED_KEYS = ("OUTPUT_DIR", "MODEL.COMPILE", "MODEL.WEIGHTS")
# A training of few images and iterations, in this process.
TRAINED_KEYS = ("SOLVER.MAX_ITER", "DATALOADER.NUM_WORKERS", "SOLVER.IMS_PER_BATCH")


def like(default: Any) -> st.SearchStrategy[Any]:
    """Values of the type of a default, sane ones among them."""
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.sampled_from([*SPECIAL, default + 1, default // 2]) | st.integers(-2, 64)
    if isinstance(default, float):
        return st.sampled_from([*SPECIAL_FLOATS, default * 2, default / 2]) | st.floats(0, 2)
    if isinstance(default, list | tuple):
        element = like(default[0]) if default else values
        return st.lists(element | values, max_size=4) | st.just(list(default) * 2)
    return texts


def overrides(defaults: CfgNode, *, fixed: tuple[str, ...]) -> st.SearchStrategy[list[Any]]:
    """Pairs of a key and a value of its type or of any."""
    keys = [key for key in all_keys(defaults) if key not in fixed]

    def pair(key: str) -> st.SearchStrategy[tuple[str, Any]]:
        own = like(read_key(defaults, key))
        return st.tuples(st.just(key), own | own | own | values)

    known = st.sampled_from(keys).flatmap(pair)
    unknown = st.tuples(
        st.sampled_from(keys).map(lambda key: key[:-1]) | st.text(max_size=9), values
    )
    return st.lists(known | known | known | known | known | unknown, min_size=1, max_size=3)


# Kinds of cases -------------------------------------------------------------------------------


def fuzz_config(bench: Bench, cases: int) -> None:
    """Overrides, in a file or on the command line, up to the model and its optimizer."""
    fixed = (*FIXED_KEYS, *(key for key in all_keys(bench.cfg) if "CUSTOM" in key))

    @_settings(cases)
    @given(pairs=overrides(bench.cfg, fixed=fixed), in_file=st.booleans(), eval_only=st.booleans())
    def run(pairs: list[tuple[str, Any]], in_file: bool, eval_only: bool) -> None:
        bench.attempt(lambda: _check(bench, pairs, in_file, eval_only))

    run()


def _check(bench: Bench, pairs: list[tuple[str, Any]], in_file: bool, eval_only: bool) -> None:
    file, opts = _write_config(bench, pairs, in_file)
    cfg = load_config(file, opts)
    use_cpu_without_cuda(cfg, num_threads=1)
    check_config(cfg, num_processes=1, eval_only=eval_only)
    if not eval_only:
        scale_schedule(cfg)
    prepare_datasets(cfg, eval_only=eval_only)
    check_model(cfg, "", resume=False, eval_only=eval_only)
    config_warnings(cfg, "", eval_only=eval_only)


def _write_config(
    bench: Bench, pairs: list[tuple[str, Any]], in_file: bool
) -> tuple[str, list[str]]:
    if not in_file:
        return bench.config_file, [str(part) for pair in pairs for part in pair]
    content: dict[str, Any] = copy.deepcopy(bench.config)
    for key, value in pairs:
        node = content
        *groups, last = key.split(".")
        for group in groups:
            child = node.setdefault(group, {})
            node = child if isinstance(child, dict) else node
        node[last] = value
    return bench.write("fuzzed.yaml", yaml.safe_dump(content).encode()), []


def fuzz_train(bench: Bench, cases: int) -> None:
    """Overrides, through a whole training of one iteration and its evaluation."""
    fixed = (*FIXED_KEYS, *TRAINED_KEYS, *(k for k in all_keys(bench.cfg) if "CUSTOM" in k))

    @_settings(cases)
    @given(pairs=overrides(bench.cfg, fixed=fixed))
    def run(pairs: list[tuple[str, Any]]) -> None:
        bench.attempt(lambda: _train(bench, pairs))

    run()


def _train(bench: Bench, pairs: list[tuple[str, Any]]) -> None:
    output = bench.folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    opts = [str(part) for pair in pairs for part in pair]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["--config-file", bench.config_file, *opts])
    assert code in (0, 2, 3), said.getvalue()
    if code:
        raise InputError(said.getvalue().strip().splitlines()[-1])


def _paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if prefix:
        yield prefix
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from _paths(value, (*prefix, key))


@st.composite
def mutated(draw: Callable[..., Any], tree: Any) -> Any:
    """A tree of dicts and lists with up to four entries removed, replaced, repeated or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 4))):
        actions = ["remove", "replace", "replace", "repeat", "number", "text", "swap"]
        action = draw(st.sampled_from(actions))
        paths = list(_paths(tree))
        if action == "text":  # which few entries are
            paths = [path for path in paths if isinstance(reduce(getitem, path, tree), str)]
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        node = reduce(getitem, way, tree)
        if action == "remove":
            del node[last]
        elif action == "repeat" and isinstance(node, list):
            node.append(copy.deepcopy(node[last]))
        elif action == "number" and isinstance(node[last], int | float):
            node[last] = draw(
                st.sampled_from([*SPECIAL[1:-1], *SPECIAL_FLOATS]) | st.floats(-60, 60)
            )
        elif action == "text":
            node[last] = draw(texts)
        elif action == "swap":
            *other_way, other = draw(st.sampled_from(paths))
            found: Any = tree
            with contextlib.suppress(KeyError, IndexError, TypeError):
                for step in (*other_way, other):
                    found = found[step]
                node[last] = copy.deepcopy(found)
        else:
            node[last] = draw(values)
    return tree


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes cut off, with some changed, or with others between them."""
    place = st.integers(0, len(content))
    changed = st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=8)

    def change(places: list[tuple[int, int]]) -> bytes:
        new = bytearray(content)
        for index, byte in places:
            new[min(index, len(new) - 1)] = byte
        return bytes(new)

    return (
        place.map(lambda end: content[:end])
        | changed.map(change)
        | st.tuples(place, st.binary(max_size=9)).map(
            lambda p: content[: p[0]] + p[1] + content[p[0] :]
        )
    )


def fuzz_annotations(bench: Bench, cases: int) -> None:
    """A json with entries removed, replaced, repeated: checked, mapped, evaluated."""
    whole = json.dumps(bench.data).encode()
    choosable = {name: kind.policies for name, kind in KINDS.items() if len(kind.policies) > 1}
    lenient = {
        n: "drop" if "drop" in policies else policies[0] for n, policies in choosable.items()
    }
    some = st.fixed_dictionaries({n: st.sampled_from(choosable[n]) for n in choosable})
    changed = mutated(bench.data).map(lambda tree: json.dumps(tree).encode())

    @_settings(cases)
    @given(
        # Each half of the cases: "|" would count the ways to damage one by one.
        content=st.booleans().flatmap(lambda valid: changed if valid else damaged(whole)),
        policy=st.just(lenient) | some,
    )
    def run(content: bytes, policy: dict[str, str]) -> None:
        bench.attempt(lambda: _use_annotations(bench, content, policy))

    run()


def _use_annotations(bench: Bench, content: bytes, policy: dict[str, str]) -> None:
    cfg = bench.cfg.clone()
    cfg.DATASETS.CHECK.update({name.upper(): choice for name, choice in policy.items()})
    file = bench.write("fuzzed.json", content)
    cfg.DATASETS.CUSTOM.TRAIN_JSON = cfg.DATASETS.CUSTOM.TEST_JSON = file
    print(check_data(cfg).text)
    prepare_datasets(cfg, eval_only=False)
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    for record in DatasetCatalog.get("custom_train"):
        instances = mapper(record)["instances"]
        boxes = instances.gt_boxes.tensor
        assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (
            (instances.gt_classes >= 0) & (instances.gt_classes < cfg.MODEL.RETINANET.NUM_CLASSES)
        ).all()
    evaluator = COCOEvaluator("custom_test", output_dir=str(bench.folder / "evaluation"))
    evaluator.reset()
    evaluator.evaluate()


def fuzz_checkpoint(bench: Bench, cases: int) -> None:
    """Bytes changed, entries renamed, reshaped, retyped or replaced; other pickles."""
    whole = _saved(bench.checkpoint)
    entries = st.sampled_from(sorted(bench.weights))
    changes = st.lists(
        st.tuples(
            entries,
            st.sampled_from(["remove", "rename", "reshape", "retype", "replace", "nan", "empty"]),
            values,
        ),
        min_size=1,
        max_size=4,
    )

    def change(edits: list[tuple[str, str, Any]]) -> dict[str, Any]:
        weights: dict[Any, Any] = dict(bench.weights)
        for name, action, value in edits:
            tensor = weights.pop(name, torch.zeros(2))
            if not isinstance(tensor, torch.Tensor) or action == "remove":
                continue
            if action == "rename":
                weights[value if isinstance(value, str) else name[:-1]] = tensor
            else:
                weights[name] = _edited(tensor, action, value)
        return {**bench.checkpoint, "model": weights}

    zoo = {"__author__": "fuzz", "matching_heuristics": True}
    tree = {key: value for key, value in bench.checkpoint.items() if key != "model"}
    contents = (
        damaged(whole)
        | changes.map(lambda edits: _saved(change(edits)))
        | mutated(tree).map(lambda new: _saved({**new, "model": bench.weights}))
        | values.map(_saved)
        | values.map(pickle.dumps)
        | st.dictionaries(entries, values, max_size=3).map(lambda model: _saved({"model": model}))
        | st.dictionaries(entries, values, max_size=3).map(
            lambda model: pickle.dumps({"model": model, **zoo})
        )
    )
    ends = st.sampled_from([".pth", ".pkl"])
    modes = st.sampled_from(["fine-tune", "anew", "evaluate", "resume"])

    @_settings(cases)
    @given(content=contents, end=ends, mode=modes)
    def run(content: bytes, end: str, mode: str) -> None:
        bench.attempt(lambda: _load(bench, content, end, mode))

    run()


def _edited(tensor: torch.Tensor, action: str, value: Any) -> Any:
    floating = tensor.is_floating_point()
    if action == "reshape":
        return tensor.reshape(-1)[:1]
    if action == "retype":
        return tensor.to(torch.complex64 if floating else torch.bool)
    if action == "nan":
        return torch.full_like(tensor, math.nan) if floating else tensor
    return tensor.new_zeros(0) if action == "empty" else value


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _load(bench: Bench, content: bytes, end: str, mode: str) -> None:
    file = bench.write(f"fuzzed{end}", content)
    if mode == "resume":
        check_model(bench.cfg, file, resume=True, eval_only=False)
        return
    checkpointer = Checkpointer(
        bench.model, reinit_mismatched=mode == "anew", complete=mode == "evaluate"
    )
    checkpointer.load(file)


KINDS_OF_CASES: dict[str, tuple[Callable[[Bench, int], None], float]] = {
    "config": (fuzz_config, 0.38),
    "training": (fuzz_train, 0.04),
    "annotations": (fuzz_annotations, 0.33),
    "checkpoint": (fuzz_checkpoint, 0.25),
}
"""Name -> function, and its share of the cases."""


def _settings(cases: int) -> Any:
    return settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A bench in a folder of its own, which is the working directory meanwhile."""
    logging.disable(logging.CRITICAL)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limit[1]))
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as strict as a terminal
    place = Path.cwd()
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            with (
                mock.patch.dict(os.environ, DETECTRON2_DATASETS=folder),
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(output),
            ):
                yield Bench(Path(folder))
    finally:
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        logging.disable(logging.NOTSET)


def run_command_line() -> None:
    """Try as many cases as are asked for, and print how they ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--kind", choices=KINDS_OF_CASES, help="of this kind alone")
    args = parser.parse_args()
    total = 0
    for name, (fuzz, share) in KINDS_OF_CASES.items():
        if args.kind not in (None, name):
            continue
        started = time.monotonic()
        with bench() as here:
            fuzz(here, args.cases if args.kind else round(args.cases * share))
        count = here.ends.total()
        total += count
        print(
            f"{name}: {count} cases, {here.ends['used']} used, {here.ends['refused']} refused, "
            f"{time.monotonic() - started:.0f} s, the slowest {here.slowest:.1f} s of CPU time",
            flush=True,
        )
    print(f"{total} cases, each used or refused in one line")


if __name__ == "__main__":
    run_command_line()
