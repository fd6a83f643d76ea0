"""Tiny hosts that add audio to every position, also in decode steps: there is no placeholder.

host = ADDITIVE_HOSTS["voxtral_realtime"]
model = host.build()
speech = host.speech(model, [7, 7])                         # what a processor passes to generate()
turn = model.generate(**speech, do_sample=False)            # (2, 7)
model(**host.transcribed(model, speech, turn)).logits       # (2, 6, VOCAB_SIZE): the same positions in one forward
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.hosts.tiny import FIRST_TEXT_ID, LAST_TEXT_ID, MEL_BINS, PAD_ID, Prompt, TinyHost

__all__ = ["BOS_ID", "CODEBOOK_SIZE", "AdditiveHost"]

BOS_ID = LAST_TEXT_ID + 1
CODEBOOK_SIZE = 16


@dataclasses.dataclass(frozen=True)
class AdditiveHost(TinyHost):
    """How to build such a family and make its inputs.

    Attributes:
        prefill: positions of the prompt that generate() starts from; one more with each step.
        codebooks: number of audio codes beside each text id, made by a codec from the waveform; 0: audio is features.
        codec: dotted path of the codec.
        pads_left: False where the host itself gives other results for padding on the left.
    """

    prefill: int = 1
    codebooks: int = 0
    codec: str = ""
    pads_left: bool = True

    def build(self, dtype: torch.dtype = torch.float32, num_layers: int = 2, seed: int = 0) -> PreTrainedModel:
        """A model in eval mode, its codec in float32 as from_pretrained() leaves it, with codebooks to choose from."""
        model = super().build(dtype, num_layers, seed)
        if self.codec:
            codec = model.get_submodule(self.codec).float()
            generator = torch.Generator().manual_seed(seed)
            for name, buffer in codec.named_buffers():
                if name.endswith("codebook.embed_sum"):
                    buffer.normal_(generator=generator)
        return model

    def prompt(self, clips: Sequence[int], *, text: Sequence[int] = (), seed: int = 0) -> Prompt:
        """An utterance of so many positions, all of them audio, and the text at each.

        Returns:
            ids (seq_len,), or (seq_len, 1 + codebooks) with the text first; features, unless the ids have everything.
        """
        generator = torch.Generator().manual_seed(seed)
        length = sum(clips) + sum(text)
        ids = torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID + 1, (length,), generator=generator)
        if self.codebooks:
            codes = torch.randint(0, CODEBOOK_SIZE, (length, self.codebooks), generator=generator)
            return Prompt(torch.cat((ids[:, None], codes), dim=1), ())
        return Prompt(ids, (torch.randn(MEL_BINS, length * self.frames_per_token, generator=generator),))

    def collate(
        self, model: nn.Module, prompts: Sequence[Prompt], padding_side: str = "right"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Pads utterances to one batch for `forward`; the true audio mask is every position that is not padding."""
        lengths = [len(prompt.ids) for prompt in prompts]
        attention_mask = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        ids = torch.full((*attention_mask.shape, *prompts[0].ids.shape[1:]), PAD_ID)
        if self.codebooks:
            ids[..., 1:] = model.config.audio_pad_token_id
        for row, prompt in enumerate(prompts):
            start = max(lengths) - lengths[row] if padding_side == "left" else 0
            ids[row, start : start + lengths[row]] = prompt.ids
            attention_mask[row, start : start + lengths[row]] = 1
        inputs = {"input_ids": ids, "attention_mask": attention_mask}
        if not self.codebooks:
            frames = max(lengths) * self.frames_per_token
            features = torch.zeros(len(prompts), MEL_BINS, frames)
            for row, prompt in enumerate(prompts):
                (clip,) = prompt.feature_rows
                start = frames - clip.shape[1] if padding_side == "left" else 0
                features[row, :, start : start + clip.shape[1]] = clip
            inputs |= self.features(list(features), next(model.parameters()).dtype)
        return inputs, attention_mask.bool()

    def speech(self, model: nn.Module, lengths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
        """What a processor makes from clips of so many audio tokens each: the keyword arguments of generate().

        A shorter clip is padded with silence, and no argument says so.
        """
        generator = torch.Generator().manual_seed(seed)
        samples = MEL_BINS * self.frames_per_token
        clips = [torch.randn(length * samples, generator=generator) for length in lengths]
        padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        if self.codebooks:
            return {"input_values": padded[:, None]}
        prompt = torch.full((len(lengths), self.prefill), FIRST_TEXT_ID)
        prompt[:, 0] = BOS_ID
        features = padded.unflatten(1, (-1, MEL_BINS)).transpose(1, 2)
        dtype = next(model.parameters()).dtype
        return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **self.features(list(features), dtype)}

    def transcribed(self, model: nn.Module, speech: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
        """The arguments of one `forward` over all positions of a generate(): every id but the last, and the audio.

        Args:
            speech: what generate() got.
            sequences: (batch, prefill + steps) what it returned.
        """
        ids = sequences[:, :-1]
        if not self.codebooks:
            features = speech["input_features"][..., : ids.shape[1] * self.frames_per_token]
            return speech | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": features}
        codes = model.get_submodule(self.codec).encode(speech["input_values"]).audio_codes.transpose(1, 2)
        # The first position is before all audio.
        codes = torch.nn.functional.pad(codes, (0, 0, 1, 0), value=model.config.audio_bos_token_id)
        return {"input_ids": torch.cat((ids[..., None], codes[:, : ids.shape[1]]), dim=2)}
