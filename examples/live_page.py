"""A page for one dialogue: upload or record its utterances, or just talk, and see what the memory changes.

pip install 'mal-adapter[page,recordings]'
python examples/live_page.py                                 # the tiny host and memory that come with the package
python examples/live_page.py --model MODEL --adapter ADAPTER --port 8000
"""

import argparse
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import soundfile
from jinja2 import Environment

from mal_adapter import MemoryState, attach_memory
from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.errors import MalAdapterError
from mal_adapter.ser.dialogue import Utterance
from mal_adapter.ser.evaluation.colors import emotion_colors, ink_on
from mal_adapter.ser.live import EmotionStream, LiveEntry
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.names import natural
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure, Prediction

KEPT_S, UPLOADS_KEPT_S = 12 * 3600, 3600  # an unused dialogue; Gradio keeps a closed tab's for an hour
TEMPLATE, STYLE = (Path(__file__).with_suffix(suffix) for suffix in (".html.j2", ".css"))
INTRODUCTION = (
    "The same model answers each utterance twice: without memory, and with a memory of the dialogue. Your files "
    "stay on the machine that serves this page, until an hour after you have left it. The model is {}."
)
DEMO_HOST = "the tiny demo host: it was trained on synthetic voices, and can only guess at real speech"


@dataclass(frozen=True)
class Turn:
    """An utterance, and both answers to it."""

    number: int
    name: str
    audio: Path
    truth: str | None
    answers: dict[str, Prediction]


class Conversation:
    """The dialogue of one browser tab: its turns, a copy of each sound file, and its session.

    Args:
        recognizer: with a memory.
        folder: the parent of the conversation's own folder.
        state: of a dialogue to continue.

    Raises:
        StateMismatchError, SessionError: the state is from another adapter, or of several dialogues.
    """

    def __init__(self, recognizer: EmotionRecognizer, folder: Path, state: MemoryState | None = None) -> None:
        self.recognizer = recognizer
        self.arms = {"without memory": recognizer.without_memory(), "with memory": recognizer}
        self.states = recognizer.memory.states
        self.session_id = secrets.token_hex(16)  # also the name of its folder, so it must be a secret
        if state is not None:
            self.states[self.session_id] = state
        self.earlier = 0 if state is None else int(state.utterances)
        self.folder = folder / self.session_id
        self.folder.mkdir()
        self.turns: list[Turn] = []
        self.stream: EmotionStream | None = None
        self.file: Path | None = None
        self.closed = False
        self._lock = threading.Lock()

    def answer(self, path: Path, name: str, truth: str | None = None) -> str | None:
        """Answer one utterance without memory and with it. Returns the problem if it can't. Does nothing if closed."""
        with self._lock:
            if self.closed:
                return None
            number = self.earlier + len(self.turns) + 1
            audio = Path(shutil.copy(path, self.folder / f"{number}{path.suffix.lower()}"))
            utterance = Utterance(self.session_id, str(number), "?", audio)
            answers = {}
            for arm, recognizer in self.arms.items():
                (result,) = recognizer.answer([utterance])
                if isinstance(result, Failure):
                    audio.unlink()
                    return f"{name}: {str(result.error).removeprefix(f'{audio}: ')}"
                answers[arm] = result
            self.turns.append(Turn(number, name, audio, truth, answers))
            return None

    def listen(self, sampling_rate: int, block: np.ndarray) -> list[str]:
        """Continue the sound of the microphone, and answer what was said. Returns the problems.

        Args:
            sampling_rate: of the block.
            block: (frames,) or (frames, channels), the next half second or so.
        """
        with self._lock:
            if self.closed:
                return []
            try:
                if self.stream is None:
                    self.stream = self.recognizer.stream(sampling_rate, session_id=self.session_id, compare=True)
                return self._add(self.stream.feed(block if block.ndim == 1 else block.mean(axis=1) / 32768))
            except MalAdapterError as error:
                return [f"microphone: {error}"]

    def stop_listening(self) -> list[str]:
        """The microphone is off: answer what was said last. Returns the problems."""
        with self._lock:
            stream, self.stream = self.stream, None
            try:
                return [] if self.closed or stream is None else self._add(stream.finish())
            except MalAdapterError as error:
                return [f"microphone: {error}"]

    def _add(self, entries: list[LiveEntry]) -> list[str]:
        problems = []
        for entry in entries:
            name = f"microphone, {entry.turn.start_s:.1f} s"
            if isinstance(entry.result, Failure):
                problems.append(f"{name}: {entry.error}")
                continue
            number = self.earlier + len(self.turns) + 1
            audio = self.folder / f"{number}.wav"
            soundfile.write(audio, entry.waveform, self.recognizer.sampling_rate)
            answers = {"without memory": entry.without_memory, "with memory": entry.result}
            self.turns.append(Turn(number, name, audio, None, answers))
        return problems

    def state(self) -> MemoryState | None:
        """The memory of this dialogue; None before its first utterance."""
        return self.states.get(self.session_id)

    def save_state(self) -> None:
        """Write the state to a file for download."""
        with self._lock:
            if self.closed or (state := self.state()) is None:
                return
            if self.file is not None:
                self.file.unlink(missing_ok=True)
            self.file = self.folder / f"dialogue-after-{state.utterances.item()}-utterances.safetensors"
            state.save(self.file)

    def close(self) -> None:
        """Delete the session and the files."""
        with self._lock:
            self.closed = True
            self.states.pop(self.session_id, None)
            shutil.rmtree(self.folder, ignore_errors=True)


