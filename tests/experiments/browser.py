"""Chromium, driven over a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Return the program's path, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab: what it is told, and what happened in it since."""

    def __init__(self, send: Any, receive: Any) -> None:
        self._send, self._receive = send, receive
        self._session: str | None = None
        self._last_id = 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        answer = self._read(lambda message: message.get("id") == self._last_id)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, file: Path, width: int, height: int, *, dark: bool = False) -> None:
        """Open a file in a window of that size and wait until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        self._read(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def happened(self, method: str) -> list[dict[str, Any]]:
        """Return the events of a kind since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def screenshot(self, path: Path) -> None:
        """Write the whole page to a PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _read(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            data = bytearray()
            while (byte := self._receive.read(1)) != b"\0":
                assert byte, "Chromium ended"
                data += byte
            message = json.loads(data)
            if "method" in message:
                self.events.append(message)
            if is_it(message):
                return message


@contextmanager
def open_browser(program: str) -> Iterator[Page]:
    """Start Chromium with a fresh profile and yield a tab of it."""
    from_browser, browser_writes = os.pipe()
    browser_reads, to_browser = os.pipe()

    def place_pipes() -> None:
        # Chromium reads commands from 3 and writes to 4, which the pipes may occupy themselves.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (browser_reads, browser_writes)]
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=place_pipes,
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_reads)
        os.close(browser_writes)
        try:
            with open(to_browser, "wb") as send, open(from_browser, "rb") as receive:
                yield Page(send, receive)
        finally:
            process.terminate()
            process.wait(30)
