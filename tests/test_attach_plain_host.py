"""A host about which nothing can be detected: a plain `nn.Module`, a `HostSpec` and the user's own mask."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mal_adapter import AttachedMemory, HostSpec, attach_memory, register_host
from mal_adapter.errors import AudioMaskError, ConfigError, HostError
from mal_adapter.hosts.registry import REGISTRY
from tests.hosts.builders import VOCAB_SIZE, WIDTH, PlainHost
from tests.hosts.probes import assert_states_close, hook_census, random_adapter, same_bits, small_config, state_bytes

SPEC = HostSpec(layers="blocks", hidden_size=WIDTH)
LAYER = 1


@pytest.fixture(params=[False, True], ids=["tensor", "tuple"])
def model(request: pytest.FixtureRequest) -> PlainHost:
    return PlainHost(num_layers=3, returns_tuple=request.param)


def attach(model: nn.Module, **options: Any) -> AttachedMemory:
    return attach_memory(model, layer_idx=LAYER, **({"adapter": random_adapter(), "host": SPEC} | options))


def utterance(seq_lens: list[int], audio: list[slice], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings (batch, longest, WIDTH), right-padded with zeros, and a mask of the audio slice of each row."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.zeros(len(seq_lens), max(seq_lens), WIDTH)
    mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    for row, (seq_len, where) in enumerate(zip(seq_lens, audio, strict=True)):
        embeds[row, :seq_len] = torch.randn(seq_len, WIDTH, generator=generator)
        mask[row, where] = True
    return embeds, mask


def hidden_after(model: PlainHost, layer_idx: int, embeds: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.blocks[layer_idx].register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(embeds)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit_and_detach_leaves_no_hook(model: PlainHost):
    embeds, mask = utterance([9, 6], [slice(2, 7), slice(0, 3)])
    bare, census, weights = model(embeds), hook_census(model), state_bytes(model)
    memory = attach_memory(model, layer_idx=LAYER, config=small_config(), host=SPEC)
    for _ in range(2):
        with memory.session(["a", "b"], audio_mask=mask):
            assert same_bits(model(embeds), bare)
    assert memory.states["a"].tokens.tolist() == [10]
    assert memory.states["b"].tokens.tolist() == [6]
    memory.detach()
    assert hook_census(model) == census
    assert state_bytes(model) == weights
    assert same_bits(model(embeds), bare)


@torch.no_grad()
def test_the_residual_is_what_the_adapter_reads_at_the_users_mask(model: PlainHost):
    adapter = random_adapter()
    memory = attach(model, adapter=adapter)
    state = adapter.initial_state()
    for seed in range(3):
        embeds, mask = utterance([12], [slice(3 + seed, 10)], seed)
        own = hidden_after_disabled(model, memory, embeds)
        with memory.session("call", audio_mask=mask):
            changed = hidden_after(model, LAYER, embeds)
        assert same_bits(changed[~mask], own[~mask])
        heard = own[mask][None] + adapter.read(state, own[mask][None])
        torch.testing.assert_close(changed[mask][None], heard)
        assert (changed - own)[mask].abs().amax(-1).min() > 1e-3
        state = adapter.write(state, heard)
    assert_states_close(memory.states["call"], state, 1e-6)


def hidden_after_disabled(model: PlainHost, memory: AttachedMemory, embeds: Tensor) -> Tensor:
    with memory.disabled():
        return hidden_after(model, LAYER, embeds)


@torch.no_grad()
def test_a_mask_may_be_scattered_and_differ_from_row_to_row(model: PlainHost):
    embeds, mask = utterance([11, 11], [slice(0, 0), slice(0, 11)])
    mask[0, [1, 4, 5, 10]] = True
    memory = attach(model)
    with memory.session(["a", "b"], audio_mask=mask):
        together = hidden_after(model, LAYER, embeds)
    for row, name in enumerate("ab"):
        with memory.session(f"single {name}", audio_mask=mask[row : row + 1]):
            alone = hidden_after(model, LAYER, embeds[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
        assert_states_close(memory.states[name], memory.states[f"single {name}"], 1e-5)
        assert memory.states[name].tokens.tolist() == [int(mask[row].sum())]


class Repeat(nn.Module):
    """A layer that hands its input on, so that a test decides about every bit of the hidden states."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


