"""`mal-adapter push`, `pull` and `inspect`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mal_adapter.cli.output import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor

    from mal_adapter.adapter import MemoryAdapter
    from mal_adapter.state import MemoryState

__all__ = ["inspect", "pull", "push"]

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit (default: the main branch).")]
Token = Annotated[
    str | None, typer.Option(help="Of the Hub (default: that of `hf auth login`).", envvar="HF_TOKEN", show_envvar=True)
]


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that save_pretrained wrote.", exists=True, file_okay=False)],
    repo_id: Annotated[str, typer.Argument(help="Where to on the Hub, such as user/mal-qwen2-audio.")],
    private: Annotated[bool, typer.Option("--private", help="Where the repository is new, only you see it.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Push a memory adapter",
    revision: Annotated[str | None, typer.Option(help="The branch (default: main); new ones are made.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it instead of committing it.")] = False,
    token: Token = None,
) -> None:
    """Push a trained adapter to the Hugging Face Hub, with a model card. Text of your own in its README stays."""
    quiet_transformers()
    from mal_adapter import MemoryAdapter

    done = MemoryAdapter.from_pretrained(folder).push_to_hub(
        repo_id,
        private=private or None,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )
    typer.echo(done.pr_url or done.commit_url)


def pull(
    repo_id: Annotated[str, typer.Argument(help="An adapter on the Hub, such as user/mal-qwen2-audio.")],
    folder: Annotated[Path, typer.Argument(help="Is made if need be.", file_okay=False)],
    revision: Revision = None,
    subfolder: Annotated[str | None, typer.Option(help="Of the repository.")] = None,
    token: Token = None,
) -> None:
    """Pull an adapter from the Hugging Face Hub into a folder, as it is, once its files have been checked."""
    from mal_adapter import MemoryAdapter
    from mal_adapter.hub import HubOptions, pull_adapter

    pull_adapter(repo_id, folder, MemoryAdapter.shapes_of, HubOptions(revision, subfolder, token))
    typer.echo(folder)


def inspect(
    target: Annotated[str, typer.Argument(help="An adapter's folder or Hub id, or a state file.")],
    revision: Revision = None,
    subfolder: Annotated[str | None, typer.Option(help="Of the folder or repository.")] = None,
    token: Token = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a list.")] = False,
) -> None:
    """What an adapter or a session's state holds: sizes, host, counters, and the norm of each tensor."""
    quiet_transformers()
    from mal_adapter import MemoryAdapter, MemoryState

    if Path(target).is_file():
        content = _describe_state(MemoryState.load(target))
    else:
        adapter = MemoryAdapter.from_pretrained(target, revision=revision, subfolder=subfolder, token=token)
        content = _describe_adapter(adapter)
    typer.echo(json.dumps(content, indent=2) if as_json else "\n".join(_lines(content)))


def _describe_adapter(adapter: "MemoryAdapter") -> dict[str, Any]:
    from dataclasses import asdict

    tensors = adapter.state_dict()
    return {
        "kind": "adapter",
        "fingerprint": adapter.fingerprint(),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "host": {name: value for name, value in asdict(adapter.card).items() if value is not None},
        "memory": adapter.config.to_dict(),
        "tensors": _describe_tensors(tensors),
    }


def _describe_state(state: "MemoryState") -> dict[str, Any]:
    tensors = {f"weights.{layer}": tensor for layer, tensor in enumerate(state.weights)}
    tensors |= {f"momentum.{layer}": tensor for layer, tensor in enumerate(state.momentum)}
    return {
        "kind": "state",
        "adapter": state.fingerprint,
        "bytes": state.nbytes,
        "utterances": state.utterances.tolist(),
        "audio tokens": state.tokens.tolist(),
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
    """A list with an entry per line, nested ones further in; a tensor's facts in one line."""
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
