"""Debian's Chromium, driven through chromedriver's own protocol (W3C WebDriver), as far as the page's test needs it."""

import base64
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import httpx

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


def missing() -> str:
    """Why there is no browser, empty if there is one."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(names)} not installed (Debian: chromium, chromium-driver)" if names else ""


class Browser:
    """One window; a context manager."""

    def __enter__(self) -> Self:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.profile = tempfile.TemporaryDirectory()
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
        for _ in range(300):
            try:
                if self.client.get("/status").json()["value"]["ready"]:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        options = {"args": [*FLAGS, f"--user-data-dir={self.profile.name}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "session"):
            self.client.delete(self.session)
        self.driver.terminate()
        self.driver.wait()
        self.client.close()
        self.profile.cleanup()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.client.post(path, json=body).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["message"])
        return answer

    def open(self, file: Path, width: int, height: int = 900) -> None:
        """Load a file at a width in CSS pixels, narrower than a window can be too."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._cdp("Emulation.setDeviceMetricsOverride", size)
        self._post(f"{self.session}/url", {"url": file.resolve().as_uri()})

    def _cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._post(f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str) -> Any:
        """What a JavaScript function body returns."""
        return self._post(f"{self.session}/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """What the console has said since the last call: errors and warnings, refused loads among them."""
        lines = self._post(f"{self.session}/se/log", {"type": "browser"})
        return [line["message"] for line in lines if line["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, file: Path, top: int = 0, height: int = 2400) -> None:
        """A part of the page as PNG."""
        width = self.run("return document.documentElement.clientWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        shot = self._cdp("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(shot["data"]))
