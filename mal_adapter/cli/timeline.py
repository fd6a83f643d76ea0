"""`mal-adapter timeline`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter import demo
from mal_adapter.cli.failures import WRONG_INPUT
from mal_adapter.cli.hosts import device_of, load_recognizer
from mal_adapter.cli.options import (
    MODEL_PANEL,
    Adapter,
    Device,
    Dtype,
    DtypeOption,
    Labels,
    Model,
    Prompt,
    json_option,
)
from mal_adapter.cli.output import complain, load_libraries, note, print_json
from mal_adapter.cli.recordings import Job, Plan, describe_task, find_jobs, note_channels, unreadable
from mal_adapter.cli.turn_table import print_turns
from mal_adapter.cli.usage import as_typed, shown
from mal_adapter.extras import require
from mal_adapter.ser.turns.turn import TurnSettings

if TYPE_CHECKING:
    from mal_adapter.errors import MalAdapterError
    from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
    from mal_adapter.ser.timeline import Timeline, TimelineEntry
    from mal_adapter.ser.timeline.output import OutputFolders

__all__ = ["timeline"]

TURNS_PANEL, OUTPUT_PANEL = "Turns", "Output"
USUAL = TurnSettings()


def _seconds(help_text: str) -> Any:
    return typer.Option(metavar="SECONDS", help=help_text, rich_help_panel=TURNS_PANEL)


@shown(
    "Try",
    (
        "A call with a speaker per channel, and a page to look at",
        "mal-adapter timeline call-42.wav --channels customer,agent --output calls",
    ),
    (
        "An interview whose turns somebody has marked",
        "mal-adapter timeline interview.wav --turns interview.TextGrid",
    ),
    (
        "Many recordings, with a trained memory; run it again to continue",
        "mal-adapter timeline call-1.wav call-2.wav --channels customer,agent \\\n"
        "--adapter my-memory --output calls --formats jsonl,html",
    ),
)
def timeline(
    recordings: Annotated[
        list[Path],
        typer.Argument(metavar="RECORDING", help="Sound files, each a whole conversation."),
    ],
    turns: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Who speaks when: RTTM, TextGrid, ELAN, SRT, WebVTT, Audacity labels, CSV, or the JSON of WhisperX or "
            "pyannote; or a folder with a file per recording, of the same name (default: voice activity).",
            rich_help_panel=TURNS_PANEL,
        ),
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="The tiers of the file of turns to read (default: those of the speakers).",
            rich_help_panel=TURNS_PANEL,
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="The speaker of each channel (default: channels are averaged).",
            rich_help_panel=TURNS_PANEL,
        ),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            metavar="P", help="Voice activity: the probability from which it is speech.", rich_help_panel=TURNS_PANEL
        ),
    ] = USUAL.threshold,
    min_s: Annotated[float, _seconds("Voice activity: shorter speech is no turn.")] = USUAL.min_s,
    max_s: Annotated[
        float | None, _seconds("Longer turns are split where it is quiet (default: what the model accepts).")
    ] = USUAL.max_s,
    pad_s: Annotated[float, _seconds("Voice activity: what a turn gets before and after its speech.")] = USUAL.pad_s,
    merge_s: Annotated[float, _seconds("Voice activity: shorter pauses do not end a turn.")] = USUAL.merge_s,
    crosstalk_db: Annotated[
        float,
        typer.Option(
            metavar="DB",
            help="Voice activity: speech so much quieter than another channel's is that channel's.",
            rich_help_panel=TURNS_PANEL,
        ),
    ] = USUAL.crosstalk_db,
    model: Model = None,
    adapter: Adapter = None,
    no_memory: Annotated[
        bool,
        typer.Option("--no-memory", help="Recognise each turn on its own.", rich_help_panel=MODEL_PANEL),
    ] = False,
    no_compare: Annotated[
        bool,
        typer.Option(
            "--no-compare",
            help="Answer with memory only, in about half the time.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False,
    labels: Labels = None,
    prompt: Prompt = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Recordings in one forward.", rich_help_panel=MODEL_PANEL)
    ] = 8,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a folder per recording into it.", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Some of jsonl, csv, rttm, vtt, srt, textgrid, elan and html (default: all).",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    no_audio: Annotated[
        bool,
        typer.Option("--no-audio", help="Leave the sound out of the HTML page.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    as_json: Annotated[
        bool,
        json_option("model, adapter, memory, labels, prompt, device, dtype, settings, channels, recordings, not_read"),
    ] = False,
) -> None:
    """Recognise the emotions of whole recordings, turn by turn, with and without a memory of the conversation.

    Each recording gives a table, and with --output a folder with its timeline as JSON Lines, CSV, RTTM, subtitles,
    annotation tiers, and one HTML page to look at and listen to. A recording whose folder is complete is skipped, so
    the same command continues after Ctrl-C. A file that can't be read gives one line on stderr and exit code 2; the
    others are done. Without --model and --adapter, the demo's tiny model answers; it knows only synthetic voices.
    """
    from mal_adapter.errors import ConfigError

    settings = TurnSettings(threshold, min_s, max_s, pad_s, merge_s, crosstalk_db)
    names = None if channels is None else _split(channels)
    if turns is None and tiers is not None:
        raise ConfigError("--tiers is about a file of turns; add --turns")
    if output is None and (formats is not None or no_audio):
        raise ConfigError("--formats and --no-audio are about written files; add --output")
    load_libraries()
    from mal_adapter.ser.timeline.output import FORMATS, OutputFolders

    folders = None
    if output is not None:
        folders = OutputFolders(output, tuple(FORMATS) if formats is None else _split(formats), audio=not no_audio)
        folders.check()
    if turns is None:
        require("voice activity", "silero_vad", extra="recordings")
    if model is None and adapter is None:
        model, adapter = str(demo.HOST_FOLDER), str(demo.ADAPTER_FOLDER)
    if adapter is None and not no_memory:
        note("no --adapter, so each turn is recognised on its own")
    plan = Plan(turns, None if tiers is None else _split(tiers), names, settings, len(recordings) > 1)
    found, not_read = find_jobs(recordings, plan)
    task = describe_task(model, adapter, labels, prompt, dtype, memory=not no_memory, compare=not no_compare)
    keys: dict[Path, dict[str, Any]] = {}
    if folders is not None:
        keys = {job.recording: plan.key(job, task) for job in found}
    done = [job for job in found if folders is not None and folders.is_complete(job.recording, keys[job.recording])]
    if done and not as_json:
        note(f"{len(done)} of {len(recordings)} recordings are complete in {output}, and skipped")
    answers = {job.recording: _skipped(job, folders) for job in done if folders is not None and as_json}
    recognizer, printed = None, False
    if jobs := [job for job in found if job not in done]:
        recognizer = load_recognizer(
            model, adapter, labels, prompt, device_of(device), dtype, spread=device == "auto", memory=not no_memory
        )
        note_channels(jobs, plan)
        for job, answered in _answered(recognizer, jobs, plan, compare=not no_compare, batch_size=batch_size):
            try:
                if isinstance(answered, Exception):
                    raise answered
                made = _timeline_of(recognizer, job, plan, adapter, answered)
                folder = None if folders is None else folders.write(made, keys[job.recording])
            except unreadable() as error:
                complain(error)
                not_read.append(str(error))
                continue
            if as_json:
                answers[job.recording] = _entry(made, folder)
            else:
                print_turns(made, folder, first=not printed)
                printed = True
    if as_json:
        print_json(
            {
                **{name: task[name] for name in ("model", "adapter", "memory", "labels", "prompt")},
                "device": None if recognizer is None else str(recognizer.model.device),
                "dtype": dtype.value if recognizer is None else str(recognizer.model.dtype).removeprefix("torch."),
                "settings": asdict(settings),
                "channels": names,
                "recordings": [answers[job.recording] for job in found if job.recording in answers],
                "not_read": not_read,
            }
        )
    if not_read:
        raise typer.Exit(WRONG_INPUT)


def _split(given: str) -> list[str]:
    return [name.strip() for name in as_typed(given).split(",")]


def _answered(
    recognizer: "EmotionRecognizer", jobs: Sequence[Job], plan: Plan, *, compare: bool, batch_size: int
) -> "Iterator[tuple[Job, list[TimelineEntry] | MalAdapterError]]":
    """Each recording as soon as it is over: its entries, or why it can't be answered to its end."""
    from mal_adapter.ser.progress import progress_bar
    from mal_adapter.ser.timeline import TimelineEntry
    from mal_adapter.ser.timeline.make import make_timelines
    from mal_adapter.ser.timeline.request import Request

    job_of = {Request(job.recording, job.turns, plan.channels, plan.settings): job for job in jobs}
    entries: dict[Request, list[TimelineEntry]] = {request: [] for request in job_of}
    done_s = dict.fromkeys(entries, 0.0)
    with progress_bar(
        desc=f"0 of {len(jobs)} recordings",
        total=sum(job.info.duration_s for job in jobs),
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]",
        leave=False,
    ) as bar:
        for request, found in make_timelines(recognizer, list(entries), compare=compare, batch_size=batch_size):
            if isinstance(found, TimelineEntry):
                entries[request].append(found)
                reached_s = max(done_s[request], found.turn.end_s)
            else:
                reached_s = job_of[request].info.duration_s
            bar.update(reached_s - done_s[request])
            done_s[request] = reached_s
            if not isinstance(found, TimelineEntry):
                answered = entries.pop(request)
                yield job_of[request], answered if found is None else found
                bar.set_description_str(f"{len(jobs) - len(entries)} of {len(jobs)} recordings")