@torch.no_grad()
def test_positions_that_are_no_audio_keep_every_bit_whatever_they_hold():
    """Negative zeros, infinities and NaNs, as some hosts leave at padding; and they reach neither read nor write."""
    model = PlainHost(num_layers=3)
    model.blocks[LAYER] = Repeat()
    model.blocks[LAYER - 1] = Repeat()
    embeds, mask = utterance([8, 8], [slice(2, 6), slice(1, 4)])
    clean = embeds.clone()
    odd = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38])
    embeds[~mask] = odd.repeat(WIDTH)[:WIDTH]
    memory = attach(model)
    with memory.session(["a", "b"], audio_mask=mask):
        changed = hidden_after(model, LAYER, embeds)
    with memory.session(["clean a", "clean b"], audio_mask=mask):
        changed_clean = hidden_after(model, LAYER, clean)
    assert same_bits(changed[~mask], embeds[~mask])
    assert same_bits(changed[mask], changed_clean[mask])
    for name in "ab":
        assert_states_close(memory.states[name], memory.states[f"clean {name}"], 0)


@torch.no_grad()
def test_a_mask_without_audio_writes_nothing(model: PlainHost):
    embeds, mask = utterance([7], [slice(0, 0)])
    memory = attach(model)
    bare = hidden_after_disabled(model, memory, embeds)
    with memory.session("call", audio_mask=mask):
        assert same_bits(hidden_after(model, LAYER, embeds), bare)
    assert "call" not in memory.states or memory.states["call"].utterances.tolist() == [0]


@torch.no_grad()
def test_a_second_utterance_of_another_length_is_not_dropped_in_silence(model: PlainHost):
    """A session's mask is for forwards of its shape; one of another shape needs a mask of its own."""
    first, mask = utterance([9], [slice(2, 7)], 0)
    second, _ = utterance([12], [slice(2, 7)], 1)
    memory = attach(model)
    with memory.session("call", audio_mask=mask):
        model(first)
        with pytest.raises(AudioMaskError, match="12"):
            model(second)
    assert memory.states["call"].utterances.tolist() == [1]


@torch.no_grad()
def test_a_mask_has_one_row_per_prompt(model: PlainHost):
    embeds, mask = utterance([8, 8], [slice(2, 6), slice(1, 4)])
    memory = attach(model)
    with pytest.raises(AudioMaskError, match="2"), memory.session(["a", "b"], audio_mask=mask[:1]):
        model(embeds)
    assert list(memory.states) == []


@torch.no_grad()
def test_a_session_without_a_mask_says_that_it_finds_no_audio(model: PlainHost):
    """Nothing tells this host's audio positions: a session that silently neither reads nor writes is no session."""
    embeds, _ = utterance([8], [slice(2, 6)])
    memory = attach(model)
    with pytest.raises((AudioMaskError, HostError), match="audio_mask"), memory.session("call"):
        model(embeds)


def ids_of_four(call: Mapping[str, Any]) -> Tensor | None:
    """A `HostSpec.find_mask`: audio is where the id is 4, unless the call has one position only."""
    ids = call["input_ids"]
    return ids == 4 if ids.shape[1] > 1 else None


