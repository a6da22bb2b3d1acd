"""Drives a headless Chromium through chromedriver, over the WebDriver protocol's plain HTTP."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver's answers name an element."""
KEYS = {"Control": "\ue009", "Enter": "\ue007", "Escape": "\ue00c", "ArrowRight": "\ue014"}
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")


class Browser:
    """One window of a browser, see `open_browser`."""

    def __init__(self, driver_url: str):
        """Opens a window in a browser of its own, with nothing stored."""
        self._url = driver_url
        options = {"args": _ARGUMENTS, "binary": shutil.which("chromium")}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{session['sessionId']}"

    def _post(self, path: str, body: dict[str, Any], method: str = "POST") -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def go(self, url: str) -> None:
        """Loads a page."""
        self._post("/url", {"url": url})

    def run(self, script: str, *values: Any) -> Any:
        """Returns what a function body returns, of which `arguments` are the values."""
        return self._post("/execute/sync", {"script": script, "args": values})

    def text(self, selector: str) -> str:
        """Returns the text of the first element, or "" if there is none or it is not shown."""
        script = (
            "const found = document.querySelector(arguments[0]);"
            "return found?.checkVisibility() ? found.innerText : ''"
        )
        return str(self.run(script, selector))

    def click(self, selector: str) -> None:
        """Clicks an element as a user does: it has to be there, in sight and not covered."""
        self._post(f"/element/{self._find(selector)}/click", {})

    def write(self, selector: str, text: str) -> None:
        """Types a text into a field, in the place of what is there."""
        element = self._find(selector)
        self._post(f"/element/{element}/clear", {})
        self._post(f"/element/{element}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Presses keys together, whatever has the focus; names of `KEYS`."""
        values = [KEYS[key] for key in keys]
        actions = [{"type": "keyDown", "value": value} for value in values]
        actions += [{"type": "keyUp", "value": value} for value in reversed(values)]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self._post("/actions", {"actions": [keyboard]})

    def command(self, name: str, **parameters: Any) -> Any:
        """Sends a command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def wait(self, script: str, *values: Any, timeout_s: float = 60) -> Any:
        """Returns what a function body returns as soon as that is true.

        Raises:
          TimeoutError: it is not, for too long; the message has what the page shows.
        """
        deadline = time.monotonic() + timeout_s
        while not (found := self.run(script, *values)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{script} {values}, on this page:\n{self.text('body')}")
            time.sleep(0.05)
        return found

    def complaints(self) -> list[str]:
        """Returns what the browser has reported since the last call: errors of scripts, of policy.

        Not that an answer has a status of an error.
        """
        entries = self._post("/se/log", {"type": "browser"})
        return [one["message"] for one in entries if one["source"] != "network"]

    def close(self) -> None:
        """Closes window and browser."""
        self._post("", {}, method="DELETE")

    def _find(self, selector: str) -> str:
        found = self._post("/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Opens a browser; where none is installed the test is skipped, and says so."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no {' and no '.join(missing)} on the PATH")
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        try:
            assert driver.stdout is not None
            started = (re.search(r"on port (\d+)\.$", line.strip()) for line in driver.stdout)
            port = next(found.group(1) for found in started if found)
            browser = Browser(f"http://127.0.0.1:{port}")
            try:
                yield browser
            finally:
                browser.close()
        finally:
            driver.terminate()
