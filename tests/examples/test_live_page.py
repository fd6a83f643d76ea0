"""examples/live_page.py with a real server, and a real browser that adds files and reads the page."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from playwright.sync_api import BrowserContext, Page, Playwright, expect, sync_playwright

from mal_adapter import MemoryState
from mal_adapter.demo import EMOTIONS, PROMPT
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.demo.run import load_demo
from mal_adapter.ser.dialogue import Dialogue
from mal_adapter.ser.recognizer import EmotionRecognizer, Prediction
from tests.ser.live.calls import make_call

EXAMPLE = Path(__file__).parents[2] / "examples" / "live_page.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

Answers = list[tuple[str, list[int]]]  # per turn: the label, and the probabilities in percent


class Server(NamedTuple):
    url: str
    folder: Path
    """Where it may leave temporary files."""


class Expected(NamedTuple):
    """A dialogue, and the recogniser's answers in this process."""

    dialogue: Dialogue
    alone: Answers
    remembered: Answers
    after_four: MemoryState

    @property
    def files(self) -> list[Path]:
        return [utterance.audio for utterance in self.dialogue.utterances]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as port_finder, socket.create_server(("127.0.0.1", 0)) as proxy:
        port_finder.bind(("127.0.0.1", 0))
        port = port_finder.getsockname()[1]
        port_finder.close()
        outside = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        env = {"TMPDIR": str(folder), "HTTP_PROXY": outside, "HTTPS_PROXY": outside, "NO_PROXY": "127.0.0.1,localhost"}
        env |= {"GRADIO_IS_E2E_TEST": "1"}  # what a closed tab leaves is kept for a second instead of an hour
        command = [sys.executable, str(EXAMPLE), "--port", str(port)]
        log = tmp_path_factory.mktemp("log") / "log.txt"
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env})
        try:
            deadline = time.monotonic() + 120
            while "Running on" not in log.read_text():
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
            yield Server(f"http://127.0.0.1:{port}", folder)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        assert "Traceback" not in log.read_text(), log.read_text()
        assert not [path for path in folder.rglob("*") if path.suffix in (".wav", ".safetensors")]  # the end deletes
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # no request went to another server
            proxy.accept()


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(server: Server, playwright: Playwright) -> Iterator[BrowserContext]:
    """A browser that requests nothing but the server."""
    started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    profile = started.new_context(viewport={"width": 1200, "height": 900})
    profile.set_default_timeout(30_000)
    asked: list[str] = []
    profile.on("request", lambda request: asked.append(request.url))
    yield profile
    started.close()
    assert asked
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    (dialogue,) = write_wavs([make_dialogue("test", 7, 0, turns=6)], tmp_path_factory.mktemp("wavs"))
    model, processor, memory = load_demo()
    with memory:
        recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
        alone = [answer_of(result) for result in recognizer.without_memory().recognize(dialogue)]
        remembered = []
        for number, result in enumerate(recognizer.recognize(dialogue), start=1):
            remembered.append(answer_of(result))
            if number == 4:
                after_four = memory.states[dialogue.dialogue_id]
    return Expected(dialogue, alone, remembered, after_four)


def answer_of(result: object) -> tuple[str, list[int]]:
    assert isinstance(result, Prediction)
    return result.label, [round(100 * p) for p in result.probabilities.values()]


@pytest.fixture
def tab(browser: BrowserContext, server: Server) -> Iterator[Page]:
    page = opened(browser, server)
    yield page
    page.close()


def opened(browser: BrowserContext, server: Server) -> Page:
    page = browser.new_page()
    page.goto(server.url)
    shows(page, 0)
    return page


def add(page: Page, *files: Path) -> None:
    page.locator("input[type=file]:not([accept])").set_input_files([str(file) for file in files])


def shows(page: Page, utterances: int) -> None:
    expect(page.locator("[data-utterances]")).to_have_attribute("data-utterances", str(utterances), timeout=30_000)


def read(page: Page) -> tuple[Answers, Answers]:
    """What the page says: the answers without memory, and those with it."""
    labels = [found.get_attribute("data-label") or "" for found in page.locator(".arms b").all()]
    bars = [found.get_attribute("aria-label") or "" for found in page.locator(".bar").all()]
    answers = [(label, [int(p) for p in re.findall(r"(\d+) %", bar)]) for label, bar in zip(labels, bars, strict=True)]
    assert all(bar.startswith(("without", "with")[place % 2]) for place, bar in enumerate(bars))
    return answers[0::2], answers[1::2]


def test_answers_are_those_of_the_recogniser_and_a_dialogue_continues_from_its_state(
    tab: Page, expected: Expected, tmp_path: Path
) -> None:
    add(tab, expected.files[0])
    shows(tab, 1)
    add(tab, *reversed(expected.files[1:4]))  # several at once come in the order of their names
    shows(tab, 4)
    assert read(tab) == (expected.alone[:4], expected.remembered[:4])
    assert tab.locator(".facts").inner_text().split()[:6] == ["In", "memory:", "4", "utterances", "72", "audio"]
    duration = "audio => new Promise(done => { audio.onloadedmetadata = () => done(audio.duration); audio.load() })"
    assert tab.locator("audio").nth(2).evaluate(duration) == pytest.approx(1.45)

    with tab.expect_download() as download:
        tab.get_by_text("Download the state").click()
    assert download.value.suggested_filename == "dialogue-after-4-utterances.safetensors"
    file = tmp_path / "kept.safetensors"
    download.value.save_as(file)
    assert MemoryState.load(file).equals(expected.after_four)

    tab.locator("#new").click()
    shows(tab, 0)
    expect(tab.locator(".turn")).to_have_count(0)
    add(tab, expected.files[2])
    shows(tab, 1)
    assert read(tab) != (expected.alone[2:3], expected.remembered[2:3])  # the past is gone, so this is another answer

    tab.locator("input[type=file][accept]").set_input_files(str(file))
    shows(tab, 4)
    expect(tab.locator(".turn")).to_have_count(0)
    add(tab, *expected.files[4:])
    shows(tab, 6)
    assert read(tab) == (expected.alone[4:], expected.remembered[4:])


