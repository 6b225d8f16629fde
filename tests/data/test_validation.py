from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from PIL import Image

from retinanet_ext.data import ValidationResult, image_files
from retinanet_ext.data.coco_json import read_coco_json
from retinanet_ext.data.findings import KINDS
from retinanet_ext.errors import InputError

from .conftest import BCCD_MINI, Bccd
from .eight_images import check

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIRST = "BloodImage_00164.jpg"  # image id 80, 640 x 480

Spoil = Callable[[Bccd], Any]


def put(key: str, index: int, **fields: Any) -> Spoil:
    return lambda bccd: bccd.train[key][index].update(fields)


def remove(key: str, index: int, field: str) -> Spoil:
    return lambda bccd: bccd.train[key][index].pop(field)


def box(*bbox: Any) -> Spoil:
    """Give annotation 1181 of image 80, 640 x 480, another box."""
    return put("annotations", 0, bbox=list(bbox))


def spoil_image(content: bytes | None, keep: int | None = None) -> Spoil:
    def spoil(bccd: Bccd) -> None:
        path = bccd.images / FIRST
        path.write_bytes(path.read_bytes()[:keep] if content is None else content)

    return spoil


def turn_image(bccd: Bccd) -> None:
    """Give the first image an EXIF orientation of a quarter turn."""
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(bccd.images / FIRST) as opened:
        opened.save(bccd.images / FIRST, exif=exif)


def repeat(bccd: Bccd, shift: float) -> None:
    first = bccd.train["annotations"][0]
    x, y, w, h = first["bbox"]
    bccd.train["annotations"].append({**first, "id": 9000, "bbox": [x + shift, y, w, h]})


def unbox(bccd: Bccd, image_id: int) -> None:
    annotations = bccd.train["annotations"]
    bccd.train["annotations"] = [a for a in annotations if a["image_id"] != image_id]


# What is done to the data -> the kind, and what its sentence names.
FAULTS: dict[str, tuple[Spoil, str, list[str]]] = {
    "no file_name": (
        remove("images", 1, "file_name"),
        "malformed_image",
        ["images[1] (id 125): file_name is missing"],
    ),
    "image id twice": (
        put("images", 1, id=80),
        "duplicate_image_id",
        ["image id 80 is used by BloodImage_00164.jpg, BloodImage_00254.jpg"],
    ),
    "path upwards": (
        put("images", 0, file_name=f"../images/{FIRST}"),
        "file_outside",
        ["(id 80): file_name '../images/BloodImage_00164.jpg' leaves the image folder by '..'"],
    ),
    "file twice": (
        put("images", 1, file_name=FIRST),
        "duplicate_file",
        [f"images/{FIRST} is listed under 2 image ids: 80, 125"],
    ),
    "another case": (
        put("images", 0, file_name=FIRST.upper()),
        "misnamed_file",
        ["(image id 80) is missing: upper and lower case differ; `BloodImage_00164.jpg` is there"],
    ),
    "image gone": (
        lambda bccd: (bccd.images / FIRST).unlink(),
        "missing_image",
        [f"images/{FIRST} (image id 80) is missing"],
    ),
    "image truncated": (spoil_image(None, 9000), "unreadable_image", [FIRST, "id 80", "truncated"]),
    "no image": (spoil_image(b"<html>"), "unreadable_image", [FIRST, "id 80", "not an image"]),
    "other size": (
        put("images", 0, width=641),
        "image_size",
        [FIRST, "(image id 80): it has 640 x 480 pixels when upright, not 641 x 480"],
    ),
    "turned by EXIF": (turn_image, "image_size", [FIRST, "has 480 x 640", "not 640 x 480"]),
    "category id twice": (
        put("categories", 1, id=1),
        "duplicate_category",
        ["category id 1 is used 2 times"],
    ),
    "category name twice": (
        put("categories", 1, name="RBC"),
        "duplicate_category",
        ["category name RBC is used 2 times"],
    ),
    "iscrowd 2": (
        put("annotations", 0, iscrowd=2),
        "malformed_annotation",
        ["annotation 1181 of image 80 (BloodImage_00164.jpg): iscrowd is 2; it must be 0 or 1"],
    ),
    "annotation id twice": (
        put("annotations", 1, id=1181),
        "duplicate_annotation_id",
        ["annotation 1181", "used before"],
    ),
    "unknown image_id": (
        put("annotations", 0, image_id=999),
        "unknown_image",
        ["annotations[0] (id 1181, image_id 999): image_id 999 is not among the images"],
    ),
    "unknown category_id": (
        put("annotations", 0, category_id=0),
        "unknown_class",
        ["annotation 1181 of image 80", "category_id 0 is not a category (1, 2, 3)"],
    ),
    "no bbox": (
        remove("annotations", 2, "bbox"),
        "malformed_box",
        ["annotation 1183 of image 80 (BloodImage_00164.jpg): bbox is missing"],
    ),
    "NaN": (
        box(1, 2, float("nan"), 4),
        "malformed_box",
        ["annotation 1181 of image 80", "bbox is [1, 2, nan, 4]", "4 finite numbers"],
    ),
    "width negative": (box(9, 9, -3, 4), "inverted_box", ["1181", "[9, 9, -3, 4]", ">= 0"]),
    "no width": (box(100, 100, 0, 20), "zero_area_box", ["1181", "[100, 100, 0, 20]"]),
    "no width in float32": (box(600, 100, 1e-5, 20), "zero_area_box", ["1181"]),
    "right of the image": (
        box(640, 100, 20, 20),
        "outside_box",
        ["1181", "[640, 100, 20, 20] is outside its image of 640 x 480"],
    ),
    "too far for floats": (box(1e308, 0, 1e308, 20), "outside_box", ["1181"]),
    "over the right edge": (box(600, 400, 90, 20), "clipped_box", ["1181", "640 x 480"]),
    "same box": (
        lambda bccd: repeat(bccd, 0),
        "duplicate_box",
        ["annotations 1181 and 9000 of image 80", "IoU 1.00"],
    ),
    "crowd": (put("annotations", 0, iscrowd=1), "crowd", ["annotation 1181", "iscrowd is 1"]),
    "ignore": (put("annotations", 0, ignore=1), "ignore", ["annotation 1181", "ignore is 1"]),
    "image without boxes": (
        lambda bccd: unbox(bccd, 80),
        "empty_image",
        ["image 80 (BloodImage_00164.jpg) has no box"],
    ),
    "class without boxes": (
        lambda bccd: bccd.train["categories"].append({"id": 4, "name": "Worm"}),
        "unused_class",
        ["class Worm (category 4) has no box"],
    ),
}
ZERO_AREA = {"zero_area_box": 1}  # of annotation 2288, in the data as they came


