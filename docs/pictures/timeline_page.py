"""Make `docs/timeline.png`, a picture of the page of a call with a speaker per channel. Needs Chromium.

python docs/pictures/timeline_page.py [FILE]
"""

import runpy
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.ser import EmotionRecognizer
from mal_adapter.ser.recognizer.audio import sound_info
from mal_adapter.ser.timeline import Timeline, write_page

DOCS = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZE = (1180, 924)
TURN = 11  # which turn is chosen, from 1


def draw(path: Path) -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        recording, page_file = Path(folder, "call-42.wav"), Path(folder, "call-42.html")
        turns = runpy.run_path(str(DOCS.parent / "examples" / "timeline.py"))["make_call"](recording, seed=7, turns=40)
        recognizer = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER)
        entries = tuple(recognizer.timeline(recording, turns))
        labels, duration_s = tuple(recognizer.labels), sound_info(recording).duration_s
        write_page(Timeline(recording, duration_s, entries, labels, "call-42", recognizer.prompt), page_file)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        page.goto(page_file.as_uri())
        page.locator("#timeline").focus()
        for _ in range(TURN):
            page.keyboard.press("ArrowRight")
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(500)
        page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "timeline.png")
