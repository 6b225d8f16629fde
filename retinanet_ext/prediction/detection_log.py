"""The file that detections are appended to: one JSON line per image, to go on from when cut off."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retinanet_ext.data.coco_json import printable
from retinanet_ext.errors import InputError
from retinanet_ext.files import make_folder, to_json, write_file

Record = dict[str, Any]
"""What is known of an image: ``file`` and, of a video, ``frame``; then either ``error``, or
``width`` and ``height`` in pixels and ``detections``, the best first. A detection has ``class``,
0..K-1, ``score``, and ``box``, XYXY in pixels."""

JOB = "job.json"


@contextmanager
def open_log(folder: Path, job: Mapping[str, Any]) -> Iterator[DetectionLog]:
    """Open the log of a job for this process alone; the system unlocks it when the process ends.

    Args:
        folder: folder of the job, made if it does not exist
        job: all that the records depend on

    Raises:
        InputError: the folder has other files or records of another job, or another process has
            opened it; or a file in it cannot be written within the block
    """
    # A process that is killed at once leaves hidden files: the lock, and the part of another file.
    if not (folder / JOB).is_file() and any(folder.glob("[!.]*")):
        raise InputError(f"{folder} has files of something else; name another folder by --output")
    make_folder(folder)
    try:
        with open(folder / ".lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another process is writing {folder}; wait for its end, or name another "
                    "folder by --output"
                ) from None
            yield DetectionLog(folder, job)
    except OSError as error:
        raise InputError(f"{folder} is incomplete: {error}; the same call continues it") from error


class DetectionLog:
    """The records of a job, ``detections.jsonl``, and what the job is, ``job.json``.

    A job that is started again must be the same, because its records go on in the same file.

    Attributes:
        path: the file of records
        complete: whether all records have been written
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        """
        Raises:
            InputError: the folder has records of another job
        """
        self.path = folder / "detections.jsonl"
        self._job_file = folder / JOB
        self._job = json.loads(to_json(job))
        saved = json.loads(self._job_file.read_bytes()) if self._job_file.is_file() else {}
        self.complete = saved.pop("complete", False) and self.path.is_file()
        keys = sorted({*saved, *self._job}) if saved else []
        differ = [key for key in keys if saved.get(key) != self._job.get(key)]
        if differ:
            values = [printable(f"{k} {saved.get(k)}, now {self._job.get(k)}") for k in differ]
            raise InputError(
                f"{folder} has detections of other {' and '.join(differ)} ({JOB}: "
                f"{', '.join(values)}); name another folder by --output, or delete this one"
            )

    def start(self, window: int) -> int:
        """Make the file ready to append to, and return the number of records that it has.

        A job that is cut off computes its last window again, because the batches of a window are
        then those of an uninterrupted job, and so are the last bits of its scores.

        Args:
            window: records that are written together; those of an incomplete window are dropped
        """
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