class IdHost(nn.Module):
    """A host that takes ids by position and keeps its layers deep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.inner = PlainHost(num_layers=3)

    def forward(self, input_ids: Tensor, /, scale: float = 1.0) -> Tensor:
        return self.inner(self.embed(input_ids) * scale)


@torch.no_grad()
def test_a_host_spec_can_bring_its_own_mask_function():
    torch.manual_seed(0)
    model = IdHost()
    spec = HostSpec(layers="inner.blocks", hidden_size=WIDTH, mask_module="", find_mask=ids_of_four)
    memory = attach(model, host=spec)
    ids = torch.tensor([[1, 4, 4, 4, 2], [4, 4, 3, 4, 5]])
    with memory.session(["a", "b"]):
        model(ids)
        model(ids[:, :1])
    assert [int(memory.states[name].tokens) for name in "ab"] == [3, 3]
    assert [int(memory.states[name].utterances) for name in "ab"] == [1, 1]


def test_what_can_not_be_found_is_named(model: PlainHost):
    with pytest.raises(HostError, match=r"blocks \(3\)") as raised:
        attach_memory(model, layer_idx=0)
    assert "HostSpec" in str(raised.value)
    with pytest.raises(HostError, match="blocs"):
        attach_memory(model, layer_idx=0, host=HostSpec(layers="blocs", hidden_size=WIDTH))
    with pytest.raises(HostError, match="Linear"):
        attach_memory(model, layer_idx=0, host=HostSpec(layers="head", hidden_size=WIDTH))
    with pytest.raises(HostError, match="hidden_size"):
        attach_memory(model, layer_idx=0, host=HostSpec(layers="blocks"))
    with pytest.raises(ConfigError, match="layer_idx"):
        attach_memory(model, host=SPEC)
    with pytest.raises(ConfigError, match="48"):
        attach_memory(model, 0, config=small_config(48), host=SPEC)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_reach_the_adapter_through_a_plain_host(model: PlainHost):
    model.requires_grad_(False)
    memory = attach(model).train()
    first, mask = utterance([9], [slice(2, 7)], 0)
    second, _ = utterance([9], [slice(2, 7)], 1)
    with memory.session(audio_mask=mask):
        model(first)
        model(second).square().mean().backward()
    gradients = {name: p.grad for name, p in memory.adapter.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(p.grad is None for p in model.parameters())


def test_a_registered_family_is_known_by_its_model_type_and_a_users_spec_goes_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REGISTRY, "remote_code", HostSpec())
    model = IdHost()
    model.config = SimpleNamespace(model_type="remote_code")
    register_host("remote_code", HostSpec(layers="inner.blocks", hidden_size=WIDTH, audio_token_id=4))
    memory = attach(model, host=None)
    assert (memory.host.layers, memory.host.audio_token_id) == ("inner.blocks", 4)
    memory.detach()
    memory = attach(model, host=HostSpec(audio_token_id=5))
    assert (memory.host.layers, memory.host.audio_token_id) == ("inner.blocks", 5)


def test_what_padding_holds_spoils_no_gradient():
    """In a ragged batch the shorter row's audio is filled up with whatever stands elsewhere in it."""
    model = PlainHost(num_layers=3)
    model.blocks = nn.ModuleList(Repeat() for _ in model.blocks)  # no layer of the host may be the one that spoils it
    model.requires_grad_(False)
    embeds, mask = utterance([8, 8], [slice(2, 8), slice(1, 3)])
    embeds[1, 3:] = torch.nan
    memory = attach(model).train()
    with memory.session(["a", "b"], audio_mask=mask):
        for _ in range(2):
            logits = model(embeds)
    logits[:, :3].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in memory.parameters())


class Unrecorded(nn.Module):
    """A host that runs its frozen language model without autograd, as some remote code does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PlainHost(num_layers=3)

    @torch.no_grad()
    def hear(self, inputs_embeds: Tensor) -> Tensor:
        return self.inner(inputs_embeds)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.hear(inputs_embeds)


def test_a_host_that_switches_autograd_off_inside_is_served_in_eval_mode():
    model = Unrecorded()
    embeds, mask = utterance([8], [slice(2, 6)])
    bare = model(embeds)
    memory = attach(model, host=HostSpec(layers="inner.blocks", hidden_size=WIDTH))
    with memory.session("call", audio_mask=mask):
        assert not torch.equal(model(embeds), bare)
    assert memory.states["call"].utterances.tolist() == [1]
