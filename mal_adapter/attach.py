"""`attach_memory`, and the object that owns a host's memory: its adapter, its hooks and its sessions."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mal_adapter.errors import AudioMaskError, ConfigError, CopyError, HostError, SessionError, StateMismatchError
from mal_adapter.hooks.plan import check_audio_mask
from mal_adapter.hooks.session import Session, check_session_ids
from mal_adapter.hosts.detect import warn_if_compiled
from mal_adapter.hosts.host import Host
from mal_adapter.hosts.spec import HostSpec
from mal_adapter.memory import fused
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.config import MemoryConfig
from mal_adapter.memory.ensemble import AnyAdapter, MemoryEnsemble, load_adapter
from mal_adapter.memory.state import MemoryState
from mal_adapter.stores import as_store
from mal_adapter.stores.base import SessionStore
from mal_adapter.stores.states import SessionStates

__all__ = ["AttachedMemory", "attach_memory"]

_Answer = TypeVar("_Answer")


def attach_memory(
    model: nn.Module,
    layer_idx: int | None = None,
    *,
    adapter: AnyAdapter | str | os.PathLike[str] | None = None,
    config: MemoryConfig | None = None,
    host: HostSpec | None = None,
    store: SessionStore | str | os.PathLike[str] | None = None,
) -> "AttachedMemory":
    """Give `model` a memory: register hooks on it and on its decoder layer `layer_idx`.

    Nothing else of the model changes, neither weights nor modules nor `state_dict`. A fresh adapter leaves every output
    bit-identical until it is trained. On an NVIDIA GPU, the memory's kernels are compiled here, for tens of seconds the
    first time; the logger "mal_adapter" says how long.

    Args:
        model: An audio language model, in PEFT, compile or DDP wrappers if need be; or any module, with `host`.
        layer_idx: Index of the decoder layer after which the memory is read, 0 … num_hidden_layers − 1. A loaded
            adapter brings its own.
        adapter: A `MemoryAdapter`, a folder that `save_pretrained` wrote, or a Hub id. A fresh one unless given. With
            several members (a `MemoryEnsemble`), only an `EmotionRecognizer` answers in the memory's sessions.
        config: Sizes of a fresh adapter; `MemoryConfig()` unless given. Its hidden_size is the host's.
        host: Where detection needs help.
        store: Where the sessions' states are kept: a `SessionStore`, a folder, or the URL of a Redis. Unless given, an
            `InMemoryStore`, which keeps the 1024 sessions used last in this process.

    Returns:
        The memory, in eval mode unless `adapter` was given in training mode.

    Raises:
        ConfigError: `layer_idx` is missing, out of range or not the one that the adapter was trained at; or `config`
            does not fit the host; or `store` is not a store.
        HostError: The host's layers can't be found, or this layer has a memory already.
        HostMismatchError: The adapter was trained for another kind of host.
        AdapterNotFoundError, AdapterFormatError, HubError: The adapter can't be loaded, as `from_pretrained` says; call
            that yourself for a revision, subfolder or token.
        StoreError: The folder of `store` can't be created.
        MissingDependencyError: `store` is the URL of a Redis, and redis-py is not installed.

    Example:
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> tiny = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
        >>> model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, vocab_size=100, **tiny))
        >>> ids = torch.arange(12).view(1, 12)
        >>> audio = (ids >= 2) & (ids < 9)                     # an audio host finds these positions itself
        >>> memory = attach_memory(model, layer_idx=0)
        >>> with memory.session("call-42", audio_mask=audio), torch.no_grad():
        ...     logits = model(input_ids=ids).logits
        >>> memory.states["call-42"].tokens.tolist()
        [7]
        >>> memory.detach()
    """
    # The hooks need torch._dynamo, which takes as long to import as torch; a host of transformers has brought it along.
    from mal_adapter.hooks.wiring import drop_copied_hooks, has_memory

    store = as_store(store)
    resolved = Host.resolve(model, host)
    if adapter is not None:
        adapter = adapter if isinstance(adapter, MemoryAdapter | MemoryEnsemble) else load_adapter(adapter)
        if config not in (None, adapter.config, dataclasses.replace(adapter.config, hidden_size=None)):
            raise ConfigError("pass adapter= or config=, not both: a trained adapter brings its configuration")
        resolved.check_adapter(adapter.metadata, adapter.config.hidden_size)
    trained = None if adapter is None else adapter.metadata.layer_idx
    layer_idx = resolved.choose_layer(layer_idx, trained, has_adapter=adapter is not None)
    layer = resolved.layers[layer_idx]
    drop_copied_hooks(resolved.model)
    if has_memory(layer):
        place = f"{resolved.layers_path}.{layer_idx}"
        raise HostError(f"{place} has a memory already; detach() that first, or choose another layer")
    warn_if_compiled(model, layer)
    if adapter is None:
        adapter = MemoryAdapter(_config_for(resolved, config)).eval()
    adapter.metadata = resolved.describe(adapter.metadata, layer_idx)
    if (parameter := next(layer.parameters(), None)) is not None and parameter.device.type != "meta":
        adapter.to(parameter.device)
    fused.warm_up(adapter.config, adapter.initial[0].device, adapter.state_dtype, adapter.training)
    return AttachedMemory(resolved, adapter, layer_idx, store)


def _config_for(host: Host, config: MemoryConfig | None) -> MemoryConfig:
    """The configuration of a fresh adapter, as wide as the host."""
    config = MemoryConfig() if config is None else config
    if not isinstance(config, MemoryConfig):
        raise ConfigError(f"config is a {type(config).__name__}, expected a MemoryConfig")
    if config.hidden_size not in (None, host.hidden_size):
        raise ConfigError(f"config.hidden_size={config.hidden_size}, but the host is {host.hidden_size} wide")
    return dataclasses.replace(config, hidden_size=host.hidden_size)


class AttachedMemory:
    """A memory that is attached to one decoder layer of a host. `attach_memory` makes it; as a context manager it
    detaches at the end.

    Attributes:
        adapter: The learned part, outside the host's module tree.
        layer_idx: The hooked decoder layer.
        host: The host's description, as given or detected.
        states: All sessions' states by id, a mapping.
    """

    def __init__(self, host: Host, adapter: AnyAdapter, layer_idx: int, store: SessionStore) -> None:
        from mal_adapter.hooks.wiring import MemoryHooks

        self.adapter = adapter
        self.layer_idx = layer_idx
        self.host = host.spec
        self.states = SessionStates(store, adapter.check_state)
        self._root: nn.Module | None = host.model
        self._hooks = MemoryHooks(host.spec)
        self._hooks.register(host, layer_idx)
        self._one_at_a_time = threading.RLock()  # of the forwards of several members

    @contextmanager
    def session(
        self,
        session_id: str | Sequence[str] | None = None,
        *,
        write: bool = True,
        audio_mask: Bool[Tensor, "prompts seq_len"] | None = None,
    ) -> Iterator[Session]:
        """Within this block, the host's forwards read and write the memory of these dialogues.

        Each forward that carries audio reads what earlier ones wrote and then writes its own; a forward that raises
        writes nothing. Threads and asyncio tasks each have their own block. While the adapter is in training mode,
        gradients flow through all utterances of one block, and `states` gets detached copies.

        Args:
            session_id: One id; a sequence of ids, one per prompt of the batch; or None for an anonymous dialogue that
                ends with the block. A new id starts a dialogue.
            write: False only reads.
            audio_mask: (batch, seq_len) bool, True at audio tokens, for forwards of that shape; wins over detection.

        Raises:
            SessionError: An id is not a non-empty string, is repeated or is open elsewhere; a session of this memory is
                open here already; or the memory is detached.
            AudioMaskError: `audio_mask` is not (batch, seq_len) bool, or is missing where nothing else says where
                audio is.
            SessionConflictError: Another process has continued a dialogue of this block; raised by the forward whose
                utterance would overwrite it. Open the session again and repeat that utterance.
            StateMismatchError: A dialogue's state was written by another adapter.
            StateFormatError: A dialogue's state in the store is damaged.
            StoreError: The store can't be reached when the block begins, or still not when it ends: forwards answer
                meanwhile, and the states stay in this process, see `states.flush()`.
        """
        self._check_usable(has_mask=audio_mask is not None)
        named = [] if session_id is None else check_session_ids(session_id)
        ids = named or (None,)
        if audio_mask is not None:
            check_audio_mask(audio_mask, len(ids))
        with self.states.opened(named) as found:
            states = self._stack([None if i is None else found.get(i) for i in ids])
            session = Session(tuple(ids), states, self.states, write, audio_mask, self.adapter)
            del states  # or those from before the block would be kept until its end
            with self._hooks.active(session):
                yield session

    @contextmanager
    def session_from(
        self,
        states: Sequence[MemoryState | None],
        *,
        write: bool = True,
        audio_mask: Bool[Tensor, "prompts seq_len"] | None = None,
    ) -> Iterator[Session]:
        """Within this block, row i of a batch continues from `states[i]`, and nothing is saved: for callers who load
        and save states themselves, so that one dialogue's failure to save is not an error of the whole batch.

        Args:
            states: One per prompt of the batch, each of batch size 1; None starts a dialogue.
            write: False only reads.
            audio_mask: As for `session`.

        Yields:
            The session, anonymous. `session.state.split()` has the new states in the block and after it.

        Raises:
            SessionError: There are no states; a session of this memory is open here already; or it is detached.
            StateMismatchError: A state belongs to another adapter, or is of several dialogues.
            AudioMaskError: As for `session`.
        """
        self._check_usable(has_mask=audio_mask is not None)
        if not states:
            raise SessionError("there are no states; give one per prompt of the batch, None for a new dialogue")
        if audio_mask is not None:
            check_audio_mask(audio_mask, len(states))
        ids = (None,) * len(states)
        session = Session(ids, self._stack(states), self.states, write, audio_mask, self.adapter)
        with self._hooks.active(session):
            yield session

    @contextmanager
    def using(self, adapter: AnyAdapter) -> Iterator[None]:
        """Within this block another adapter is read and written, in every thread: to compare adapters on one host.

        What is mutated: `adapter` moves to this one's device. Open the block's sessions with `session_from`; the stored
        sessions belong to the memory's own adapter.

        Args:
            adapter: For the same host and layer.

        Raises:
            SessionError: A session of this memory is open here, or it is detached.
            ConfigError: The adapter was trained at another layer, or is for another width.
        """
        self._check_usable(has_mask=True)
        layer, width = adapter.metadata.layer_idx, adapter.config.hidden_size
        if layer not in (None, self.layer_idx) or width != self.adapter.config.hidden_size:
            raise ConfigError(
                f"this adapter is for layer {layer}, {width} wide; the memory is at layer {self.layer_idx}, "
                f"{self.adapter.config.hidden_size} wide"
            )
        adapter.to(self.adapter.initial[0].device)
        fused.warm_up(adapter.config, adapter.initial[0].device, adapter.state_dtype, adapter.training)
        own = self.adapter
        try:
            self.adapter = adapter
            yield
        finally:
            self.adapter = own

    @property
    def has_members(self) -> bool:
        """Whether a session of an adapter with several members is open here, so that an answer takes `by_member`."""
        session = self._hooks.session
        return session is not None and len(session.adapter.members) > 1

    def by_member(self, run: Callable[[Session], _Answer]) -> list[_Answer]:
        """Call `run` once per member of the open session's adapter, each time in a session of that member alone; then
        commit what all of them wrote as one state, so that no member is ahead of another. One thread at a time.

        Args:
            run: Runs a forward of the host; it is given the member's session.

        Returns:
            What `run` returned, in the order of the members.

        Raises:
            SessionError: No session of several members is open here.
            SessionConflictError, StoreError: As the end of a forward does; and all that `run` raises. Then nothing of
                this utterance is committed.
        """
        session = self._hooks.session
        if session is None or not isinstance(session.adapter, MemoryEnsemble):
            raise SessionError("no session of several members is open here; by_member runs within one")
        session.used = True
        adapter, answers, reached = session.adapter, [], []
        with self._one_at_a_time:
            before = session.state
            parts = adapter.split(before)
            for member, part in zip(adapter.members, parts, strict=True):
                own = Session((None,) * len(session.ids), part, self.states, session.write, session.audio_mask, member)
                with self._hooks.active(own):
                    answers.append(run(own))
                reached.append(own.state)
            if any(after is not part for after, part in zip(reached, parts, strict=True)):
                session.advance(adapter.join(before, reached))
        return answers

    def write_answers(self, probabilities: Float[Tensor, "batch labels"]) -> None:
        """Write what the host has answered, behind the utterances that the open session has written last.

        `EmotionRecognizer` does it. Call it yourself if you call the model yourself, and the adapter's `num_labels` is
        set. Nothing happens without an open session, in one that only reads, or if the adapter keeps no answers.

        What is mutated: the session's dialogues.

        Args:
            probabilities: (batch, labels), of each label among all, one row per dialogue of the session, in the order
                of the labels that the adapter was trained with.

        Raises:
            ConfigError: The shape is another one.
            SessionConflictError, StoreError: As the end of a forward does.
        """
        session = self._hooks.session
        if session is not None and self.keeps_answers:
            session.write_answers(probabilities)

    @property
    def keeps_answers(self) -> bool:
        """Whether the adapter's `num_labels` is set, so that the host's answers are written too."""
        return self.adapter.config.num_labels is not None

    def _check_usable(self, *, has_mask: bool) -> None:
        if self._root is None:
            raise SessionError("this memory is detached; attach_memory(model, adapter=memory.adapter) puts it back")
        if self._hooks.session is not None:
            raise SessionError("a session of this memory is open already; close it first, or pass all its ids at once")
        sources = (self.host.audio_token_id, self.host.find_mask, self.host.audio_positions)
        if not has_mask and all(value is None for value in sources):
            raise AudioMaskError(
                "nothing says where this host's audio positions are; pass session(..., audio_mask=...), or "
                "attach_memory with host=HostSpec(audio_token_id=...) or HostSpec(find_mask=...)"
            )

    def _stack(self, states: Sequence[MemoryState | None]) -> MemoryState:
        # A session that is opened under no_grad or inference_mode may be trained in all the same.
        with torch.inference_mode(False), torch.set_grad_enabled(self.adapter.training):
            fresh = self.adapter.initial_state()
            rows = [fresh if state is None else state for state in states]
            for row in rows:
                self.adapter.check_state(row)  # the adapter may have been trained since it wrote the state
                if row.batch_size != 1:
                    raise StateMismatchError(f"a state of {row.batch_size} dialogues is no row of a batch; split() it")
            return MemoryState.stack([row.to(fresh.device) for row in rows])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this block the host answers without memory, and nothing is written, even inside a session."""
        with self._hooks.active(None):
            yield

    @contextmanager
    def rereading(self) -> Iterator[None]:
        """Within this block, forwards feed an utterance of the open session again, with more tokens behind its prompt.

        They read what the utterance read, and write nothing: for scoring answers where the host has no KV cache.
        Without an open session it changes nothing.
        """
        session = self._hooks.session
        with contextlib.nullcontext() if session is None else session.rereading():
            yield

    def detach(self) -> None:
        """Remove all hooks: the host is as it was. Adapter and states stay usable; calling it twice is harmless."""
        if self._root is not None:
            self._hooks.remove()
        self._root = None

    @property
    def attached(self) -> bool:
        """False once `detach` was called."""
        return self._root is not None

    def status(self) -> dict[str, Any]:
        """Where the memory is attached, what computes it, and what it holds."""
        device, dtype, training = self.adapter.initial[0].device, self.adapter.state_dtype, self.adapter.training
        return {
            "attached": self.attached,
            "layer": f"{self.host.layers}.{self.layer_idx}",
            "audio_token_id": self.host.audio_token_id,
            "training": training,
            "kernels": fused.path(self.adapter.config, device, dtype, training),
            "parameters": sum(p.numel() for p in self.adapter.parameters()),
            "states": repr(self.states),
        }

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The host's decoder layers, of which number `layer_idx` is hooked."""
        return self._hooks.layers

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters, for an optimizer."""
        return self.adapter.parameters()

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, beside all of host and adapter."""
        own = list(self.adapter.parameters())
        host = list(self._root.parameters()) if self._root is not None else []
        trainable = sum(p.numel() for p in (*own, *host) if p.requires_grad)
        total = sum(p.numel() for p in (*own, *host))
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def train(self, mode: bool = True) -> "AttachedMemory":
        """Put the adapter into training mode: dropout on, gradients flow between the utterances of a session."""
        self.adapter.train(mode)
        return self

    def eval(self) -> "AttachedMemory":
        """Put the adapter into eval mode."""
        return self.train(False)

    def __enter__(self) -> "AttachedMemory":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __getstate__(self) -> NoReturn:
        raise CopyError(
            "an AttachedMemory is the hooks of one model in one process, and can't be pickled or deep-copied. Copy or "
            "load the model there, and call attach_memory(model, adapter=…, store=…) with memory.adapter, or with the "
            "folder that its save_pretrained wrote"
        )

    def __repr__(self) -> str:
        return f"AttachedMemory({', '.join(f'{name}={value}' for name, value in self.status().items())})"
