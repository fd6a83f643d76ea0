"""Hosts with quantised linears: torch's dynamic int8, bitsandbytes and torchao, loaded as users load them.

Quantisation changes a host's answers far more than rounding, so what is expected is worked out on the quantised host
itself: what the hooked layer gives without memory, and the adapter's read and write of that by hand.
"""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from mal_adapter import MemoryState
from tests.hooks.wrappers.dialogue import LAYER, Heard, Turn, assert_heard_alike, attach, hear, make_turns
from tests.hosts.builders import AUDIO_TOKEN_ID, TinyHost
from tests.hosts.probes import assert_states_close, hook_census, random_adapter, same_bits, trace_layers

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")

Quantise = Callable[[TinyHost, PreTrainedModel, Path], PreTrainedModel]

# What each kind leaves in the place of a linear, or of its weight.
QUANTISED_TYPES = ("DynamicQuantizedLinear", "Linear4bit", "Linear8bitLt", "Int8Tensor")


def dynamic_int8(host: TinyHost, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The decoder layers only: some audio encoders look at `linear.weight.device`, and here `weight` is a method."""
    torch.ao.quantization.quantize_dynamic(host.layers(model), {nn.Linear}, dtype=torch.qint8, inplace=True)
    return model


def reload(model: PreTrainedModel, folder: Path, config: object) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)


def nf4(host: TinyHost, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantised = reload(model, folder, BitsAndBytesConfig(load_in_4bit=True, **options))
    # On a processor with AVX512-BF16 bitsandbytes would pack blocks of 32 by 64 weights, and these layers are narrower.
    for module in quantised.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return quantised


def llm_int8(host: TinyHost, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    return reload(model, folder, BitsAndBytesConfig(load_in_8bit=True))


def torchao_int8_weights(host: TinyHost, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    return reload(model, folder, TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def torchao_int8(host: TinyHost, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    return reload(model, folder, TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig()))


KINDS = pytest.mark.parametrize("quantise", [dynamic_int8, nf4, llm_int8, torchao_int8_weights, torchao_int8])


@pytest.fixture
def turns(host: TinyHost, model: PreTrainedModel) -> list[Turn]:
    return make_turns(host, model)


def saved_bytes(model: nn.Module) -> bytes:
    """The `state_dict` with packed weights and tensor subclasses, as torch saves it."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def is_quantised(layer: nn.Module) -> bool:
    names = {type(module).__module__ + "." + type(module).__name__ for module in layer.modules()}
    names |= {type(parameter).__name__ for parameter in layer.parameters()}
    return any("quantized.dynamic" in name or name.endswith(QUANTISED_TYPES) for name in names)


@torch.no_grad()
def by_hand(host: TinyHost, model: PreTrainedModel, turns: list[Turn]) -> tuple[list[Tensor], MemoryState]:
    """What the hooked layer gives with memory, and the state, from a run without hooks."""
    adapter = random_adapter()
    state, outputs = adapter.initial_state(), []
    for turn in turns:
        mask = turn["input_ids"] == AUDIO_TOKEN_ID
        with trace_layers(host.layers(model)) as calls:
            model(**turn, use_cache=False)
        hidden_states = calls[LAYER].hidden_out
        outputs.append(hidden_states + adapter.read(state, hidden_states, mask))
        state = adapter.write(state, outputs[-1][mask][None])
    return outputs, state


@KINDS
@torch.no_grad()
def test_a_quantised_host_reads_writes_and_is_left_as_it_was(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], tmp_path: Path, quantise: Quantise
):
    quantised = quantise(host, model, tmp_path).eval()
    assert is_quantised(host.layers(quantised)[LAYER])
    bare = [quantised(**turn).logits for turn in turns]
    outputs, state = by_hand(host, quantised, turns)
    weights, census = saved_bytes(quantised), hook_census(quantised)
    with attach(quantised) as memory:
        with trace_layers(host.layers(quantised)) as calls:
            heard = hear(quantised, memory, turns)
        for call, expected in zip([c for c in calls if c.layer_idx == LAYER], outputs, strict=True):
            torch.testing.assert_close(call.hidden_out, expected, rtol=0, atol=1e-5)
        assert_states_close(heard.state, state, 1e-5)
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(heard.logits, bare, strict=True))
        with memory.session("generate"):
            for turn in turns:
                quantised.generate(**turn, max_new_tokens=2, do_sample=False)
        assert_states_close(memory.states["generate"], state, 1e-4)
    assert saved_bytes(quantised) == weights
    assert hook_census(quantised) == census
    assert all(same_bits(quantised(**turn).logits, logits) for turn, logits in zip(turns, bare, strict=True))


@KINDS
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit_of_a_quantised_host(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], tmp_path: Path, quantise: Quantise
):
    quantised = quantise(host, model, tmp_path).eval()
    bare = [quantised(**turn, use_cache=False).logits for turn in turns]
    heard = hear(quantised, attach(quantised, adapter=None), turns)
    assert all(same_bits(a, b) for a, b in zip(heard.logits, bare, strict=True))


def trained(model: nn.Module, turns: list[Turn]) -> tuple[Heard, dict[str, Tensor]]:
    """A dialogue, and the gradients of memory and, where there is one, LoRA."""
    with attach(model) as memory:
        memory.train()
        heard = hear(model, memory, turns)
        heard.logits[-1][:, -1].square().mean().backward()
        named = [*model.named_parameters(), *memory.adapter.named_parameters()]
        return heard, {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("joint", [False, True], ids=["memory", "memory and LoRA"])
def test_trap_13_on_a_4_bit_host_a_plain_loop_has_the_gradients_of_the_same_weights_in_fp32(
    host: TinyHost, model: PreTrainedModel, turns: list[Turn], tmp_path: Path, joint: bool
):
    """As QLoRA trains. bitsandbytes' 4-bit weights are constants that the forward unpacks."""
    peft = pytest.importorskip("peft")

    def run(host_model: PreTrainedModel) -> tuple[Heard, dict[str, Tensor]]:
        if not joint:
            return trained(host_model, turns)
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(host_model, lora)
        result = trained(wrapped, turns)
        wrapped.unload()
        return result

    quantised = peft.prepare_model_for_kbit_training(nf4(host, model, tmp_path), use_gradient_checkpointing=False)
    heard, in_4_bit = run(quantised)
    expected, in_fp32 = run(quantised.dequantize().requires_grad_(False))
    assert_heard_alike(heard, expected)
    assert in_4_bit.keys() == in_fp32.keys()
    assert any("lora_" in name for name in in_fp32) == joint
    for name, gradient in in_fp32.items():
        torch.testing.assert_close(in_4_bit[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
