"""The page of a timeline in a real browser: opened from the disk, looked at, clicked and listened to."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, Page, expect, sync_playwright

from mal_adapter.errors import AudioError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.evaluation.colors import emotion_colors
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure, Prediction
from mal_adapter.ser.timeline import Timeline, TimelineEntry
from mal_adapter.ser.timeline.page import write_page
from mal_adapter.ser.turns import Turn
from tests.ser.timeline.calls import SPEAKERS, Call, made_call

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """open(path, …) -> the page. In the end, it has requested nothing but itself, and logged nothing."""
    contexts, asked, logged = [], [], []

    def open_page(path: Path, width: int = 1_200, height: int = 900, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(15_000)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("dialog", lambda dialog: logged.append(dialog.message))
        contexts.append(context)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert logged == []


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Call:
    return made_call(tmp_path_factory.mktemp("call") / "call-42.wav", turns=14, channels=2)


@pytest.fixture(scope="module")
def made(recognizer: EmotionRecognizer, call: Call) -> Timeline:
    entries = tuple(recognizer.timeline(call.path, call.turns))
    return timeline_of(call.path, entries, len(call.samples) / 16_000, tuple(recognizer.labels), channels=SPEAKERS)


@pytest.fixture(scope="module")
def file(made: Timeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "call-42.html"
    write_page(made, path)
    return path


def timeline_of(path: Path, entries, duration_s: float, labels, **more) -> Timeline:
    return Timeline(path, duration_s, entries, labels, path.stem, "How does the speaker feel?", **more)


def place(page: Page, turn: Turn, lane: int, *, y: float) -> dict[str, float]:
    """Where a turn is in its lane's picture, once the whole recording is shown."""
    page.locator("#all").click()
    box = page.locator(".lane canvas").nth(lane).bounding_box()
    duration = page.evaluate("JSON.parse(document.getElementById('data').textContent).duration")
    return {"x": (turn.start_s + turn.end_s) / 2 / duration * box["width"], "y": y}


def until(page: Page, expression: str) -> None:
    """Wait until an expression is true. Playwright's own way is refused by the page's policy, since it uses eval."""
    deadline = time.monotonic() + 15
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def sound(page: Page) -> dict[str, Any]:
    return page.evaluate(
        "(a => a ? {time: a.currentTime, paused: a.paused, duration: a.duration} : null)"
        "(document.getElementById('sound'))"
    )


def test_the_table_and_the_shares_say_what_the_recogniser_answered(opened: Opened, file: Path, made: Timeline):
    page = opened(file)
    rows = page.get_by_role("table", name="Turns").get_by_role("row").all()[1:]
    colors = emotion_colors(made.labels)
    assert len(rows) == len(made.entries)
    for entry, row in zip(made.entries, rows, strict=True):
        minutes = f"{int(entry.turn.start_s) // 60:02d}:{int(entry.turn.start_s) % 60:02d}"
        cells = row.get_by_role("cell").all_inner_texts()
        assert cells[0].startswith(minutes)
        assert cells[1] == entry.turn.speaker
        assert cells[2].split() == [entry.emotion, f"{entry.probability:.0%}"[:-1], "%"]
        assert cells[3].split()[0] == entry.emotion_without_memory
        assert ("changed" in cells[3]) == (entry.emotion != entry.emotion_without_memory)
        chip = row.locator(".chip").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert chip == f"rgb{tuple(int(colors[entry.emotion][k : k + 2], 16) for k in (1, 3, 5))}"
    changed = sum(entry.emotion != entry.emotion_without_memory for entry in made.entries)
    assert changed > 0
    expect(page.locator(".summary").first).to_have_text(
        f"The memory of the conversation changed {changed} of {len(rows)} answers."
    )
    assert page.locator(".legend span").all_inner_texts() == [*made.labels, "changed by the memory"]
    page.get_by_label(re.compile("only those")).check()
    assert page.locator("tbody tr:visible").count() == changed
    shares = page.locator(".shares .bar").all()
    assert len(shares) == 4
    assert shares[0].get_attribute("aria-label").startswith("customer, with memory: neutral ")


