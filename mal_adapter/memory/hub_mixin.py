"""`Pretrained`: saving, pushing and loading of a `MemoryAdapter` or of several."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn

from mal_adapter.errors import ConfigError
from mal_adapter.memory.config import MemoryConfig, check_integer
from mal_adapter.serialization.adapter_folder import AdapterConfig, check_folder, write_folder
from mal_adapter.serialization.hub import HubOptions, push_adapter, read_adapter
from mal_adapter.serialization.metadata import AdapterMetadata

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's is new in Python 3.11

__all__ = ["MEMBERS", "MOST_MEMBERS", "Pretrained", "member_count"]

MEMBERS = "members"
MOST_MEMBERS = 64


class Pretrained(nn.Module):
    """A module that is built from a `MemoryConfig` and is saved in an adapter folder or a Hub repository."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.metadata = AdapterMetadata()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and a model card into `folder`, which is created if missing.

        The user's own text and metadata in an existing `README.md` are kept.

        Raises:
            AdapterFormatError: `folder` is a file or holds another model's files, or a field of `metadata` has the
                wrong type.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from mal_adapter import MemoryAdapter
            >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2)).eval()
            >>> with TemporaryDirectory() as folder:
            ...     adapter.save_pretrained(folder)
            ...     loaded = MemoryAdapter.from_pretrained(folder)
            >>> loaded.fingerprint() == adapter.fingerprint()
            True
        """
        write_folder(folder, self.section, self.metadata, self._saved_tensors(), self.shapes_of)

    def check_folder(self, folder: str | os.PathLike[str], metadata: AdapterMetadata) -> None:
        """Raise the error that `save_pretrained` into `folder` would raise with `metadata`, and write nothing.

        Raises:
            AdapterFormatError: As for `save_pretrained`, or `folder` is not writable.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from mal_adapter import MemoryAdapter
            >>> adapter = MemoryAdapter(MemoryConfig(hidden_size=32, memory_dim=16, num_heads=2))
            >>> with TemporaryDirectory() as folder:
            ...     adapter.check_folder(folder, adapter.metadata)
        """
        check_folder(folder, self.section, metadata, self.shapes_of)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Push a mal_adapter memory",
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Push `config.json`, `model.safetensors` and a model card to a Hub repository, as one commit.

        A missing repository or branch is created. Other files are not changed, and the user's own text and metadata in
        an existing `README.md` are kept.

        Args:
            repo_id: For example `"user/mal-qwen2-audio"`; the owner is the token's user if only a name is given.
            private: Whether a new repository is private; the Hub's default if None.
            commit_message: The commit's first line.
            revision: The branch; `main` if None.
            create_pr: Open a pull request instead of committing to the branch.
            token: A Hub token with write permission; the one of `hf auth login` if None.

        Returns:
            The commit: a string, its URL, with the attributes `oid` and, for a pull request, `pr_url`.

        Raises:
            AdapterNotFoundError: Access to the repository is denied, or `repo_id` is not a valid id.
            AdapterFormatError: The repository holds another model.
            HubError: The Hub can't be reached, or refuses.
        """
        return push_adapter(
            repo_id,
            self.section,
            self.metadata,
            self._saved_tensors(),
            self.shapes_of,
            private=private,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            token=token,
        )

    @property
    def section(self) -> dict[str, Any]:
        """The "memory" section of its `config.json`."""
        return self.config.to_dict()

    def _saved_tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "Self":
        """Load a trained adapter from a folder or from the Hub, on the CPU and in eval mode.

        Args:
            folder_or_repo: A folder that `save_pretrained` wrote, or a Hub id such as `"user/mal-qwen2-audio"`.
            revision: Branch, tag or commit hash; `main` if None. For a folder, all options but `subfolder` are ignored.
            subfolder: The path of the files within the folder or repository; its top if None.
            token: A Hub token; the one of `hf auth login` if None, no token if False.
            cache_dir: The folder for downloads; the Hub's own cache if None.
            local_files_only: Read the files from the cache, without a request to the Hub.
            force_download: Download the files even if they are in the cache.

        Raises:
            AdapterNotFoundError: There is no such folder, repository or revision, or access is denied.
            AdapterFormatError: Files are missing or damaged, have a newer format, or do not fit the configuration; or
                the adapter is of the other class, with several members or with one.
            HubError: The Hub can't be reached, and the files are not in the cache.
        """
        options = HubOptions(revision, subfolder, token, cache_dir, local_files_only, force_download)
        return cls.from_files(*read_adapter(folder_or_repo, cls._shapes_of_own, options))

    @classmethod
    def from_files(cls, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> "Self":
        """The adapter of files that `read_adapter` has read, in eval mode; it takes the tensors over."""
        with torch.device("meta"):
            adapter = cls._from_section(config.memory)
        adapter.load_state_dict(tensors, assign=True)
        adapter.metadata = config.metadata
        for parameter in adapter.parameters():
            parameter.requires_grad_(True)
        return adapter.eval()

    @classmethod
    def _from_section(cls, memory: Mapping[str, Any]) -> "Self":
        return cls(MemoryConfig.from_dict(memory))

    @classmethod
    def _shapes_of_own(cls, memory: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """As `shapes_of`; raises `ConfigError` for what another class loads."""
        if (count := member_count(memory)) > 1:
            raise ConfigError(
                f"this adapter has {count} members. EmotionRecognizer.from_pretrained averages their answers; to load "
                "it, call MemoryEnsemble.from_pretrained, whose members[0] is one MemoryAdapter"
            )
        return cls.shapes_of(memory)

    @classmethod
    def shapes_of(cls, memory: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors that the "memory" section of a `config.json` requires, whether it is of
        one adapter or of several members.

        Raises:
            ConfigError: A field of the section is unknown, missing or out of range.

        Example:
            >>> from mal_adapter import MemoryAdapter
            >>> MemoryAdapter.shapes_of({"hidden_size": 32, "depth": 1, "num_heads": 2})["initial.0"]
            (2, 128, 128)
        """
        count = member_count(memory)
        config = MemoryConfig.from_dict({name: value for name, value in memory.items() if name != MEMBERS})
        # The meta device allocates nothing, so a configuration of terabytes costs nothing.
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
        if count == 1:
            return shapes
        return {f"{MEMBERS}.{index}.{name}": shape for index in range(count) for name, shape in shapes.items()}


def member_count(memory: Mapping[str, Any]) -> int:
    """How many members the "memory" section of a `config.json` is for; 1 if it does not say.

    Raises:
        ConfigError: The number is not an integer from 2 to 64.

    Example:
        >>> member_count({"hidden_size": 32}), member_count({"hidden_size": 32, "members": 3})
        (1, 3)
    """
    if MEMBERS not in memory:
        return 1
    count = memory[MEMBERS]
    check_integer(MEMBERS, count, 2)
    if count > MOST_MEMBERS:
        raise ConfigError(f"{MEMBERS}={count} is more than {MOST_MEMBERS}")
    return int(count)
