"""The format of an adapter folder: `config.json`, `model.safetensors`, `README.md`. docs/file_format.md documents it.

A file of this `FORMAT_VERSION` is read. A newer one is refused with the advice to upgrade. An older one is first
converted by `MIGRATIONS`. An unknown key at the top of `config.json` is ignored: it is an addition that an older reader
does not need. An unknown key inside `memory` is refused: it would change the mathematics. A change that an older reader
must not ignore needs a new `FORMAT_VERSION`.

The "memory" section is a plain dict here. A `ShapesOf` function checks it.
"""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mal_adapter.errors import AdapterFormatError, ConfigError
from mal_adapter.serialization.atomic import folder_problem, remove_leftovers, write_atomically
from mal_adapter.serialization.metadata import AdapterMetadata
from mal_adapter.serialization.model_card import model_card
from mal_adapter.serialization.strict_json import open_regular, parse_json
from mal_adapter.serialization.tensors import load_tensors, read_header, save_tensors
from mal_adapter.serialization.text import clip, in_unicode, shown
from mal_adapter.serialization.versions import library_version

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "AdapterConfig",
    "ShapesOf",
    "check_folder",
    "check_ours",
    "copy_into",
    "encode",
    "read_config",
    "read_weights",
    "write_folder",
]

FORMAT_VERSION = 1
CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
_STAGED = ".saving."
TEXT_LIMIT = 2**20  # bytes of config.json or README.md

Migration = Callable[[dict[str, Any]], dict[str, Any]]
MIGRATIONS: dict[int, Migration] = {}
"""`MIGRATIONS[n]` converts the content of a `config.json` from format n to format n + 1."""

_DTYPES = ("F64", "F32", "F16", "BF16")
_FOREIGN = re.compile(r"(?!model\.safetensors$).*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack)(\.index\.json)?$")


ShapesOf = Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]]
"""Return the names and shapes of the tensors that a "memory" section requires; raise `ConfigError` if it is invalid."""


class AdapterConfig(NamedTuple):
    """The content of a `config.json`."""

    memory: dict[str, Any]
    """The "memory" section, checked by a `ShapesOf`."""
    shapes: Mapping[str, tuple[int, ...]]
    """The tensors that it requires."""
    metadata: AdapterMetadata
    weights_sha256: str | None
    """Of `model.safetensors`, 64 hex digits, or None."""


def encode(
    memory: Mapping[str, Any],
    metadata: AdapterMetadata,
    tensors: Mapping[str, Tensor],
    *,
    repo_id: str | None = None,
    existing_card: str = "",
) -> dict[str, bytes]:
    """The files of an adapter, by name; `memory`, `repo_id` and `existing_card` as in `model_card`."""
    metadata.check()
    if (name := metadata.base_model_name_or_path) is not None:  # it may be a folder's name that is not UTF-8
        metadata = dataclasses.replace(metadata, base_model_name_or_path=in_unicode(name))
    weights = save_tensors(tensors, {"format": "pt"})
    content = {
        "library_name": "mal_adapter",
        "library_version": library_version(),
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(metadata),
        "memory": dict(memory),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    return {
        CARD_NAME: model_card(memory, metadata, repo_id=repo_id, existing=existing_card).encode(),
        CONFIG_NAME: (json.dumps(content, indent=2) + "\n").encode(),
        WEIGHTS_NAME: weights,
    }


def write_folder(
    folder: str | os.PathLike[str],
    memory: Mapping[str, Any],
    metadata: AdapterMetadata,
    tensors: Mapping[str, Tensor],
    shapes_of: ShapesOf,
) -> None:
    """Write an adapter folder.

    All files are written and synced first, then moved into place one by one. By `weights_sha256` a reader notices files
    of two different saves.

    Raises:
        AdapterFormatError: `folder` is a file or holds another model, or a field of `metadata` has the wrong type.
    """
    folder = Path(folder)
    names = _check_folder(folder, shapes_of)
    existing_card = _read_text(folder / CARD_NAME) if CARD_NAME in names else b""
    _put_in_place(folder, encode(memory, metadata, tensors, existing_card=existing_card.decode(errors="replace")))


def check_folder(
    folder: str | os.PathLike[str], memory: Mapping[str, Any], metadata: AdapterMetadata, shapes_of: ShapesOf
) -> None:
    """Raise the error that `write_folder` would raise, without writing anything; for a check before training.

    Raises:
        AdapterFormatError: As for `write_folder`, or the folder is not writable.
    """
    folder = Path(folder)
    if problem := folder_problem(folder):
        raise AdapterFormatError(problem)
    names = _check_folder(folder, shapes_of)
    existing_card = _read_text(folder / CARD_NAME) if CARD_NAME in names else b""
    encode(memory, metadata, {}, existing_card=existing_card.decode(errors="replace"))


def copy_into(folder: str | os.PathLike[str], files: Mapping[str, Path], shapes_of: ShapesOf) -> None:
    """Copy an adapter's files, given by name, into a folder. Their bytes stay the same.

    Raises:
        AdapterFormatError: `folder` is a file or holds another model.
    """
    folder = Path(folder)
    _check_folder(folder, shapes_of)
    _put_in_place(folder, {name: path.read_bytes() for name, path in files.items()})


def _check_folder(folder: Path, shapes_of: ShapesOf) -> list[str]:
    if folder.exists() and not folder.is_dir():
        raise AdapterFormatError(f"{folder} is a file; give a folder to save the adapter in")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    check_ours(str(folder), names, lambda: _read_text(folder / CONFIG_NAME), shapes_of)
    return names


def _put_in_place(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, _STAGED)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_STAGED) as staged:
        for name, data in files.items():
            write_atomically(Path(staged) / name, data)
        for name in files:
            os.replace(Path(staged) / name, folder / name)


