"""Operating thresholds: the score per class above which a detection counts, saved with a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
        scores: class name -> threshold in [0, 1]
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

    def by_class(self, class_names: Sequence[str]) -> list[float]:
        """Return the thresholds of classes 0..K-1.

        Raises:
            InputError: they are not of these classes
        """
        missing = [name for name in class_names if name not in self.scores]
        others = [name for name in self.scores if name not in class_names]
        for names, what in ((missing, "there is none for"), (others, "the model does not know")):
            if names:
                raise InputError(
                    f"the thresholds are of other classes than the model's: {what} "
                    f"{join_some(map(printable, names))}"
                )
        return [self.scores[name] for name in class_names]
