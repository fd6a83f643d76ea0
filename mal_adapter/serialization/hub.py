"""Adapters on the Hugging Face Hub: downloads through its cache, pushes as one commit, typed errors."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from mal_adapter.errors import AdapterFormatError, AdapterNotFoundError, HubError, MalAdapterError
from mal_adapter.serialization.adapter_folder import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    ShapesOf,
    check_ours,
    copy_into,
    encode,
    read_config,
    read_weights,
)
from mal_adapter.serialization.metadata import AdapterMetadata
from mal_adapter.serialization.text import clip
from mal_adapter.serialization.versions import library_version

__all__ = ["HubOptions", "pull_adapter", "push_adapter", "read_adapter"]


class HubOptions(NamedTuple):
    """The options of a download; the fields are the arguments of `MemoryAdapter.from_pretrained`."""

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False


def read_adapter(
    folder_or_repo: str | os.PathLike[str], shapes_of: ShapesOf, options: HubOptions
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read an adapter from a folder or, if there is no such folder, from the Hub.

    From a repository, `config.json` is downloaded and checked first, then the weights of the same commit.

    Args:
        folder_or_repo: A folder or Hub id.
        shapes_of: Checks the "memory" section and returns the tensors it requires.
        options: The subfolder; the other options apply to the Hub only.

    Raises:
        AdapterNotFoundError: There is no such folder, repository or revision, or access is denied.
        AdapterFormatError: A file is missing or damaged, does not fit the configuration, or has a newer format.
        HubError: The Hub can't be reached, and the files are not in its cache.
    """
    name, subfolder = os.fspath(folder_or_repo), _checked_subfolder(options.subfolder)
    if not Path(name).is_dir():
        _check_may_be_repo_id(folder_or_repo)
        config, tensors, _, _ = _fetch_adapter(name, shapes_of, options)
    else:
        with _named(name, subfolder):
            folder = _inside(Path(name), subfolder)
            config = read_config(folder / CONFIG_NAME, shapes_of)
            tensors = read_weights(folder / WEIGHTS_NAME, config.shapes, config.weights_sha256)
    return config, tensors


def pull_adapter(
    repo_id: str,
    folder: str | os.PathLike[str],
    shapes_of: ShapesOf,
    options: HubOptions,
) -> None:
    """Download an adapter from the Hub, check its files, and copy them into a folder. All are of one commit.

    Raises:
        AdapterNotFoundError: As for `read_adapter`.
        AdapterFormatError: As for `read_adapter`, or `folder` is a file or holds another model.
        HubError: As for `read_adapter`.
    """
    _, _, files, commit = _fetch_adapter(repo_id, shapes_of, options)
    with contextlib.suppress(AdapterFormatError):  # a card may be missing
        files[CARD_NAME] = _fetch(repo_id, CARD_NAME, commit)
    copy_into(folder, files, shapes_of)


def _fetch_adapter(
    repo_id: str, shapes_of: ShapesOf, options: HubOptions
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Path], HubOptions]:
    """Download and check an adapter.

    Returns:
        Its configuration; its tensors; its files by name; and the options that download other files of the same commit.
    """
    _check_repo_id(repo_id)
    subfolder = _checked_subfolder(options.subfolder)
    with _named(repo_id, subfolder):
        config_path = _fetch(repo_id, CONFIG_NAME, options)
        config = read_config(config_path, shapes_of)
        # The cache's folder is named after the commit.
        commit = options._replace(revision=config_path.parents[len(PurePosixPath(subfolder).parts)].name)
        weights_path = _fetch(repo_id, WEIGHTS_NAME, commit)
        tensors = read_weights(weights_path, config.shapes, config.weights_sha256)
    return config, tensors, {CONFIG_NAME: config_path, WEIGHTS_NAME: weights_path}, commit


@contextlib.contextmanager
def _named(place: str, subfolder: str) -> Iterator[None]:
    """Put the folder or repository in front of the message of an error about one of its files."""
    try:
        yield
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{place}{subfolder and '/' + subfolder}: {error}") from error


def _checked_subfolder(subfolder: str | None) -> str:
    """The subfolder with forward slashes; raises `AdapterFormatError` if it could lead out of the folder."""
    if subfolder is None:
        return ""
    windows = PureWindowsPath(subfolder)
    if windows.drive or windows.root or ".." in windows.parts or "\0" in subfolder:
        raise AdapterFormatError(f"subfolder {subfolder!r} is not a path within the folder or repository")
    return "/".join(windows.parts)


def _inside(folder: Path, subfolder: str) -> Path:
    inside = folder / subfolder
    if not inside.resolve().is_relative_to(folder.resolve()):
        raise AdapterFormatError("the subfolder is a link that leads out of the folder")
    if not inside.is_dir():
        raise AdapterNotFoundError(f"there is no folder {inside}")
    return inside