def build(recognizer: EmotionRecognizer, folder: Path, host: str) -> gr.Blocks:
    """Build the page. Anyone who knows the path of a file in `folder` can download it."""
    colors = emotion_colors(recognizer.labels)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"), {"colors": colors, "ink_on": ink_on})
    alert = environment.from_string(
        '{% if problems %}<div class="message" role="alert">{% for one in problems %}<p>{{ one }}</p>{% endfor %}'
        "<p>Nothing else is lost, and the dialogue continues.</p></div>{% endif %}"
    )

    def timeline_of(conversation: Conversation | None) -> str:
        state = None if conversation is None else conversation.state()
        return inert(template.render(conversation=conversation, state=state))

    with gr.Blocks(
        title="mal_adapter", analytics_enabled=False, fill_width=True, delete_cache=(600, UPLOADS_KEPT_S)
    ) as page:
        gr.Markdown(f"# A dialogue, answered with memory and without\n{INTRODUCTION.format(host)}")
        mine = gr.State(time_to_live=KEPT_S, delete_callback=lambda conversation: conversation and conversation.close())
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                play = gr.Button("Play an example dialogue", variant="primary", size="md")
                files = gr.File(label="Add utterances, one or several", file_count="multiple", height=150)
                spoken = gr.Audio(label="Record an utterance", sources=["microphone"], type="filepath")
                talk = gr.Audio(
                    label="Talk, and see each turn as it ends", sources=["microphone"], streaming=True, elem_id="talk"
                )
                restart = gr.Button("New dialogue", size="md", elem_id="new")
                state_in = gr.UploadButton("Continue from a state", file_types=[".safetensors"], size="md")
            with gr.Column(scale=7, min_width=320):
                message = gr.HTML(elem_id="message")
                timeline = gr.HTML(timeline_of(None), elem_id="timeline")

        def shown(
            conversation: Conversation | None, problems: Sequence[str] = (), *, over: bool = True
        ) -> dict[Any, Any]:
            if over and conversation is not None:
                conversation.save_state()
            return {timeline: timeline_of(conversation), message: inert(alert.render(problems=problems))}

        def begin(old: Conversation | None, state: MemoryState | None = None) -> Conversation:
            new = Conversation(recognizer, folder, state)
            if old is not None:
                old.close()
            return new

        def add(conversation: Conversation | None, given: list[str] | str) -> Iterator[dict[Any, Any]]:
            recorded = isinstance(given, str)
            paths = [Path(given)] if isinstance(given, str) else [Path(path) for path in given]
            conversation = begin(None) if conversation is None else conversation
            yield {mine: conversation, files: None, spoken: None}
            problems: list[str] = []
            for path in sorted(paths, key=lambda path: natural(path.name)):
                problem = conversation.answer(path, "recording" if recorded else path.name)
                problems += [] if problem is None else [problem]
                if conversation.closed:  # another dialogue has started meanwhile
                    return
                yield shown(conversation, problems, over=False)
            yield shown(conversation, problems)

        def listen(conversation: Conversation | None, block: tuple[int, np.ndarray] | None) -> dict[Any, Any]:
            if block is None:
                return {mine: conversation}
            conversation = begin(None) if conversation is None else conversation
            before = len(conversation.turns)
            problems = conversation.listen(*block)
            grown = len(conversation.turns) > before or problems
            return {mine: conversation, **(shown(conversation, problems, over=False) if grown else {})}

        def stop_listening(conversation: Conversation | None) -> dict[Any, Any]:
            return {} if conversation is None else shown(conversation, conversation.stop_listening())

        def example(conversation: Conversation | None) -> Iterator[dict[Any, Any]]:
            conversation = begin(conversation)
            yield {mine: conversation, **shown(conversation)}
            with tempfile.TemporaryDirectory() as wavs:
                (dialogue,) = write_wavs([make_dialogue("test", secrets.randbelow(2**32), 0)], wavs)
                for said in dialogue.utterances:
                    truth = recognizer.labels.lookup(said.emotion) if said.emotion in recognizer.labels else None
                    conversation.answer(said.audio, f"speaker {said.speaker}", truth)
                    if conversation.closed:
                        return
                    yield shown(conversation, over=False)
            yield shown(conversation)

        def resume(conversation: Conversation | None, path: str) -> dict[Any, Any]:
            try:
                conversation = begin(conversation, MemoryState.load(path))
            except MalAdapterError as error:
                return shown(conversation, [f"{Path(path).name}: {str(error).removeprefix(f'{path}: ')}"])
            return {mine: conversation, **shown(conversation)}

        def reset(conversation: Conversation | None) -> dict[Any, Any]:
            conversation = begin(conversation)
            return {mine: conversation, **shown(conversation)}

        outputs = [mine, files, spoken, message, timeline]
        common = {"outputs": outputs, "show_progress": "minimal", "show_progress_on": [timeline]}
        answering = [files.upload(add, [mine, files], **common), spoken.stop_recording(add, [mine, spoken], **common)]
        # One at a time, so that the blocks of a microphone keep their order.
        talking = {"outputs": outputs, "show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "talk"}
        talk.stream(listen, [mine, talk], stream_every=0.5, **talking)
        talk.stop_recording(stop_listening, mine, **talking)
        # Cancel first: otherwise the rest of the last dialogue could be drawn over the next one.
        answering.append(play.click(None, cancels=answering).then(example, mine, **common))
        restart.click(None, cancels=answering).then(reset, mine, **common)
        state_in.upload(None, cancels=answering).then(resume, [mine, state_in], **common)
    return page


def inert(markup: str) -> str:
    """The same HTML, with the characters escaped that Gradio would read as templates."""
    return re.sub(r"[${}`]", lambda sign: f"&#{ord(sign[0])};", markup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HOST_FOLDER), help="folder or Hub id of an audio language model")
    parser.add_argument("--adapter", default=str(ADAPTER_FOLDER), help="folder or Hub id of a trained memory for it")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines; microphones then need https")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()

    model, processor = load_host(options.model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that recordings are deleted, too
    with attach_memory(model, adapter=options.adapter) as memory, tempfile.TemporaryDirectory() as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        recognizer = EmotionRecognizer(model, processor, memory)
        page = build(recognizer, Path(folder), DEMO_HOST if options.model == str(HOST_FOLDER) else options.model)
        page.queue(default_concurrency_limit=4).launch(
            server_name=options.host, server_port=options.port, css_paths=STYLE, max_file_size="50mb", show_error=True,
            theme=gr.themes.Default(primary_hue="slate", font="system-ui", font_mono="ui-monospace"),
            footer_links=[], run_history=False, enable_monitoring=False,
        )  # fmt: skip


if __name__ == "__main__":
    main()