def test_a_click_on_a_turn_plays_it_to_its_end(opened: Opened, file: Path, call: Call):
    page = opened(file)
    number = next(place for place, turn in enumerate(call.turns) if turn.channel == 1 and place > 3)
    turn = call.turns[number]
    assert sound(page) is None  # decoded when it is needed
    page.locator(".lane canvas").nth(1).click(position=place(page, turn, 1, y=80))
    until(page, "document.getElementById('sound')?.currentTime > 0")
    expect(page.locator("#turn .who")).to_contain_text(f"turn {number + 1} of {len(call.turns)}")
    expect(page.locator("#play")).to_have_attribute("aria-label", "Pause")
    begun = sound(page)
    assert turn.start_s - 0.05 <= begun["time"] < turn.end_s
    assert begun["duration"] == pytest.approx(len(call.samples) / 16_000, abs=0.2)
    until(page, "document.getElementById('sound').paused")
    assert sound(page)["time"] == pytest.approx(turn.end_s, abs=0.3)
    expect(page.locator("#play")).to_have_attribute("aria-label", "Play")
    assert page.locator("#turns tr[aria-current]").count() == 1


def test_a_click_on_the_waveform_plays_on_from_there_and_the_button_stops_it(opened: Opened, file: Path, call: Call):
    page = opened(file)
    turn = call.turns[2]
    page.locator(".lane canvas").nth(turn.channel).click(position=place(page, turn, turn.channel, y=30))
    until(page, f"document.getElementById('sound')?.currentTime > {turn.end_s + 0.2}")
    assert not sound(page)["paused"]
    page.get_by_role("button", name="Pause").click()
    stopped = sound(page)
    assert stopped["paused"]
    time.sleep(0.3)
    assert sound(page)["time"] == stopped["time"]
    assert page.locator("#clock").inner_text().startswith(f"00:{int(stopped['time']):02d} / ")
    page.get_by_role("button", name="Play").click()
    until(page, f"document.getElementById('sound').currentTime > {stopped['time']}")


def test_keys_and_rows_do_all_that_a_pointer_does(opened: Opened, file: Path, call: Call, made: Timeline):
    page = opened(file)
    page.locator("#timeline").focus()
    who, total = page.locator("#turn .who"), len(call.turns)
    for key, number in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", total), ("Home", 1)):
        page.keyboard.press(key)
        expect(who).to_contain_text(f"turn {number} of {total}")
    assert sound(page) is None
    page.keyboard.press("Enter")
    until(page, f"document.getElementById('sound')?.currentTime > {call.turns[0].start_s}")
    page.keyboard.press(" ")
    assert sound(page)["paused"]
    changes = [n for n, entry in enumerate(made.entries, start=1) if entry.emotion != entry.emotion_without_memory]
    page.keyboard.press("c")
    expect(who).to_contain_text(f"turn {next(n for n in changes if n > 1)} of {total}")
    wide = page.locator(".overview .window").evaluate("e => parseFloat(e.style.width)")
    page.keyboard.press("+")
    expect(page.locator("#scale span").first).to_be_visible()
    until(page, f"parseFloat(document.querySelector('.overview .window').style.width) < {0.6 * wide}")
    page.keyboard.press("0")
    expect(page.locator(".overview .window")).to_be_hidden()
    row = page.get_by_role("button", name=re.compile(r"^\d\d:\d\d – \d\d:\d\d$")).nth(5)
    row.focus()
    page.keyboard.press("Enter")
    expect(who).to_contain_text(f"turn 6 of {total}")
    bars = page.locator("#turn .bar").all()
    probabilities = made.entries[5].result.probabilities
    assert bars[0].get_attribute("aria-label") == "with memory: " + ", ".join(
        f"{label} {round(round(1000 * p) / 10 + 1e-9)} %" for label, p in probabilities.items()
    )
    until(page, f"document.getElementById('sound').currentTime > {call.turns[5].start_s}")