def _check_may_be_repo_id(given: str | os.PathLike[str]) -> None:
    """Raise `AdapterNotFoundError` for a path that can't be a Hub id; the Hub's error would not mention the folder."""
    if Path(given).is_file():
        raise AdapterNotFoundError(f"{given} is a file; give the folder with the adapter's {CONFIG_NAME} and weights")
    if not isinstance(given, str):
        raise AdapterNotFoundError(f"there is no folder {os.fspath(given)}; a Hub id is given as a string")


def _check_repo_id(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise AdapterNotFoundError(f"there is no folder {name}, and it is not a Hub id such as 'user/adapter'")


def _fetch(repo_id: str, name: str, options: HubOptions) -> Path:
    with _typed_errors(repo_id, options.revision, "fetch"):
        path = hf_hub_download(
            repo_id,
            name,
            subfolder=_checked_subfolder(options.subfolder) or None,
            revision=options.revision,
            token=options.token,
            cache_dir=None if options.cache_dir is None else Path(options.cache_dir),
            local_files_only=options.local_files_only,
            force_download=options.force_download,
            library_name="mal_adapter",
            library_version=library_version(),
        )
    return Path(path)


def push_adapter(
    repo_id: str,
    memory: Mapping[str, Any],
    metadata: AdapterMetadata,
    tensors: Mapping[str, Tensor],
    shapes_of: ShapesOf,
    *,
    private: bool | None = None,
    commit_message: str,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Push the adapter's three files to the Hub in one commit. A missing repository or branch is created.

    Other files of the repository are not changed, nor is the user's own text in its `README.md`.

    Raises:
        AdapterNotFoundError: Access to the repository is denied, or `repo_id` is not a valid id.
        AdapterFormatError: The repository holds another model, or its README's metadata can't be read.
        HubError: The Hub can't be reached or refuses, for example because of another push in the meantime.
    """
    _check_repo_id(repo_id)
    with _typed_errors(repo_id, revision, "push"):
        api = HfApi(token=token, library_name="mal_adapter", library_version=library_version())
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.model_info(repo_id, revision=revision)
        names = [sibling.rfilename for sibling in present.siblings or []]

        def read(name: str) -> bytes:
            return Path(api.hf_hub_download(repo_id, name, revision=present.sha)).read_bytes()

        check_ours(repo_id, names, lambda: read(CONFIG_NAME), shapes_of)
        existing_card = read(CARD_NAME).decode(errors="replace") if CARD_NAME in names else ""
        files = encode(memory, metadata, tensors, repo_id=repo_id, existing_card=existing_card)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            # The Hub refuses if another push came after the read above, so that push is not lost.
            parent_commit=present.sha,
        )


@contextlib.contextmanager
def _typed_errors(repo_id: str, revision: str | None, verb: str) -> Iterator[None]:
    """Convert each error of huggingface_hub to one of this library that says what to do."""
    try:
        yield
    except MalAdapterError:
        raise
    except Exception as error:
        # Its HTTP client is requests, httpx or httpx2, by its version. Their errors have no other common base.
        place = repo_id if revision is None else f"{repo_id} at revision {revision!r}"
        raise _typed(error, f"can't {verb} {place}") from error


def _typed(error: Exception, failure: str) -> MalAdapterError:
    # The server's answer may be the cause of another error: "not in the cache either", "force download failed".
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    answers = (e for e in chain if isinstance(e, HfHubHTTPError) and not isinstance(e, LocalEntryNotFoundError))
    reason = next(answers, chain[-1])
    answer = clip(" ".join(f"{type(reason).__name__}: {reason}".split()), 300)
    if isinstance(reason, RevisionNotFoundError):
        return AdapterNotFoundError(f"{failure}: the repository has no such branch, tag or commit")
    if isinstance(reason, EntryNotFoundError) and not isinstance(reason, LocalEntryNotFoundError):
        return AdapterFormatError("a file is missing in the repository; push_to_hub writes all of them")
    if getattr(getattr(reason, "response", None), "status_code", None) in (401, 403, 404):
        return AdapterNotFoundError(
            f"{failure}: there is no such repository on the Hub, or it is private or gated and your token does not "
            "reach it; check the spelling, and log in (`hf auth login`) or pass token=..."
        )
    if isinstance(error, HFValidationError):
        return AdapterNotFoundError(f"{failure}: {error}")
    if isinstance(error, LocalEntryNotFoundError):
        return HubError(
            f"{failure}: the Hub could not be asked ({answer}), and the files are not in the cache; go online, unset "
            "HF_HUB_OFFLINE or local_files_only, or try again later. There is no local folder of this name either"
        )
    return HubError(f"{failure}: {answer}; try again later")
