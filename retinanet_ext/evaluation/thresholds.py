"""Operating thresholds: the score per class above which a detection counts, saved with a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.errors import InputError
from retinanet_ext.files import to_json, write_file
from retinanet_ext.losses import Interval

THRESHOLDS = "thresholds.json"
"""Name of the file in a run's folder."""


@dataclass(frozen=True)
class Thresholds:
    """The lowest score of a detection that counts, per class name.

    Attributes:
        scores: class name -> threshold in [0, 1], in the order of classes 0..K-1
        criterion: what they were chosen for, such as "best F1"
        weights_sha256: checksum of the weights' file that they belong to; empty if unknown
    """

    scores: Mapping[str, float]
    criterion: str = ""
    weights_sha256: str = ""

    def __post_init__(self) -> None:
        for name, score in self.scores.items():
            Interval("[0, 1]").check(f"threshold of class {printable(name)}", score)

    @classmethod
    def read(cls, path: str | Path) -> Thresholds:
        """Return the thresholds of a file that :meth:`write` has written.

        Raises:
            InputError: the file cannot be read, or holds something else
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{key: content[key] for key in ("scores", "criterion", "weights_sha256")})
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path} holds no thresholds; `retinanet-ext evaluate RUN --save-thresholds` "
                "writes such a file"
            ) from error

    def write(self, path: str | Path) -> None:
        """Write the thresholds as JSON."""
        write_file(Path(path), to_json(asdict(self), indent=1, ensure_ascii=False) + "\n")

    def by_class(self, class_names: Sequence[str], num_classes: int) -> list[float]:
        """Return the thresholds of classes 0..K-1.

        Args:
            class_names: of the model; empty if it has none, and the thresholds are then taken in
                their order
            num_classes: K

        Raises:
            InputError: they are not of these classes
        """
        if not class_names:
            if len(self.scores) != num_classes:
                raise InputError(
                    f"the thresholds are of {len(self.scores)} classes, and the model has "
                    f"{num_classes}, without names"
                )
            return list(self.scores.values())
        missing = [name for name in class_names if name not in self.scores]
        others = [name for name in self.scores if name not in class_names]
        for names, what in ((missing, "there is none for"), (others, "the model does not know")):
            if names:
                raise InputError(
                    f"the thresholds are of other classes than the model's: {what} "
                    f"{join_some(map(printable, names))}"
                )
        return [self.scores[name] for name in class_names]


def choose_thresholds(
    score: float | None, file: str | Path | None
) -> Thresholds | Literal["run"] | None:
    """Return what ``Predictor`` takes as thresholds, by the options --score and --thresholds.

    Raises:
        InputError: both are given, or one of them is no threshold
    """
    if file is None and score is None:
        return "run"
    if file is not None and score is not None:
        raise InputError("--score and --thresholds are two cuts; give one of them")
    if file is not None:
        return Thresholds.read(file)
    Interval("[0, 1]").check("--score", score)
    return None