def test_an_invalid_file_is_named_and_changes_nothing(tab: Page, expected: Expected, tmp_path: Path) -> None:
    hostile = tmp_path / "a${1+1}{{2*3}}<img src=x onerror=alert(1)>.wav"
    shutil.copy(expected.files[0], hostile)
    add(tab, hostile)
    shows(tab, 1)
    expect(tab.locator(".turn img")).to_have_count(0)
    before = read(tab)

    (tmp_path / "broken.wav").write_bytes(b"no sound at all")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 16_000 * 60), 16_000)
    for name, reason in (("broken", "its format is not known"), ("silent", "silent"), ("long", "at most 6.00 s")):
        add(tab, tmp_path / f"{name}.wav")
        expect(tab.get_by_role("alert")).to_contain_text(re.compile(rf"^{name}\.wav: .*{reason}"))
        assert read(tab) == before
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    tab.locator("input[type=file][accept]").set_input_files(str(tmp_path / "damaged.safetensors"))
    expect(tab.get_by_role("alert")).to_contain_text("not a memory state")
    assert read(tab) == before
    assert str(tmp_path.parent.name) not in tab.get_by_role("alert").inner_text()

    add(tab, tmp_path / "broken.wav", *expected.files[1:2])  # good files among bad ones are answered
    shows(tab, 2)
    expect(tab.get_by_role("alert")).to_contain_text("broken.wav")
    assert read(tab) == (expected.alone[:2], expected.remembered[:2])


def test_each_tab_has_its_own_dialogue_which_is_deleted_with_it(
    tab: Page, browser: BrowserContext, server: Server, expected: Expected
) -> None:
    add(tab, *expected.files[:2])
    shows(tab, 2)
    other = opened(browser, server)
    expect(other.locator(".turn")).to_have_count(0)
    add(other, *expected.files[:3])
    add(tab, *expected.files[2:4])
    shows(other, 3)
    shows(tab, 4)
    assert read(other) == (expected.alone[:3], expected.remembered[:3])
    assert read(tab) == (expected.alone[:4], expected.remembered[:4])
    source = other.locator("audio").first.get_attribute("src") or ""
    recordings = Path(source.removeprefix("gradio_api/file="))
    assert recordings.is_relative_to(server.folder)
    assert recordings.exists()
    other.close()
    deadline = time.monotonic() + 20
    while recordings.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not recordings.parent.exists()
    assert read(tab) == (expected.alone[:4], expected.remembered[:4])


def test_an_example_grows_is_scored_and_can_be_stopped(tab: Page) -> None:
    tab.get_by_text("Play an example dialogue").click()
    shows(tab, 10)
    assert [cells.locator("i").count() for cells in tab.locator(".cells").all()] == [10, 10, 10]
    marks = [tab.locator(".arms b").nth(place).inner_text()[-1] for place in range(20)]
    scores = [f"{marks[arm::2].count('✓')} of 10 right" for arm in (0, 1)]
    assert [found.inner_text() for found in tab.locator(".strip b").all()] == scores
    tab.get_by_text("Play an example dialogue").click()
    seen = tab.wait_for_function(  # clicked by the page itself, while the timeline grows
        """() => {
            const turns = document.querySelectorAll(".turn").length
            if (turns < 1 || turns > 8) return false
            document.querySelector("#new").click()
            return turns
        }"""
    )
    assert 1 <= seen.json_value() <= 8
    shows(tab, 0)
    time.sleep(1.5)  # what was on its way must not come back
    shows(tab, 0)


def test_talking_makes_the_timeline_grow(server: Server, playwright: Playwright, tmp_path: Path) -> None:
    """Chromium plays a call as its microphone; the page sends it in blocks while it is recorded."""
    call, said = make_call(16_000, turns=4, channels=1)
    pause = np.zeros((16_000 * 3, 1), dtype=np.float32)  # the microphone begins before the page records
    soundfile.write(tmp_path / "call.wav", np.concatenate((pause, call)), 16_000)
    microphone = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'call.wav'}%noloop",
    ]
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=microphone)
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, permissions=["microphone"])
    page = context.new_page()
    page.goto(server.url)
    shows(page, 0)
    page.locator("#talk").get_by_text("Record", exact=True).click()
    for turns in range(1, 4):  # one after the other, while the microphone is on
        expect(page.locator("[data-utterances]")).to_have_attribute("data-utterances", str(turns), timeout=30_000)
    page.locator("#talk").get_by_text("Stop", exact=True).click()
    expect(page.locator(".turn")).to_have_count(len(said), timeout=30_000)
    names = page.locator(".who").all_inner_texts()
    starts = [float(name.split("microphone, ")[1].split(" s")[0]) for name in names]
    gaps = [said[n + 1].start_s - said[n].start_s for n in range(3)]
    assert [starts[n + 1] - starts[n] for n in range(3)] == pytest.approx(gaps, abs=0.6)  # blocks are compressed
    assert len(read(page)[0]) == len(read(page)[1]) == len(said)
    duration = "audio => new Promise(done => { audio.onloadedmetadata = () => done(audio.duration); audio.load() })"
    length_s = page.locator("audio").nth(1).evaluate(duration)
    assert length_s == pytest.approx(said[1].end_s - said[1].start_s + 0.2, abs=0.6)
    chromium.close()
