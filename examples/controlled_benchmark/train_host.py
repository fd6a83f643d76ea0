"""Train the tiny host on single utterances, from nothing: the emotion and one other question about each.

    python examples/controlled_benchmark/train_host.py my-host          # 40 000 utterances, 2 500 steps
    python examples/controlled_benchmark/train_memory.py my-memory --host my-host

Nothing is downloaded. Floating-point sums differ between machines, so the weights are reproduced to their figures, not
to the last bit.

The prompt starts with the audio, so its hidden states are the same for all questions: one row holds the audio once and
the questions one after the other, each seeing only the audio and itself. That is the same function as separate prompts.

Real audio language models start from an encoder trained on much speech. This one starts from nothing, so its audio
tokens get help that is thrown away afterwards: a linear head on the hooked layer's hidden states that names pitch,
level and vocal tract at every audio token.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from features import FRAMES, Features, load_features
from jaxtyping import Float, Int
from questions import QUESTIONS, answer
from tiny_host import audio_tokens, build_model, build_processor, prompt_text, save_host
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from mal_adapter.demo import EMOTIONS, LAYER_IDX
from mal_adapter.demo.voices import Speech

DIALOGUES = 4000  # 40 000 utterances
STEPS = 2500

__all__ = ["PackedPrompts", "PackedRow", "layout", "packed_losses", "prompt_pieces", "tokenise", "train_host"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the model and its processor")
    parser.add_argument("--features", type=Path, default=Path("features"), help="folder for the features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialogues", type=int, default=DIALOGUES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=1, help="processes that make the features; also torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.workers)
    features = load_features("host", options.seed, options.dialogues, options.features, workers=options.workers)
    model, processor = train_host(features, seed=options.seed, steps=options.steps)
    save_host(model, processor, options.output)
    print(f"saved in {options.output}")


@dataclass(frozen=True)
class PackedRow:
    """The token layout of one packed row; lengths are equal for all utterances.

    Attributes:
        mask: additive attention mask.
        position_ids: each question starts where the audio ends.
        predicts: positions whose next token is part of an answer.
        weights: weight of each of those in the loss; each task's sum to 1.
    """

    mask: Float[Tensor, "1 1 seq_len seq_len"]
    position_ids: Int[Tensor, "1 seq_len"]
    predicts: Int[Tensor, " answers"]
    weights: Float[Tensor, " answers"]


@dataclass(frozen=True)
class PackedPrompts:
    """Token ids of all utterances in pieces that are put together to rows.

    Attributes:
        start: the prompt up to the first question, audio placeholders included.
        audio: positions of the audio placeholders in `start`.
        tasks: task -> question, answer and end token of each utterance.
        answered: task -> how many of the last tokens are the answer and its end.
    """

    start: Int[Tensor, " start_len"]
    audio: slice
    tasks: dict[str, Int[Tensor, "utterances _task_len"]]
    answered: dict[str, int]


def train_host(
    features: Features, *, seed: int = 0, steps: int = STEPS, batch_size: int = 48, learning_rate: float = 3e-3
) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    """Build a host and train it on the utterances of `features`, in random order and without their dialogues.

    Args:
        features: the "host" split; about 40 000 utterances.
        steps, batch_size, learning_rate: AdamW with a short warm-up and a cosine decay to zero.

    Returns:
        The frozen model in eval mode and its processor.
    """
    processor = build_processor()
    model = build_model(processor.tokenizer, seed).train()
    prompts = tokenise(processor, features)
    mels = torch.from_numpy(np.array(features.mels.reshape(-1, *features.mels.shape[2:])))
    truth = torch.from_numpy(np.array(features.truth.reshape(-1, 3)))
    truth = (truth - truth.mean(0)) / truth.std(0)
    head = nn.Linear(model.config.text_config.hidden_size, 3)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = min(150, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / max(1, warm_up), 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
    )
    others = [task for task in QUESTIONS if task != "emotion"]
    layouts = {other: layout(prompts, ["emotion", other]) for other in others}
    order = np.random.default_rng(seed)
    shown: dict[str, float] = {}
    with tqdm(range(steps), desc="training the host", unit="step", mininterval=2) as bar:
        for step in bar:
            rows = torch.from_numpy(order.integers(len(mels), size=batch_size))
            other = others[step % len(others)]
            asked = [prompts.tasks[task][rows] for task in ("emotion", other)]
            ids = torch.cat([prompts.start.expand(batch_size, -1), *asked], dim=1)
            losses, hidden = packed_losses(model, layouts[other], prompts.audio, mels[rows].float(), ids)
            named = functional.mse_loss(head(hidden), truth[rows, None].expand(-1, hidden.shape[1], -1))
            loss = (losses * layouts[other].weights).sum() + 2 * named
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            values = {"voice": named.item(), "emotion": losses[0].item(), other: losses[2:-1].mean().item()}
            shown |= {name: 0.97 * shown.get(name, value) + 0.03 * value for name, value in values.items()}
            if step % 25 == 0:
                bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
    model.requires_grad_(False)
    return model.eval(), processor


def tokenise(processor: Qwen2AudioProcessor, features: Features) -> PackedPrompts:
    """Token ids of every question with its answer about every utterance."""
    start, end = prompt_pieces(processor)
    tokenizer = processor.tokenizer
    ids = tokenizer(start, add_special_tokens=False)["input_ids"]
    placeholder = tokenizer.convert_tokens_to_ids(processor.audio_token)
    audio = slice(ids.index(placeholder), len(ids) - ids[::-1].index(placeholder))
    speeches = [
        Speech(math.exp(log_pitch), float(level_db), math.exp(log_tract), str(spoken))
        for (log_pitch, level_db, log_tract), spoken in zip(
            features.truth.reshape(-1, 3), features.vowels.reshape(-1), strict=True
        )
    ]
    emotions = [EMOTIONS[label] for label in features.labels.reshape(-1)]
    tasks: dict[str, Tensor] = {}
    answered: dict[str, int] = {}
    for task, question in QUESTIONS.items():
        texts = [
            question + end + answer(task, speech, emotion) + "<|im_end|>"
            for speech, emotion in zip(speeches, emotions, strict=True)
        ]
        tasks[task] = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
        answered[task] = tasks[task].shape[1] - len(tokenizer(question + end, add_special_tokens=False)["input_ids"])
    return PackedPrompts(torch.tensor(ids), audio, tasks, answered)


def layout(prompts: PackedPrompts, tasks: list[str]) -> PackedRow:
    """Where things are in a row of `prompts.start` followed by these tasks."""
    start = len(prompts.start)
    segment, positions = [0] * start, list(range(start))
    predicts: list[int] = []
    weights: list[float] = []
    for number, task in enumerate(tasks, start=1):
        length, answered = prompts.tasks[task].shape[1], prompts.answered[task]
        segment += [number] * length
        positions += range(start, start + length)
        predicts += range(len(segment) - answered - 1, len(segment) - 1)
        weights += [1 / answered] * answered
    segments, index = torch.tensor(segment), torch.arange(len(segment))
    visible = (index[:, None] >= index) & ((segments == 0) | (segments[:, None] == segments))
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return PackedRow(mask[None, None], torch.tensor([positions]), torch.tensor(predicts), torch.tensor(weights))


def packed_losses(
    model: Qwen2AudioForConditionalGeneration,
    row: PackedRow,
    audio: slice,
    mels: Float[Tensor, "batch mel_bins frames"],
    ids: Int[Tensor, "batch seq_len"],
) -> tuple[Float[Tensor, " answers"], Float[Tensor, "batch audio_tokens width"]]:
    """Mean cross entropy of each answer token, and what the hooked layer makes of the audio.

    Args:
        mels: FRAMES_KEPT frames, float32.
        ids: packed rows.

    Returns:
        Losses, and hidden states leaving layer LAYER_IDX at the audio positions.
    """
    embeddings = model.get_input_embeddings()(ids)
    audio_embeddings = audio_tokens(model, mels, FRAMES)
    embeddings = torch.cat([embeddings[:, : audio.start], audio_embeddings, embeddings[:, audio.stop :]], dim=1)
    outputs = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=row.mask,
        position_ids=row.position_ids,
        use_cache=False,
        output_hidden_states=True,
    )
    logits = model.lm_head(outputs.last_hidden_state[:, row.predicts])
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, row.predicts + 1], reduction="none").mean(0)
    return losses, outputs.hidden_states[LAYER_IDX + 1][:, audio]


def prompt_pieces(processor: Qwen2AudioProcessor) -> tuple[str, str]:
    """The chat prompt before a question, with as many audio placeholders as an utterance has tokens, and after it."""
    start, end = prompt_text(processor, "QUESTION").split("QUESTION")
    tokens = ((FRAMES - 1) // 2 + 1 - 2) // 2 + 1
    return start.replace(processor.audio_token, processor.audio_token * tokens), end


if __name__ == "__main__":
    main()
