"""`mal-adapter states`: the sessions in a folder or a Redis."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote

import typer

from mal_adapter.cli.failures import WRONG_INPUT
from mal_adapter.cli.options import json_option
from mal_adapter.cli.output import complain, header, load_libraries, print_json, print_line, row, width
from mal_adapter.cli.usage import Group, add, as_typed, examples, shown

if TYPE_CHECKING:
    from mal_adapter.memory.state import MemoryState
    from mal_adapter.stores.base import SessionStore

__all__ = ["states"]

states = typer.Typer(
    name="states",
    cls=Group,
    help="List, export, import and drop the sessions of a store.\n\n"
    "A store has the memories of dialogues of `attach_memory(..., store=...)`: a folder or a Redis.",
    no_args_is_help=True,
    epilog=examples(("List all sessions", "mal-adapter states list --store sessions")),
)

PANEL = "Commands"
Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="FOLDER_OR_URL",
        help="A folder of sessions, or redis://host/0, with :password@ before the host if it has one. Other users "
        "of the machine can't see the variable.",
        envvar="MAL_ADAPTER_STORE",
        show_envvar=True,
    ),
]
Prefix = Annotated[str | None, typer.Option(metavar="TEXT", help="The prefix of the application's keys in Redis.")]


def _session_ids(context: typer.Context, incomplete: str) -> list[str]:
    """For completion in a shell: the sessions of a folder, by file names alone, since torch takes seconds."""
    files = Path(context.params.get("store") or "").glob("*.safetensors")
    names = sorted(unquote(file.name.removesuffix(".safetensors")) for file in files)
    return [name for name in names if name.startswith(incomplete)]


SessionId = Annotated[
    str,
    typer.Argument(
        metavar="SESSION_ID",
        help="The id that the application uses.",
        autocompletion=_session_ids,
        callback=lambda value: as_typed(value),
    ),
]


@shown(
    PANEL,
    ("Of a folder", "mal-adapter states list --store sessions"),
    ("Of a Redis, for a script", "mal-adapter states list --store redis://localhost/0 --json"),
)
def list_states(
    store: Store,
    prefix: Prefix = None,
    as_json: Annotated[
        bool,
        json_option("sessions, each with session, utterances, tokens, skipped_writes, bytes, adapter; and not_read"),
    ] = False,
) -> None:
    """List the sessions with their counters.

    The exit code is 2 if one is damaged; the others are still listed.
    """
    opened = _open(store, prefix)
    from mal_adapter.errors import StateFormatError

    entries, damaged = [], []
    for session_id in sorted(opened):
        try:
            stored = opened.get(session_id)
        except StateFormatError as error:
            complain(error)
            damaged.append(str(error))
            continue
        if stored is not None:  # dropped meanwhile
            entries.append(describe(session_id, stored.state))
    if as_json:
        print_json({"sessions": entries, "not_read": damaged})
    elif entries:
        columns = list(entries[0])
        cells = [[str(value) for value in entry.values()] for entry in entries]
        widths = [max(map(width, column)) for column in zip(columns, *cells, strict=True)]
        numbers = range(1, columns.index("adapter"))
        print_line(header(row(columns, widths, numbers)))
        for line in cells:
            print_line("  ".join(row(line, widths, numbers)).rstrip())
    elif not damaged:
        print_line("no sessions")
    if damaged:
        raise typer.Exit(WRONG_INPUT)


@shown(
    PANEL,
    (
        "Write a session into a file",
        "mal-adapter states export call-42 call-42.safetensors --store sessions",
    ),
)
def export_state(
    session_id: SessionId,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="For MemoryState.load; an existing file is replaced.")],
    store: Store,
    prefix: Prefix = None,
    as_json: Annotated[bool, json_option("session, file, utterances, bytes")] = False,
) -> None:
    """Write the state of one session into a file. The session stays in the store."""
    opened = _open(store, prefix)
    from mal_adapter.errors import SessionError

    stored = opened.get(session_id)
    if stored is None:
        raise SessionError(f"there is no session {session_id!r} in {_shown(store)}")
    stored.state.save(file)
    _report(session_id, file, stored.state, "is in", as_json=as_json)


@shown(
    PANEL,
    ("Make a new session from a file", "mal-adapter states import call-43 call-42.safetensors --store sessions"),
)
def import_state(
    session_id: SessionId,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A file of `export` or MemoryState.save.", exists=True, dir_okay=False),
    ],
    store: Store,
    prefix: Prefix = None,
    as_json: Annotated[bool, json_option("session, file, utterances, bytes")] = False,
) -> None:
    """Start a new session with the state in a file.

    An existing session is never overwritten; drop it first. Only the adapter that wrote the state can continue it.
    """
    opened = _open(store, prefix)
    from mal_adapter.errors import SessionConflictError, StateFormatError
    from mal_adapter.memory.state import MemoryState

    state = MemoryState.load(file)
    if state.batch_size != 1:
        raise StateFormatError(f"{file} holds {state.batch_size} dialogues; split() it and save one")
    try:
        opened.put(session_id, state)
    except SessionConflictError as error:
        message = f"session {session_id!r} is already in {_shown(store)}; drop it first, or choose another id"
        raise SessionConflictError(message) from error
    _report(session_id, file, state, "continues from", as_json=as_json)


@shown(PANEL, ("Drop two calls", "mal-adapter states drop call-42 call-43 --store sessions"))
def drop_states(
    session_ids: Annotated[
        list[str],
        typer.Argument(
            metavar="SESSION_ID",
            help="The ids that the application uses.",
            autocompletion=_session_ids,
            callback=lambda values: list(map(as_typed, values)),
        ),
    ],
    store: Store,
    prefix: Prefix = None,
    as_json: Annotated[bool, json_option("dropped")] = False,
) -> None:
    """Delete sessions. This can't be undone."""
    opened = _open(store, prefix)
    from mal_adapter.errors import SessionError

    missing = [session_id for session_id in session_ids if not opened.drop(session_id)]
    if missing:
        others = "; the others are dropped" if len(missing) < len(session_ids) else ""
        raise SessionError(f"there is no session {', '.join(map(repr, missing))} in {_shown(store)}{others}")
    if as_json:
        print_json({"dropped": session_ids})
    else:
        print_line(f"dropped {', '.join(session_ids)}")


