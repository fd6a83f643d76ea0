"""`mal-adapter serve --engine vllm`: check, and become `vllm serve` with every flag that a memory needs."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

import typer

from mal_adapter.cli.output import load_libraries, note

__all__ = ["become_vllm", "check_options"]

_FOR_VLLM = {"engine", "vllm_flags", "model", "adapter", "dtype", "store", "ttl_s", "host", "port"}
_OURS = ("--additional-config", "--worker-cls", "--worker_cls", "--additional_config")
_PLUGINS = "VLLM_PLUGINS"
# vLLM's default is to kill the engine at once, with states that the store could not take during an outage.
_SAVE_AT_END = ("--shutdown-timeout", "30")


def check_options(context: typer.Context, vllm_flags: Sequence[str], *, vllm: bool) -> None:
    """Raise `typer.BadParameter` if an option is of the other engine."""
    if not vllm:
        if vllm_flags:
            raise typer.BadParameter(f"{shlex.join(vllm_flags)}: only with --engine vllm", param_hint="VLLM_FLAG")
        return
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _FOR_VLLM and source is not None and source.name == "COMMANDLINE":
            option = "json" if name == "as_json" else name.replace("_", "-")
            raise typer.BadParameter(
                "is of the embedded server; leave it out, and give vLLM's own flags after --", param_hint=f"--{option}"
            )
    for flag in vllm_flags:
        if flag.startswith(_OURS):
            raise typer.BadParameter("is set by this command; use --adapter, --store and --ttl-s", param_hint=flag)


def become_vllm(
    model: str | None,
    adapter: str,
    store: str | None,
    ttl_s: float | None,
    dtype: str,
    host: str,
    port: int,
    vllm_flags: Sequence[str],
) -> NoReturn:
    """Replace this process by `vllm serve`.

    Args:
        model: A folder or Hub id; the adapter's host unless given.
        adapter: A folder or Hub id.
        store: A folder or Redis URL; None keeps sessions in the engine's process.
        ttl_s: A session expires after this time.
        dtype: Of the model's weights.
        host: The address to listen at.
        port: The port; 0 is not possible.
        vllm_flags: Appended as they are. With a store, `--shutdown-timeout` is 30 unless it is among them.

    Raises:
        ConfigError: vLLM has an unknown version; or the adapter was not trained, or with a LoRA, or
            has several members.
        HostMismatchError: The adapter was trained for another kind of model.
        MissingDependencyError: vLLM is not installed.
    """
    from mal_adapter.vllm.checks import check_version
    from mal_adapter.vllm.config import STORE_VARIABLE, engine_args, serve_flags

    check_version()
    if port == 0:
        raise typer.BadParameter("vLLM needs a number", param_hint="--port")
    engine_args(adapter, store=store, ttl_s=ttl_s)  # checks them
    arguments = engine_args(adapter, ttl_s=ttl_s)
    load_libraries()
    model = _check(model, adapter)
    address = ["--dtype", dtype, "--host", host, "--port", str(port)]
    ending = () if store is None or any(f.startswith(_SAVE_AT_END[0]) for f in vllm_flags) else _SAVE_AT_END
    command = ["serve", model, *serve_flags(arguments), *address, *ending, *vllm_flags]
    if not any(point.name == "mal_adapter" for point in entry_points(group="vllm.endpoint_plugins")):
        note("mal-adapter is not installed, only imported from a folder; so the session routes are missing")
    environment = {**os.environ, _PLUGINS: _plugins(os.environ)}
    environment |= {} if store is None else {STORE_VARIABLE: store}  # not an argument, since it may have a password
    note(f"starting {_PLUGINS}={environment[_PLUGINS]} vllm {shlex.join(command)}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *command], environment)


def _plugins(environment: Mapping[str, str]) -> str:
    """vLLM loads an endpoint plugin only if it is named."""
    names = [name for name in environment.get(_PLUGINS, "").split(",") if name and name != "mal_adapter"]
    return ",".join([*names, "mal_adapter"])


def _check(model: str | None, adapter: str) -> str:
    """The model's name, after what can be checked without loading it."""
    from transformers import AutoConfig

    from mal_adapter.errors import ConfigError, HostError
    from mal_adapter.memory.ensemble import load_adapter
    from mal_adapter.ser.recognizer.pretrained import find_host
    from mal_adapter.vllm.checks import servable
    from mal_adapter.vllm.layers import check_host

    trained = servable(load_adapter(adapter))
    if trained.metadata.layer_idx is None:
        raise ConfigError(f"{adapter} names no layer_idx: it was not trained; give a trained adapter")
    if (Path(adapter) / "lora").is_dir():
        raise ConfigError(
            f"{Path(adapter) / 'lora'} was trained beside the adapter, and vLLM would not use it; merge it into the "
            "model with peft's merge_and_unload, serve the merged model, and copy the adapter without this folder"
        )
    name = model or find_host(trained.metadata, adapter)
    if not name:
        raise HostError(f"{adapter} does not name its model; add --model")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise HostError(f"the model {name} can't be loaded: {str(error).splitlines()[0]}") from error
    language = getattr(config, "thinker_config", config).get_text_config()  # an omni model has several
    check_host(trained.metadata, trained.config.hidden_size, config, language)
    return name
