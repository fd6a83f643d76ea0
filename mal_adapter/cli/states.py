"""`mal-adapter states`: the sessions in a folder or a Redis."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter.cli.output import complain, row

if TYPE_CHECKING:
    from mal_adapter.state import MemoryState
    from mal_adapter.stores import SessionStore

__all__ = ["states"]

states = typer.Typer(name="states", help="List, export, import and drop the sessions of a store.", no_args_is_help=True)

Store = Annotated[
    str, typer.Option("--store", metavar="FOLDER_OR_URL", help="A folder of sessions, or redis://[:password@]host/db.")
]
Prefix = Annotated[str | None, typer.Option(help="What this application's keys in Redis begin with.")]
SessionId = Annotated[str, typer.Argument(metavar="SESSION_ID")]


@states.command("list")
def list_states(
    store: Store,
    prefix: Prefix = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Each session with its counters. Exit code 1 if one is damaged; the others are listed all the same."""
    from mal_adapter.errors import StateFormatError

    opened, entries, damaged = _open(store, prefix), [], 0
    for session_id in sorted(opened):
        try:
            stored = opened.get(session_id)
        except StateFormatError as error:
            complain(error)
            damaged += 1
            continue
        if stored is not None:  # dropped meanwhile
            entries.append(describe(session_id, stored.state))
    if as_json:
        typer.echo(json.dumps({"sessions": entries}, indent=2))
    elif entries:
        header = list(entries[0])
        cells = [[str(value) for value in entry.values()] for entry in entries]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        for line in (header, *cells):
            typer.echo(row(line, widths))
    if damaged:
        raise typer.Exit(1)


@states.command("export")
def export_state(
    session_id: SessionId,
    file: Annotated[Path, typer.Argument(help="Is written anew: a safetensors file for MemoryState.load.")],
    store: Store,
    prefix: Prefix = None,
) -> None:
    """Write one session's state into a file."""
    stored = _open(store, prefix).get(session_id)
    if stored is None:
        _fail(f"there is no session {session_id!r} in {store}")
    else:
        stored.state.save(file)


@states.command("import")
def import_state(
    session_id: SessionId,
    file: Annotated[Path, typer.Argument(help="What `export` or MemoryState.save wrote.", exists=True, dir_okay=False)],
    store: Store,
    prefix: Prefix = None,
) -> None:
    """Begin a new session with the state in a file."""
    from mal_adapter.errors import SessionConflictError
    from mal_adapter.state import MemoryState

    state = MemoryState.load(file)
    if state.batch_size != 1:
        _fail(f"{file} holds {state.batch_size} dialogues; split() it and save one")
    try:
        _open(store, prefix).put(session_id, state)
    except SessionConflictError:
        _fail(f"there is a session {session_id!r} in {store} already; drop it first, or choose another id")


@states.command("drop")
def drop_states(
    session_ids: Annotated[list[str], typer.Argument(metavar="SESSION_ID...")], store: Store, prefix: Prefix = None
) -> None:
    """Forget sessions."""
    opened = _open(store, prefix)
    if missing := [session_id for session_id in session_ids if not opened.drop(session_id)]:
        _fail(f"there is no session {', '.join(map(repr, missing))} in {store}; the others are dropped")


def describe(session_id: str, state: "MemoryState") -> dict[str, Any]:
    """A session's counters, for a line of the table."""
    return {
        "session": session_id,
        "utterances": int(state.utterances),
        "tokens": int(state.tokens),
        "skipped_writes": int(state.skipped_writes),
        "bytes": state.nbytes,
        "adapter": state.fingerprint or "-",
    }


def _open(store: str, prefix: str | None) -> "SessionStore":
    from mal_adapter.stores import RedisStore, open_store

    if "://" not in store and not Path(store).is_dir():
        raise typer.BadParameter(f"there is no folder {store}", param_hint="--store")
    return open_store(store) if prefix is None else RedisStore(store, prefix)


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