def check_train(bccd: Bccd, **policy: str) -> ValidationResult:
    return check(bccd.train, bccd.images, **policy)


def count(checked: ValidationResult) -> dict[str, int]:
    return {kind: len(findings) for kind, findings in checked.by_kind().items()}


@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_found_named_and_treated_as_its_kind_says(
    case: str, bccd: Bccd, cfg: CfgNode
) -> None:
    spoil, kind, expected = FAULTS[case]
    spoil(bccd)
    checked = check_train(bccd)
    messages = [finding.message for finding in checked.by_kind()[kind]]
    assert any(all(part in message for part in expected) for message in messages), messages
    # Whatever is allowed ends in data that can be used, or in one line.
    for policy in KINDS[kind].policies:
        done = check_train(bccd, **{kind: policy})
        assert len(done.by_kind()[kind]) == len(checked.by_kind()[kind])
        if policy == "refuse":
            with pytest.raises(InputError) as error:
                done.raise_refused()
            assert str(error.value).startswith("mine.json: ") and str(error.value).isprintable()
            mended = KINDS[kind].remedy or ("drop" if "drop" in KINDS[kind].policies else "")
            remedy = f"({KINDS[kind].key} {mended}" if mended else ""
            assert remedy in str(error.value)
        else:
            keep = dict.fromkeys(KINDS, "keep")
            found = count(check(done.content, bccd.images, **keep))
            assert (kind in found) == (policy == "keep"), found


def test_nothing_else_is_found(bccd: Bccd) -> None:
    assert count(check_train(bccd)) == ZERO_AREA