for command, name in ((list_states, "list"), (export_state, "export"), (import_state, "import"), (drop_states, "drop")):
    add(states, command, name)


def describe(session_id: str, state: "MemoryState") -> dict[str, Any]:
    """A session's counters, for a row of the table."""
    return {
        "session": session_id,
        "utterances": int(state.utterances),
        "tokens": int(state.tokens),
        "skipped_writes": int(state.skipped_writes),
        "bytes": state.nbytes,
        "adapter": state.fingerprint or "-",
    }


def _report(session_id: str, file: Path, state: "MemoryState", verb: str, *, as_json: bool) -> None:
    utterances = int(state.utterances)
    if as_json:
        print_json({"session": session_id, "file": str(file), "utterances": utterances, "bytes": state.nbytes})
    else:
        print_line(f"{session_id} {verb} {file}: {utterances} utterances, {state.nbytes} bytes")


def _shown(store: str) -> str:
    """The store without user, password and options, any of which may be a secret, for messages."""
    return re.sub(r"//[^/]*@", "//", store.partition("?")[0]) if "://" in store else store


def _open(store: str, prefix: str | None) -> "SessionStore":
    if "://" not in store and not Path(store).is_dir():
        raise typer.BadParameter(f"there is no folder {store}", param_hint="--store")
    if "://" not in store and prefix is not None:
        raise typer.BadParameter(f"{store} is a folder, and only Redis has prefixes", param_hint="--prefix")
    load_libraries()
    from mal_adapter.stores import open_store
    from mal_adapter.stores.redis import RedisStore

    return open_store(store) if prefix is None else RedisStore(store, prefix)