@pytest.mark.parametrize("width", [360, 320, 768])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(width: int, opened: Opened, file: Path, call: Call):
    page = opened(file, width, 740, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("#turns [data-turn]").last.scroll_into_view_if_needed()
    page.locator("#turns [data-turn]").nth(3).tap()
    expect(page.get_by_role("button", name="Pause")).to_be_in_viewport()
    until(page, "document.getElementById('sound')?.currentTime > 0")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = (
        "[...document.querySelectorAll('{}')].filter(e => e.offsetParent).map(e => e.getBoundingClientRect())"
        ".filter(box => {}).length"
    )
    assert page.evaluate(boxes.format("button, .bar, canvas, td", "box.right > innerWidth + 1")) == 0
    assert page.evaluate(boxes.format(".player button", "box.height < 32")) == 0


def test_names_are_text_and_never_code(opened: Opened, tmp_path: Path):
    attack = """</script><img src=x onerror="window.broken=1">'"`${1}{{2}}<!--&amp;"""
    path = tmp_path / "call.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 5 * 16_000), 16_000)
    labels = ("sad", attack + "label")
    turn = Turn(0.5, 2.0, attack + "speaker", text=attack + "words")
    said = Utterance(attack, "0", turn.speaker, path, 0.5, 2.0)
    result = Prediction(said, labels[1], {labels[0]: 0.25, labels[1]: 0.75}, 1.5, 0.1)
    failed = TimelineEntry(replace(turn, start_s=3.0, end_s=4.0), Failure(said, AudioError(attack + "reason")))
    entries = (TimelineEntry(turn, result, replace(result, label=labels[0])), failed)
    named = {"model": attack, "adapter": attack, "turns_from": attack, "channels": (attack,)}
    evil = replace(timeline_of(path, entries, 5.0, labels, **named), session_id=attack, prompt=attack)
    write_page(evil, tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    page.locator("#timeline").focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(100)
        assert page.locator("#turn .said").inner_text() in (attack + "words", attack + "reason")
        assert attack + "speaker" in page.locator("#turn .who").inner_text()
    assert page.locator("img").count() == 0
    assert page.evaluate("window.broken") is None
    assert page.locator("#turns .chip").first.inner_text() == attack + "label"
    assert page.evaluate("document.querySelectorAll('script').length") == 3


def test_without_sound_turns_can_still_be_chosen(opened: Opened, made: Timeline, file: Path, tmp_path: Path):
    write_page(made, tmp_path / "page.html", audio=False)
    assert (tmp_path / "page.html").stat().st_size < file.stat().st_size - 50_000
    page = opened(tmp_path / "page.html")
    expect(page.locator("#play")).to_be_hidden()
    expect(page.get_by_text("The sound is not in this page.")).to_be_visible()
    page.locator("#turns [data-turn]").nth(3).click()
    expect(page.locator("#turn .who")).to_contain_text("turn 4 of")
    assert sound(page) is None


def test_one_voice_without_a_memory_has_no_second_arm(recognizer: EmotionRecognizer, opened: Opened, tmp_path: Path):
    call = made_call(tmp_path / "call.wav", turns=4)
    entries = tuple(recognizer.without_memory().timeline(call.path, call.turns))
    write_page(timeline_of(call.path, entries, 12.0, tuple(recognizer.labels)), tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert "memory" not in page.locator("body").inner_text().replace("changed by the memory", "")
    expect(page.locator("#turns th")).to_have_text(["time", "speaker", "emotion"])
    write_page(timeline_of(call.path, (), 12.0, tuple(recognizer.labels)), tmp_path / "none.html")
    expect(opened(tmp_path / "none.html").locator(".summary")).to_have_text("No turns were found in this recording.")


def test_labels_that_are_no_speakers_do_not_get_a_lane_each(opened: Opened, made: Timeline, tmp_path: Path):
    entries = [
        replace(entry, turn=replace(entry.turn, speaker=f"label {number}", channel=None))
        for number, entry in enumerate(made.entries)
    ]
    write_page(replace(made, entries=tuple(entries)), tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert page.locator(".lane").count() == 12
    assert page.locator(".lane b").last.inner_text() == f"{len(entries) - 11} others"
    assert page.locator("#turns .name").all_text_contents() == [entry.turn.speaker for entry in entries]
    page.locator("#turns [data-turn]").last.click()
    expect(page.locator("#turn .who")).to_contain_text(entries[-1].turn.speaker)


def test_without_javascript_the_table_says_it_all(opened: Opened, file: Path, call: Call):
    page = opened(file, java_script_enabled=False)
    expect(page.locator("#app")).to_be_hidden()
    expect(page.get_by_text("The picture needs JavaScript")).to_be_visible()
    assert page.locator("#turns tbody tr").count() == len(call.turns)


def test_where_motion_is_unwanted_the_view_jumps(opened: Opened, file: Path):
    page = opened(file, reduced_motion="reduce")
    page.locator("#timeline").focus()
    at = "parseFloat(document.querySelector('.overview .window').style.left)"
    jumped = page.evaluate(
        f"""async () => {{
            const frame = () => new Promise(done => requestAnimationFrame(done))
            document.getElementById("timeline").dispatchEvent(new KeyboardEvent("keydown", {{key: "End"}}))
            await frame(); await frame(); const first = {at}
            for (let n = 0; n < 40; n++) await frame()
            return [first, {at}]
        }}"""
    )
    assert jumped[0] == jumped[1] > 0


def test_the_dark_scheme_has_readable_ink(opened: Opened, file: Path):
    for scheme, dark in (("light", False), ("dark", True)):
        page = opened(file, color_scheme=scheme)
        ground, ink = (
            sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3]))
            for name in ("backgroundColor", "color")
        )
        assert (ground < 150, ink > 600) == (dark, dark)
        until(page, "document.querySelector('.lane canvas').toDataURL().length > 3_000")  # something is drawn


def test_thousands_of_turns_stay_fluid(opened: Opened, tmp_path: Path):
    path, count = tmp_path / "long.wav", 5_000
    with soundfile.SoundFile(path, "w", 8_000, 1, "ULAW") as file:
        for _ in range(100):
            file.write(np.random.default_rng(0).normal(0, 0.1, 100 * 8_000))
    rng = np.random.default_rng(1)
    labels = ("neutral", "happy", "angry", "sad")
    entries = []
    for number in range(count):
        turn = Turn(2.0 * number, 2.0 * number + 1.8, SPEAKERS[number % 2])
        said = Utterance("long", f"{number:04d}", turn.speaker, path, turn.start_s, turn.end_s)
        answers = [
            Prediction(said, max(p, key=p.__getitem__), p, 1.8, 0.1)
            for p in (dict(zip(labels, map(float, rng.dirichlet(np.ones(4))), strict=True)) for _ in range(2))
        ]
        entries.append(TimelineEntry(turn, *answers))
    write_page(timeline_of(path, tuple(entries), 2.0 * count, labels), tmp_path / "page.html", audio=False)
    page = opened(tmp_path / "page.html")
    per_frame = page.evaluate(
        """async () => {
            const press = key => document.getElementById("timeline").dispatchEvent(new KeyboardEvent("keydown", {key}))
            const frame = () => new Promise(done => requestAnimationFrame(done))
            const times = []
            for (const key of ["0", ...Array(20).fill("ArrowRight"), "End", "+", "+", ...Array(20).fill("ArrowLeft")]) {
                press(key)
                const begun = performance.now()
                await frame(); await frame()
                times.push(performance.now() - begun)
            }
            return times.sort((a, b) => a - b)
        }"""
    )
    assert per_frame[len(per_frame) // 2] < 200  # two frames; 35 ms on an idle machine
    data = json.loads(page.locator("#data").text_content())
    assert len(data["turns"]) == count
    page.locator("#turns [data-turn]").last.click()
    expect(page.locator("#turn .who")).to_contain_text(f"turn {count} of {count}")
    expect(page.locator("#turn .who")).to_contain_text("166:38 – 166:39")
