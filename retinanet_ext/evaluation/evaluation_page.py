"""The page of an evaluation: ``evaluate`` writes it, and beside it all of its figures as JSON."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from retinanet_ext.data.coco_json import printable
from retinanet_ext.data.images import ImageReader
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_matches import ERROR_KINDS, Matches
from retinanet_ext.evaluation.detection_metrics import COCO_MAX_DETECTIONS
from retinanet_ext.evaluation.detector_report import AP_NAMES, Report, evaluate_detections
from retinanet_ext.evaluation.error_examples import LABEL_DOUBTS
from retinanet_ext.evaluation.error_pictures import ErrorPictures
from retinanet_ext.evaluation.evaluation_figures import draw_evaluation, weakest
from retinanet_ext.evaluation.score_curves import FROC_RATES
from retinanet_ext.evaluation.threshold_choice import Criterion
from retinanet_ext.files import make_folder, to_json, write_file
from retinanet_ext.page import anchor, escape, markdown_table, number, render_page

MAX_ROWS = 12
"""Number of classes in the tables between the figures; a last section has all of them."""

MAX_CONFUSIONS = 12
MAX_DOUBTS = 8

BOX = "box (x, y, width, height)"
DOUBT_COLUMNS = {
    "unlabelled": {"detected": "detected as", "score": "score", "detected_bbox": BOX},
    "unfound": {"annotation_id": "annotation", "label": "label", "bbox": BOX},
    "class": {
        "annotation_id": "annotation",
        "label": "label",
        "detected": "detected as",
        "score": "score",
    },
}


Shown = Mapping[str, Sequence[str]]
"""Name of a figure or picture -> its files. One that could not be drawn is left out."""


@dataclass(frozen=True)
class Source:
    """What is evaluated.

    Attributes:
        title: heading of the page
        facts: what -> text, such as the files
        file_names: image id -> file name in the annotations; empty where there is none
        images: image id -> file; empty where there are no pictures
        reader: reads the images
        max_detections: per image and class
    """

    title: str
    facts: Mapping[str, str]
    file_names: Mapping[Any, str]
    images: Mapping[Any, str]
    reader: ImageReader
    max_detections: int = COCO_MAX_DETECTIONS


def write_evaluation(
    data: BoxData, source: Source, criterion: Criterion, stem: Path
) -> dict[str, Any]:
    """Write ``<stem>.json`` and ``<stem>.html``, and return the content of the former.

    They depend on the arguments alone, and replace earlier ones. An image that cannot be read is
    left out of the page, and a warning names it.

    Args:
        data: ground truth and detections
        source: what they are
        criterion: what the threshold of each class is chosen for
        stem: path of both files without suffix; its folder is created

    Raises:
        InputError: there are no objects, or a file cannot be written
    """
    matches, report = evaluate_detections(data, criterion, source.max_detections)
    report = {"source": dict(source.facts), **report}
    for each in chain(report["worst_images"], *report["label_doubts"].values()):
        each["file_name"] = source.file_names[each["image_id"]]
    make_folder(stem.parent)
    write_file(Path(f"{stem}.json"), to_json(report, indent=1, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, parts in draw_evaluation(matches, report).items():
            for number, svg in enumerate(parts):
                (folder / f"{name}-{number}.svg").write_bytes(svg)
        if source.images:
            _draw_pictures(matches, report, source, folder)
        shown: dict[str, list[str]] = {}
        for path in sorted(folder.iterdir()):
            shown.setdefault(path.stem.partition("-")[0], []).append(path.name)
        page = render_page(_render(report, source, shown), folder, title=source.title)
    write_file(Path(f"{stem}.html"), page)
    return report


def _draw_pictures(matches: Matches, report: Report, source: Source, folder: Path) -> None:
    """Write the pictures of errors."""
    thresholds = [each["threshold"]["threshold"] for each in report["classes"]]
    pictures = ErrorPictures(matches, thresholds, source.images, source.reader)
    for index, image in enumerate(report["worst_images"]):
        pictures.draw_image(image, folder / f"worst_{index}.png")
    for name, doubts in report["label_doubts"].items():
        if doubts:
            pictures.draw_doubts(doubts, folder / f"doubts_{name}.png")


def _render(report: Report, source: Source, shown: Shown) -> str:
    """Return the page in Markdown."""
    facts = {
        **source.facts,
        "images": str(report["num_images"]),
        "objects": str(report["num_objects"]),
        "detections": f"{report['num_detections']}, of which AP counts up to "
        f"{report['max_detections']} per image and class",
    }
    blocks = ["\n".join(f"- **{name}**: {_escape(text)}" for name, text in facts.items())]
    many = len(report["classes"]) > MAX_ROWS
    labels = weakest(report, MAX_ROWS)
    weak = f" Of {len(report['classes'])} classes, those with the lowest AP." if many else ""
    blocks += _average_precision(report, shown, labels, weak)
    blocks += _thresholds(report, shown, labels, weak)
    blocks += _confusion(report, shown)
    blocks += _errors(report, shown, labels, weak)
    blocks += _calibration(report, shown, labels, weak)
    blocks += _worst_images(report, shown)
    blocks += _label_doubts(report, shown)
    if many:
        every = range(len(report["classes"]))
        blocks += ["## All classes", _ap_table(report, every), _threshold_table(report, every)]
    titles = [block.removeprefix("## ") for block in blocks if block.startswith("## ")]
    contents = " · ".join(f"[{title}](#{anchor(title)})" for title in titles)
    return "\n\n".join([f"# {_escape(source.title)}", contents, *blocks]) + "\n"


def _average_precision(
    report: Report, shown: Shown, labels: Sequence[int], weak: str
) -> Iterator[str]:
    yield "## Average precision"
    yield (
        "COCO's AP in percent: the mean over IoU .50 to .95; at IoU .50 and .75; of small (below "
        f"32 x 32 pixels), medium and large objects (from 96 x 96).{weak}"
    )
    yield _ap_table(report, labels)
    recalls = ", ".join(f"{k} {v:.1f}" for k, v in report["metrics"].items() if k not in AP_NAMES)
    yield f"Average recall with 1, 10 and all counted detections per image and class: {recalls}."
    yield from _figure(shown, "precision_recall", "Precision against recall at IoU .5.")


def _ap_table(report: Report, labels: Iterable[int]) -> str:
    rows = [["**mean**", *(number(report["metrics"][name]) for name in AP_NAMES), "", ""]]
    for each in (report["classes"][label] for label in labels):
        numbers = [number(each[name]) for name in AP_NAMES]
        rows.append([_name(each), *numbers, str(each["objects"]), str(each["detections"])])
    return markdown_table(["class", *AP_NAMES, "objects", "detections"], rows)


def _thresholds(report: Report, shown: Shown, labels: Sequence[int], weak: str) -> Iterator[str]:
    yield "## Operating thresholds"
    yield (
        f"The score from which a detection counts, chosen per class for {report['criterion']} at "
        "IoU .5 on all images. Precision, recall and F1 are of the same images, so they are "
        f"optimistic. The last two are not: {_measure(report)} on one half of the images, with a "
        f"threshold chosen on the other half, and with .5 for every class.{weak}"
    )
    yield _threshold_table(report, labels)
    yield from _figure(
        shown, "scores", "Precision, recall and F1 by threshold; dotted: the chosen threshold."
    )


def _threshold_table(report: Report, labels: Iterable[int]) -> str:
    measure = report["measure"]
    rows = []
    for each in (report["classes"][label] for label in labels):
        chosen = each["threshold"]
        numbers = [chosen[key] for key in ("threshold", "precision", "recall", "f1")]
        numbers += [chosen[half][measure] for half in ("other_half", "other_half_at_0.5")]
        rows.append([_name(each), *(number(value, 3) for value in numbers), chosen["note"]])
    head = ["class", "threshold", "precision", "recall", "F1"]
    head += [f"{_measure(report)}, other half", "at .5, same half", "note"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return markdown_table(head, rows)


def _measure(report: Report) -> str:
    return report["measure"].replace("f1", "F1")


def _confusion(report: Report, shown: Shown) -> Iterator[str]:
    yield "## Confusion of classes"
    yield (
        "Rows are objects, columns what they are detected as at these thresholds and IoU .5. The "
        "last column counts objects that nothing finds. The last row counts detections where there "
        "is no object, or one that is found already. Detections on crowd regions do not count."
    )
    if "confusion" in shown:
        yield from _figure(shown, "confusion", "Numbers; the shade is the share of the row.")
        return
    names = [each["name"] for each in report["classes"]]
    matrix = np.array(report["confusion"])[:-1, :-1]
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:MAX_CONFUSIONS]
    rows = []
    for label, detected in zip(*np.unravel_index(order, matrix.shape), strict=True):
        if number := matrix[label, detected]:
            share = number / report["classes"][label]["objects"]
            rows.append(
                [_escape(names[label]), _escape(names[detected]), str(number), f"{share:.0%}"]
            )
    if rows:
        yield "The most frequent confusions; the JSON has the whole matrix."
        yield markdown_table(["object", "detected as", "number", "of the class's objects"], rows)
    else:
        yield "No class is taken for another."


def _errors(report: Report, shown: Shown, labels: Sequence[int], weak: str) -> Iterator[str]:
    yield "## Kinds of error"
    yield (
        "What is wrong with the detections that find no object, of any score, and by how much AP50 "
        f"({report['AP50_of_errors']:.1f}) would rise without that kind alone "
        "(TIDE, arXiv 2008.08115). Errors of low score cost little, however many "
        "they are."
    )
    yield from _figure(shown, "errors", "Lost AP50, and in brackets the number of errors.")
    yield "\n".join(f"- **{name}**: {what}" for name, what in ERROR_KINDS.items())
    if len(report["classes"]) > 1:
        yield f"Number of errors by class.{weak}"
        rows = [
            [_name(each), *map(str, each["errors"].values())]
            for each in (report["classes"][label] for label in labels)
        ]
        yield markdown_table(["class", *ERROR_KINDS], rows)


def _calibration(report: Report, shown: Shown, labels: Sequence[int], weak: str) -> Iterator[str]:
    yield "## Calibration and false positives"
    yield (
        "A calibrated score says how often a detection is right. The expected calibration error is "
        "the mean difference between score and share of right detections: "
        f"**{report['calibration']['error']:.3f}**."
    )
    yield from _figure(
        shown, "calibration", "Share of detections that find an object at IoU .5, by score."
    )
    yield (
        "Recall where the threshold lets that many false positives per image pass (FROC); below it "
        f"of all classes together, at one threshold for all.{weak}"
    )
    rows = [
        [
            _name(each),
            *(number(value, 3) for value in each["froc"].values()),
            number(each["calibration"]["error"], 3),
        ]
        for each in (report["classes"][label] for label in labels)
    ]
    error = report["calibration"]["error"]
    of_all = [*report["froc"].values(), error]
    rows.append(["**all**", *(number(value, 3) for value in of_all)])
    head = ["class", *(f"{rate:g}" for rate in FROC_RATES), "calibration error"]
    yield markdown_table(head, rows)
    yield from _figure(shown, "froc", "Recall against false positives per image.")


def _worst_images(report: Report, shown: Shown) -> Iterator[str]:
    yield "## Worst images"
    if not report["worst_images"]:
        yield "No image has an error at these thresholds."
        return
    yield "The images with the lowest F1 at these thresholds."
    head = ["image", "F1", "found", "false positives", "missed"]
    keys = ("found", "false_positives", "missed")
    yield markdown_table(
        head,
        [
            [_escape(_image(each)), number(each["f1"], 3), *(str(each[k]) for k in keys)]
            for each in report["worst_images"]
        ],
    )
    for index, each in enumerate(report["worst_images"]):
        what = "ground truth at the left, detections at the right."
        yield from _figure(shown, f"worst_{index}", f"Image {_image(each)}: {what}")


def _label_doubts(report: Report, shown: Shown) -> Iterator[str]:
    yield "## Labels to look at"
    yield "Where a detector and the labels disagree most, the labels are often wrong."
    for name, doubts in report["label_doubts"].items():
        what = LABEL_DOUBTS[name]
        more = f", the first {MAX_DOUBTS} here" if len(doubts) > MAX_DOUBTS else ""
        yield f"**{what[0].upper()}{what[1:]}**: {len(doubts) or 'none'}{more}."
        if doubts:
            columns = DOUBT_COLUMNS[name]
            rows = [
                [_escape(_image(each)), *(_cell(each[key]) for key in columns)]
                for each in doubts[:MAX_DOUBTS]
            ]
            yield markdown_table(["image", *columns.values()], rows)
        yield from _figure(shown, f"doubts_{name}", "The surroundings of the first.")


def _image(each: Mapping[str, Any]) -> str:
    """Return the id of an image, and its file name in brackets."""
    name = each["file_name"]
    return f"{each['image_id']} ({name})" if name else str(each["image_id"])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{each:.0f}" for each in value)
    return number(value, 3) if isinstance(value, float) else _escape(str(value))


def _figure(shown: Shown, name: str, caption: str) -> Iterator[str]:
    """Yield a figure, of parts side by side, and its caption; nothing if it was not drawn."""
    if files := shown.get(name):
        yield "\n".join(f"![{_escape(caption)}]({file})" for file in files)
        yield f"*{_escape(caption)}*"


def _name(each: Mapping[str, Any]) -> str:
    return _escape(each["name"])


def _escape(text: str) -> str:
    return escape(printable(text))