def test_all_faults_are_found_at_once(bccd: Bccd) -> None:
    """Each of the faults of one annotation or image that leave the others visible."""
    put("annotations", 0, image_id=999, category_id=77, bbox=[1, 2, 3], iscrowd=1)(bccd)
    put("annotations", 1, bbox=[9, 9, -3, 4], ignore=1)(bccd)
    put("images", 1, width=0)(bccd)
    spoil_image(b"")(bccd)
    assert count(check_train(bccd)) == {
        "malformed_image": 1,
        "unreadable_image": 1,
        "unknown_image": 1,
        "unknown_class": 1,
        "malformed_box": 1,
        "inverted_box": 1,
        "crowd": 1,
        "ignore": 1,
        **ZERO_AREA,
    }


def test_boxes_go_with_their_image(bccd: Bccd) -> None:
    spoil_image(b"")(bccd)
    done = check_train(bccd, unreadable_image="drop").content
    assert [image["id"] for image in done["images"]] == [125, 171]
    assert {a["image_id"] for a in done["annotations"]} == {125, 171}


@pytest.mark.parametrize(("shift", "is_same"), [(2, True), (40, False)])
def test_boxes_of_one_object_overlap_almost_wholly(shift: int, is_same: bool, bccd: Bccd) -> None:
    repeat(bccd, shift)
    assert ("duplicate_box" in count(check_train(bccd))) == is_same
    done = check_train(bccd, duplicate_box="drop").content["annotations"]
    assert len(done) == 36 - is_same
    bccd.train["annotations"][-1]["category_id"] = 2
    assert "duplicate_box" not in count(check_train(bccd))


def test_real_annotations_as_they_came(tmp_path: Path) -> None:
    """The images of BCCD in which something is wrong; one photo stands for all of them."""
    content = read_coco_json(str(FIXTURES / "bccd_faults" / "instances_raw.json"))
    for image in content["images"]:
        shutil.copy(BCCD_MINI / "images" / FIRST, tmp_path / image["file_name"])
    checked = check(content, tmp_path)
    assert count(checked) == {"zero_area_box": 2, "duplicate_box": 6}
    pairs = [finding.message for finding in checked.by_kind()["duplicate_box"]]
    assert all("IoU 0.9" in message for message in pairs)
    assert len(checked.content["annotations"]) == 124 - 2
    checked.raise_refused()


def test_refusal_counts_what_it_does_not_show(bccd: Bccd) -> None:
    for index in range(5):
        box(1, 2, 3)(bccd)
        put("annotations", index, bbox=None)(bccd)
    put("annotations", 6, category_id=9)(bccd)
    with pytest.raises(InputError) as error:
        check_train(bccd).raise_refused()
    message = str(error.value)
    assert message.startswith("mine.json: annotation 1187 of image 80")
    assert "(DATASETS.CHECK.UNKNOWN_CLASS drop leaves it out)" in message
    assert "; boxes that are not four finite numbers: 5; retinanet-ext check-data" in message
    put("annotations", 6, category_id=1)(bccd)
    with pytest.raises(InputError, match=r"5 boxes that .* leaves them out\); retinanet-ext check"):
        check_train(bccd).raise_refused()


@pytest.mark.parametrize("case", ["no image", "other size", "turned by EXIF"])
def test_headers_show_faults_of_a_large_set(
    case: str, bccd: Bccd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MAX_DECODED_IMAGES", 2)
    spoil, kind, _ = FAULTS[case]
    spoil(bccd)
    assert count(check_train(bccd)) == {kind: 1, **ZERO_AREA}


@pytest.mark.parametrize("max_decoded", [2, 3], ids=["headers", "decoded"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_size_is_that_of_the_upright_image(
    max_decoded: int, suffix: str, bccd: Bccd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MAX_DECODED_IMAGES", max_decoded)
    turn_image(bccd)
    image = bccd.train["images"][0]
    with Image.open(bccd.images / FIRST) as opened:
        opened.save(bccd.images / f"turned{suffix}", exif=opened.getexif())
    image.update(file_name=f"turned{suffix}", width=480, height=640)
    assert not count(check_train(bccd)).keys() & {"image_size", "unreadable_image"}


def test_files_outside_the_folder_are_not_opened(
    bccd: Bccd, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bccd.folder / "secret.jpg").write_bytes(b"")
    put("images", 0, file_name="../secret.jpg")(bccd)
    opened = []
    inspect = image_files.inspect_image
    monkeypatch.setattr(
        image_files, "inspect_image", lambda p, *a, **k: opened.append(p) or inspect(p, *a, **k)
    )
    check_train(bccd)
    assert len(opened) == 2 and not any("secret" in path for path in opened)
