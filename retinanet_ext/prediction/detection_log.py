"""The file that detections are appended to: one JSON line per image, to go on from when cut off."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from retinanet_ext.data.coco_json import printable
from retinanet_ext.errors import InputError
from retinanet_ext.files import to_json, write_file

Record = dict[str, Any]
"""What is known of an image: ``file`` and, of a video, ``frame``; then either ``error``, or
``width`` and ``height`` in pixels and ``detections``, the best first. A detection has ``class``,
0..K-1, ``score``, and ``box``, XYXY in pixels."""


class DetectionLog:
    """The records of a job, ``detections.jsonl``, and what the job is, ``job.json``.

    A job that is started again must be the same, because its records go on in the same file.

    Attributes:
        path: the file of records
        complete: whether all records have been written
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        """
        Args:
            folder: made at the first :meth:`append`
            job: all that the records depend on

        Raises:
            InputError: the folder has other files, or records of another job
        """
        self.path = folder / "detections.jsonl"
        self._job_file = folder / "job.json"
        self._job = json.loads(to_json(job))
        self.complete = False
        if self._job_file.is_file():
            saved = json.loads(self._job_file.read_bytes())
            self.complete = saved.pop("complete")
            self._refuse_another(saved)
        elif folder.is_dir() and any(folder.iterdir()):
            raise InputError(
                f"{folder} has files of something else; name another folder by --output"
            )

    def _refuse_another(self, saved: Mapping[str, Any]) -> None:
        keys = {*saved, *self._job}
        differ = sorted(key for key in keys if saved.get(key) != self._job.get(key))
        if differ:
            raise InputError(
                f"{self.path.parent} has detections of other {' and '.join(differ)} (job.json: "
                f"{', '.join(self._describe(saved, key) for key in differ)}); name another folder "
                "by --output, or delete this one"
            )

    def _describe(self, saved: Mapping[str, Any], key: str) -> str:
        return printable(f"{key} {saved.get(key)}, now {self._job.get(key)}")

    def start(self, window: int) -> int:
        """Make the file ready to append to, and return the number of records that it has.

        A job that is cut off computes its last window again, because the batches of a window are
        then those of an uninterrupted job, and so are the last bits of its scores.

        Args:
            window: records that are written together; those of an incomplete window are dropped
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write_job()
        kept = kept_bytes = lines = size = 0
        with open(self.path, "ab+") as file:
            file.seek(0)
            for line in file:
                lines, size = lines + 1, size + len(line)
                if lines % window == 0 and line.endswith(b"\n"):
                    kept, kept_bytes = lines, size
            file.truncate(kept_bytes)
        return kept

    def append(self, records: Iterable[Record]) -> None:
        """Append records and flush them to the system."""
        with open(self.path, "a", encoding="ascii") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def finish(self) -> None:
        """Note that no record is missing."""
        self.complete = True
        self._write_job()

    def _write_job(self) -> None:
        content = {**self._job, "complete": self.complete}
        write_file(self._job_file, to_json(content, indent=1) + "\n")

    def __iter__(self) -> Iterator[Record]:
        with open(self.path, encoding="ascii") as file:
            yield from map(json.loads, file)
