"""`mal-adapter push`, `pull` and `inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter.cli.options import json_option
from mal_adapter.cli.output import load_libraries, note, print_json, print_line
from mal_adapter.cli.usage import shown

if TYPE_CHECKING:
    from torch import Tensor

    from mal_adapter.memory.ensemble import AnyAdapter
    from mal_adapter.memory.state import MemoryState

__all__ = ["inspect", "pull", "push"]

HUB, KEEP = "Hub", "Keep and share"
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit (default: the main branch).", rich_help_panel=HUB),
]
Token = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="Of your account (default: from `hf auth login`).",
        envvar="HF_TOKEN",
        show_envvar=True,
        rich_help_panel=HUB,
    ),
]


@shown(
    KEEP,
    ("Publish a trained adapter", "mal-adapter push my-memory user/mal-qwen2-audio"),
    (
        "In a private repository, with a message",
        'mal-adapter push my-memory user/mal-qwen2-audio \\\n--private --message "Trained on MELD"',
    ),
)
def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A folder of `mal-adapter train` or save_pretrained.", exists=True, file_okay=False
        ),
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="The repository on the Hub, such as user/mal-qwen2-audio.")
    ],
    private: Annotated[
        bool,
        typer.Option("--private", help="Make a new repository private.", rich_help_panel=HUB),
    ] = False,
    message: Annotated[
        str, typer.Option(metavar="TEXT", help="Of the commit.", rich_help_panel=HUB)
    ] = "Push a memory adapter",
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The branch (default: main); made if new.", rich_help_panel=HUB),
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", help="Open a pull request instead of committing.", rich_help_panel=HUB),
    ] = False,
    token: Token = None,
    as_json: Annotated[bool, json_option("repo_id, commit, url, pr_url")] = False,
) -> None:
    """Push a trained adapter to the Hugging Face Hub, with a model card.

    Prints its URL. The repository is made if it does not exist; your own text in its README stays. Needs a token
    with write access: --token, HF_TOKEN or `hf auth login`.
    """
    load_libraries()
    from mal_adapter.memory.ensemble import load_adapter

    if (folder / "lora").is_dir():
        note(f"{folder / 'lora'} is not pushed, but the memory was trained with it; push it with peft")
    done = load_adapter(folder).push_to_hub(
        repo_id,
        private=private or None,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )
    if as_json:
        print_json({"repo_id": repo_id, "commit": done.oid, "url": done.commit_url, "pr_url": done.pr_url})
    else:
        print_line(done.pr_url or done.commit_url)


@shown(
    KEEP,
    ("Download an adapter into a folder", "mal-adapter pull user/mal-qwen2-audio my-memory"),
    ("Download one version of it", "mal-adapter pull user/mal-qwen2-audio my-memory --revision v1"),
)
def pull(
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="An adapter on the Hub, such as user/mal-qwen2-audio.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made if it does not exist.", file_okay=False)],
    revision: Revision = None,
    subfolder: Annotated[
        str | None, typer.Option(metavar="PATH", help="Of the repository.", rich_help_panel=HUB)
    ] = None,
    token: Token = None,
    as_json: Annotated[bool, json_option("repo_id, folder")] = False,
) -> None:
    """Pull an adapter from the Hugging Face Hub into a folder, after checking its files.

    Prints the folder. You need not pull an adapter to use it: --adapter of the other commands takes its Hub id.
    """
    load_libraries()
    from mal_adapter import MemoryAdapter
    from mal_adapter.serialization.hub import HubOptions, pull_adapter

    pull_adapter(repo_id, folder, MemoryAdapter.shapes_of, HubOptions(revision, subfolder, token))
    if as_json:
        print_json({"repo_id": repo_id, "folder": str(folder)})
    else:
        print_line(folder)


@shown(
    KEEP,
    ("The host and the size of an adapter", "mal-adapter inspect user/mal-qwen2-audio"),
    ("The counters of a session", "mal-adapter inspect sessions/call-42.safetensors --json"),
)
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="ADAPTER_OR_FILE", help="An adapter's folder or Hub id, or a state file.")
    ],
    revision: Revision = None,
    subfolder: Annotated[
        str | None, typer.Option(metavar="PATH", help="Of the folder or repository.", rich_help_panel=HUB)
    ] = None,
    token: Token = None,
    as_json: Annotated[
        bool,
        json_option(
            "kind, tensors and bytes; of an adapter fingerprint, parameters, host and memory; of a state adapter, "
            "utterances, tokens and skipped_writes"
        ),
    ] = False,
) -> None:
    """Show what is in an adapter or a state file: sizes, host, counters, and the norm of each tensor.

    Adapters with the same fingerprint are identical; a state names the fingerprint of its adapter.
    """
    load_libraries()
    from mal_adapter import MemoryState
    from mal_adapter.memory.ensemble import load_adapter

    if Path(target).is_file():
        content = _describe_state(MemoryState.load(target))
    else:
        adapter = load_adapter(target, revision=revision, subfolder=subfolder, token=token)
        content = _describe_adapter(adapter)
    if as_json:
        print_json(content)
    else:
        print_line("\n".join(_lines(content)))


def _describe_adapter(adapter: "AnyAdapter") -> dict[str, Any]:
    from dataclasses import asdict

    tensors = adapter.state_dict()
    return {
        "kind": "adapter",
        "fingerprint": adapter.fingerprint(),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "host": {name: value for name, value in asdict(adapter.metadata).items() if value is not None},
        "memory": adapter.section,
        "tensors": _describe_tensors(tensors),
    }


def _describe_state(state: "MemoryState") -> dict[str, Any]:
    tensors = {name: tensor for name, tensor in state.tensors.items() if tensor.is_floating_point()}
    return {
        "kind": "state",
        "adapter": state.fingerprint,
        "bytes": state.nbytes,
        "utterances": state.utterances.tolist(),
        "tokens": state.tokens.tolist(),
        "skipped_writes": state.skipped_writes.tolist(),
        "tensors": _describe_tensors(tensors),
    }


def _describe_tensors(tensors: "dict[str, Tensor]") -> dict[str, Any]:
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": round(tensor.double().norm().item(), 6),
        }
        for name, tensor in tensors.items()
    }


def _lines(content: dict[str, Any], indent: str = "") -> list[str]:
    """One line per entry, nested ones indented; one line per tensor."""
    lines = []
    for name, value in content.items():
        if isinstance(value, dict) and "norm" not in value:
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        elif isinstance(value, dict):
            shape = "x".join(map(str, value["shape"]))
            lines.append(f"{indent}{name}: {shape} {value['dtype']}, norm {value['norm']:.4g}")
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