def _timeline_of(
    recognizer: "EmotionRecognizer", job: Job, plan: Plan, adapter: str | None, entries: "list[TimelineEntry]"
) -> "Timeline":
    from mal_adapter.ser.timeline import Timeline
    from mal_adapter.ser.timeline.request import session_name

    return Timeline(
        job.recording,
        job.info.duration_s,
        tuple(entries),
        tuple(recognizer.labels),
        session_name(job.recording),
        recognizer.prompt,
        model=recognizer.model.name_or_path,
        adapter=adapter if recognizer.reads_memory else None,
        turns_from=None if job.turns_from is None else job.turns_from.name,
        settings=plan.settings if job.turns is None else None,
        channels=tuple(plan.channels or ()),
    )


def _skipped(job: Job, folders: "OutputFolders") -> dict[str, Any]:
    """The JSON of a recording that is complete already, from its JSON Lines."""
    from mal_adapter.ser.timeline.writers import read_timeline

    folder, path = folders.of(job.recording), folders.made(job.recording, "jsonl")
    if path is None:
        return {"recording": str(job.recording), "output": str(folder), "skipped": True, "turns": None}
    return {**_entry(read_timeline(path), folder), "skipped": True}


def _entry(made: "Timeline", folder: Path | None) -> dict[str, Any]:
    whole, *turns = made.to_records()
    del whole["type"], whole["format_version"]
    return {**whole, "output": None if folder is None else str(folder), "skipped": False, "turns": turns}