def check_ours(place: str, names: Iterable[str], read_config_file: Callable[[], bytes], shapes_of: ShapesOf) -> None:
    """Raise `AdapterFormatError` if `place` holds files of another model, which a save would overwrite or mix with.

    Args:
        place: The folder or repository, for the message.
        names: The names of its files.
        read_config_file: Reads its `config.json`.
        shapes_of: Checks the "memory" section.
    """
    names = set(names)
    foreign = sorted(name for name in names if _FOREIGN.match(name))
    if CONFIG_NAME in names:
        try:
            parse_config(read_config_file(), shapes_of)
        except AdapterFormatError as error:
            raise AdapterFormatError(
                f"{place} holds something other than an adapter ({error}); give another place"
            ) from error
    elif WEIGHTS_NAME in names:
        foreign.append(WEIGHTS_NAME)
    if foreign:
        raise AdapterFormatError(f"{place} holds files of another model ({', '.join(foreign[:3])}); give another place")


def read_config(path: Path, shapes_of: ShapesOf) -> AdapterConfig:
    """Read a `config.json`.

    Args:
        path: The file.
        shapes_of: Checks the "memory" section.

    Raises:
        AdapterFormatError: The file is missing, damaged, too large, or of a format that this version can't read.
    """
    return parse_config(_read_text(path), shapes_of)


def _read_text(path: Path) -> bytes:
    try:
        file, size = open_regular(path)
        with file:
            if size > TEXT_LIMIT:
                raise ValueError(f"{path.name} has {size} bytes, more than {TEXT_LIMIT}")
            return file.read(TEXT_LIMIT)
    except FileNotFoundError as error:
        raise AdapterFormatError(f"there is no {path.name}; save_pretrained writes it") from error
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{path.name} can't be read: {error}") from error


def parse_config(data: bytes, shapes_of: ShapesOf) -> AdapterConfig:
    """Parse the bytes of a `config.json`; raise `AdapterFormatError` as `read_config` does."""
    try:
        content = parse_json(data)
    except ValueError as error:
        raise AdapterFormatError(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("library_name") != "mal_adapter":
        raise AdapterFormatError(f"{CONFIG_NAME} does not describe a mal_adapter adapter")
    content = _migrated(content)
    memory = content.get("memory")
    if not isinstance(memory, dict):
        raise AdapterFormatError(f"{CONFIG_NAME} has no memory configuration")
    try:
        shapes = shapes_of(memory)
        names = [field.name for field in dataclasses.fields(AdapterMetadata)]
        metadata = AdapterMetadata(**{name: content.get(name) for name in names})
        metadata.check()
    except (ConfigError, AdapterFormatError) as error:
        raise AdapterFormatError(f"{CONFIG_NAME}: {error}") from error
    sha256 = content.get("weights_sha256")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise AdapterFormatError(f"{CONFIG_NAME}: weights_sha256 is not 64 lower-case hex digits")
    return AdapterConfig(memory, shapes, metadata, sha256)


def _migrated(content: dict[str, Any]) -> dict[str, Any]:
    given = content.get("format_version")
    if type(given) is not int or not (given == FORMAT_VERSION or given > FORMAT_VERSION or given in MIGRATIONS):
        raise AdapterFormatError(f"{CONFIG_NAME} has format_version {shown(given)}, this reads {FORMAT_VERSION}")
    if given > FORMAT_VERSION:
        raise AdapterFormatError(
            f"{CONFIG_NAME} has format_version {shown(given)}, this version reads up to {FORMAT_VERSION}; "
            "pip install --upgrade mal-adapter"
        )
    for step in range(given, FORMAT_VERSION):
        content = MIGRATIONS[step](content)
    return content


def read_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], sha256: str | None) -> dict[str, Tensor]:
    """Read a `model.safetensors` with exactly these tensors, all finite and of one float dtype.

    The header is compared with `shapes` before memory for the tensors is allocated.

    Args:
        path: The file.
        shapes: The names and shapes of the tensors.
        sha256: The file's expected SHA-256; not checked if None.

    Raises:
        AdapterFormatError: The file is missing or damaged, holds other tensors, or has another SHA-256.
    """
    try:
        file, size = open_regular(path)
        with file:
            header = read_header(file, size)
            _check_tensors(header.shapes, shapes)
            dtypes = set(header.dtypes.values())
            if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
                raise AdapterFormatError(f"{path.name} has dtypes {sorted(dtypes)}, expected one of {_DTYPES}")
            file.seek(0)
            data = file.read(size)
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise AdapterFormatError(
                f"{path.name} has sha256 {found[:12]}…, {CONFIG_NAME} expects {sha256[:12]}…: it is damaged or of "
                f"another save; fetch or save it again, or remove weights_sha256 from {CONFIG_NAME} if you changed it"
            )
        return load_tensors(data)[1]
    except AdapterFormatError:
        raise
    except FileNotFoundError as error:
        raise AdapterFormatError(f"there is no {path.name}; save_pretrained writes it") from error
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{path.name} is not a readable safetensors file: {error}") from error


def _check_tensors(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    if given != expected:
        wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        pairs = [f"{clip(name, 40)}: file {given.get(name)}, config {expected.get(name)}" for name in wrong[:4]]
        raise AdapterFormatError(f"tensors do not fit the configuration ({', '.join(pairs)})")
