"""Look at pages as a browser shows them: fail on overflow, console errors, requests, low contrast.

Each page is opened in headless Chromium, with all its details unfolded, at the width of a desktop
(1280), a phone (390) and the smallest phone (360), in the light and in the dark scheme; and on
paper. Debian: apt-get install chromium.

    scripts/check_pages.py runs/demo/index.html runs/demo/report/index.html --out /tmp/pages
"""

import argparse
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = (1280, 390, 360)
SCHEMES = ("light", "dark")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_SECONDS = 60

# What sticks out of the window and of every box that scrolls, and text that is hard to read.
LOOK = r"""
(() => {
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const wide = document.documentElement.clientWidth, found = [];
  const name = e => e.tagName.toLowerCase() + (e.id ? '#' + e.id : '')
    + (e.getAttribute('class') ? '.' + e.getAttribute('class').split(' ').join('.') : '')
    + ' "' + (e.textContent || '').trim().slice(0, 40) + '"';
  if (document.documentElement.scrollWidth > wide)
    found.push('the page is ' + document.documentElement.scrollWidth + ' pixels wide');
  const inside = e => { for (let p = e; p; p = p.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)
          && p !== document.body && p !== document.documentElement) return true;
    return false; };
  for (const e of document.body.querySelectorAll('*:not(svg *):not(.skip)')) {
    const box = e.getBoundingClientRect();
    if (e.clientWidth && e.scrollWidth > e.clientWidth + 1 && e.clientWidth + box.left < wide + 1
        && box.left + e.scrollWidth > wide + 1 && !inside(e))
      found.push('holds what sticks out: ' + name(e));
    if (box.width && (box.right > wide + 1 || box.left < -1) && !inside(e.parentElement || e))
      found.push('sticks out by ' + Math.round(box.right - wide) + ' pixels: ' + name(e));
  }
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92
      : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const read = c => (c.match(/[\d.]+/g) || []).map(Number);
  const paper = e => { for (let p = e; p; p = p.parentElement) {
      const c = read(getComputedStyle(p).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c.slice(0, 3); }
    return [255, 255, 255]; };
  const pale = new Set();
  for (const e of document.body.querySelectorAll('*')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    if (e.matches('title, rect *, .count, .heat text, .layers text[style]')) continue;
    const style = getComputedStyle(e), ink = read(e.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink.slice(0, 3)), light(paper(e))].sort((x, y) => y - x);
    if (ink.length && (a + .05) / (b + .05) < 4.5)
      pale.add('contrast ' + ((a + .05) / (b + .05)).toFixed(1) + ': ' + name(e));
  }
  return {problems: [...found.slice(0, 10), ...[...pale].slice(0, 10)],
          height: Math.ceil(document.documentElement.scrollHeight)};
})()
"""


class Browser:
    """Chromium, spoken to over a pipe: JSON messages that end with a zero byte."""

    def __init__(self, program: str, profile: str):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}', program,
             "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             "--no-first-run", f"--user-data-dir={profile}"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_SECONDS)
        os.close(self._write)
        os.close(self._read)

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come first are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        while not any(found.get("method") == event for found in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = os.read(self._read, 1 << 16)
            if not got:
                raise RuntimeError("Chromium ended")
            self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        found = Browser(program, profile)
        try:
            yield found
        finally:
            found.close()


def look_at(chromium: Browser, page: Path, width: int, scheme: str,
            picture: Path | None) -> list[str]:
    """Open a page, and return what is wrong with it."""
    target = chromium.ask("Target.createTarget", url="about:blank")["targetId"]
    session = chromium.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    chromium.events.clear()
    for domain in ("Page", "Runtime", "Log", "Network"):
        chromium.ask(f"{domain}.enable", session)
    chromium.ask("Emulation.setDeviceMetricsOverride", session, width=width, height=900,
                 deviceScaleFactor=1, mobile=width < 800)
    chromium.ask("Emulation.setEmulatedMedia", session,
                 features=[{"name": "prefers-color-scheme", "value": scheme}])
    address = page.resolve().as_uri()
    chromium.ask("Page.navigate", session, url=address)
    chromium.wait_for("Page.loadEventFired")
    found = chromium.ask("Runtime.evaluate", session, expression=LOOK, returnByValue=True)
    looked = found["result"]["value"]
    if picture is not None:
        shot = chromium.ask("Page.captureScreenshot", session, captureBeyondViewport=True,
                            clip={"x": 0, "y": 0, "width": width, "scale": 1,
                                  "height": min(looked["height"], 16_000)})
        picture.write_bytes(base64.b64decode(shot["data"]))
    problems = [*looked["problems"], *complaints(chromium.events, address)]
    chromium.ask("Target.closeTarget", targetId=target)
    return problems


def complaints(events: list[dict[str, Any]], address: str) -> list[str]:
    """What the browser said of a page, and what it asked for beside it."""
    found = []
    for event in events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            found.append(f"console: {params['entry']['text']}")
        elif method == "Runtime.exceptionThrown":
            found.append(f"exception: {params['exceptionDetails']['text']}")
        elif method == "Runtime.consoleAPICalled":
            found.append(f"console: {params['type']}")
        elif method == "Network.requestWillBeSent" and params["request"]["url"] != address:
            found.append(f"asks for {params['request']['url'][:100]}")
    return found


def print_to(chromium: Browser, page: Path, path: Path) -> None:
    """The page on paper, as PDF."""
    target = chromium.ask("Target.createTarget", url=page.resolve().as_uri())["targetId"]
    session = chromium.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    made = chromium.ask("Page.printToPDF", session, printBackground=True)
    path.write_bytes(base64.b64decode(made["data"]))
    chromium.ask("Target.closeTarget", targetId=target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="directory for a PNG of each view, and a PDF")
    parser.add_argument("--chromium", default=next(filter(shutil.which, NAMES), None))
    given = parser.parse_args()
    if given.chromium is None:
        parser.error(f"none of {', '.join(NAMES)} is on the PATH; give --chromium PROGRAM")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with browser(given.chromium) as chromium:
        for page, width, scheme in itertools.product(given.pages, WIDTHS, SCHEMES):
            stem = re.sub(r"\W+", "-", str(page.with_suffix(""))).strip("-")
            picture = given.out and given.out / f"{stem}-{width}-{scheme}.png"
            problems = look_at(chromium, page, width, scheme, picture)
            print(f"{page} at {width}, {scheme}: {'; '.join(problems) or 'good'}")
            wrong += bool(problems)
            if given.out is not None and (width, scheme) == (WIDTHS[0], SCHEMES[0]):
                print_to(chromium, page, given.out / f"{stem}.pdf")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
