"""`EmotionRecognizer`: one emotion per utterance of a spoken dialogue."""

import contextlib
import functools
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mal_adapter.errors import ConfigError, CopyError, HostError, SessionError, StoreError, raise_problems
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.memory.config import check_integer
from mal_adapter.memory.ensemble import AnyAdapter, MemoryEnsemble, load_adapter
from mal_adapter.memory.state import MemoryState
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.recognizer.audio import Waveform
from mal_adapter.ser.recognizer.inputs import HostInputs, Prepared, argument_names
from mal_adapter.ser.recognizer.members import MeanOfMembers
from mal_adapter.ser.recognizer.pretrained import check_pair, load_host_of, with_lora
from mal_adapter.ser.recognizer.prompt import AudioPrompt, check_kept_answers, choose_task
from mal_adapter.ser.recognizer.results import Continuation, Failure, Prediction
from mal_adapter.ser.recognizer.scoring import LabelScorer, end_ids
from mal_adapter.ser.suitability import id_problems
from mal_adapter.ser.timeline.make import make_timeline
from mal_adapter.ser.timeline.request import Request, Turns
from mal_adapter.ser.timeline.timeline import TimelineEntry
from mal_adapter.ser.turns.turn import TurnSettings

if TYPE_CHECKING:
    from mal_adapter.attach import AttachedMemory
    from mal_adapter.ser.live.stream import EmotionStream
    from mal_adapter.stores.base import SessionStore

__all__ = ["EmotionRecognizer"]


class EmotionRecognizer:
    """Recognises one emotion of a closed set per utterance, by the probability of each label as the host's answer.

    The host runs once per utterance, within the memory's session of the dialogue. The utterance reads what earlier
    utterances wrote, and is then written. Labels of several tokens are scored on the cache of that forward. A host
    without a cache runs the prompt again for each label; these runs read what the first run read, and write nothing.

    An adapter with several members answers with the mean of their probabilities: one forward of the whole host, and for
    each further member one of the layers above the memory, in one thread at a time. Each member has its own memory.

    What is mutated: `model` and `memory` are put in eval mode; the memory's states grow with each utterance.

    Args:
        model: An audio language model of transformers, on any device and in any dtype.
        processor: Its processor.
        memory: From `attach_memory(model, …)`. None is the plain host, for a model without an attached memory.
        labels: The possible answers. Unless given, those that the memory was trained with, else four common ones.
        prompt: The question after the audio. Unless given, the one that the memory was trained with if `labels` is not
            given either, else a question that asks for one word of the labels.

    The constructor checks everything that needs no forward, and tries the processor on a second of noise.

    Raises:
        ConfigError: The prompt is empty, or contains a token that the host takes for audio or for the end of a turn.
        HostError: The processor takes no audio, the model has no weights, the memory is attached to another model, or a
            label has several tokens and this host can't score them.
        LabelError: The host can't distinguish the labels.
        SessionError: The memory is detached.

    Example:
        >>> from mal_adapter import attach_memory
        >>> from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
        >>> from mal_adapter.ser import EmotionRecognizer, load_host
        >>> model, processor = load_host(str(HOST_FOLDER))
        >>> memory = attach_memory(model, adapter=ADAPTER_FOLDER)
        >>> recognizer = EmotionRecognizer(model, processor, memory)
        >>> recognizer.prompt
        'How does the speaker feel?'

        `EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER)` does the same in one call.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        memory: "AttachedMemory | None" = None,
        labels: LabelSet | Sequence[str] | None = None,
        prompt: str | None = None,
    ) -> None:
        if all(p.is_meta for p in model.parameters()) and not any(hasattr(m, "_hf_hook") for m in model.modules()):
            raise HostError("the model is on the meta device, without weights; load it with from_pretrained")
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise HostError(f"{type(processor).__name__} has no tokenizer; give the model's AutoProcessor")
        self.model = model.eval()
        self.processor = processor
        self.memory = memory
        self.labels, self.prompt = choose_task(None if memory is None else memory.adapter.metadata, labels, prompt)
        if memory is not None:
            if all(module is not memory.decoder_layers for module in model.modules()):
                raise HostError("this memory is attached to another model; pass the model that attach_memory was given")
            if not memory.attached:
                raise SessionError(
                    "this memory is detached; attach it again with attach_memory(model, adapter=memory.adapter)"
                )
            check_kept_answers(memory.adapter, self.labels)
            memory.eval()
        self._reads_memory = memory is not None
        self._audio = AudioPrompt(processor, self.prompt)
        self._scorer = LabelScorer(tokenizer, self.labels, self._audio.text, end_ids(model, tokenizer))
        self._scorer.check_host(model)
        self._inputs = HostInputs(model, processor, self._audio, self._scorer.healed_tokens)
        self._mean: MeanOfMembers | None = None
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in argument_names(model) else {}

    @classmethod
    def from_pretrained(
        cls,
        adapter: AnyAdapter | str | os.PathLike[str],
        model: str | os.PathLike[str] | tuple[Any, Any] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        labels: LabelSet | Sequence[str] | None = None,
        prompt: str | None = None,
        store: "SessionStore | str | os.PathLike[str] | None" = None,
        **model_kwargs: Any,
    ) -> "EmotionRecognizer":
        """Load a trained adapter, its host, and the LoRA that was trained beside it.

        What is mutated: a loaded `model` gets the memory's hooks, and PEFT's layers where the adapter's folder has a
        LoRA and the model has none.

        Args:
            adapter: A folder, a Hub id, or a loaded adapter. A LoRA is looked for in the subfolder `lora` of a
                folder only: for a Hub id, load it with peft and pass the pair as `model`.
            model: The host: a folder, a Hub id, or a loaded (model, processor). Unless given, the host that the adapter
                names; a relative path is looked up in the working directory, then beside the adapter's folder.
            device: Where the host goes; the first CUDA device where there is one, else the CPU.
            dtype: Of the host's weights; the checkpoint's unless given.
            labels: The possible answers; the adapter's unless given.
            prompt: The question after the audio. Unless given, the adapter's if `labels` is not given either, else one
                that names the labels.
            store: Where the sessions' states are kept, as for `attach_memory`.
            **model_kwargs: For the host's `from_pretrained`, as in `load_host`: `device_map="auto"`, `revision`, ….
                `token`, `cache_dir` and `local_files_only` are used for the adapter too.

        Returns:
            The recogniser, with the memory attached as `recognizer.memory`.

        Raises:
            AdapterNotFoundError, AdapterFormatError, HubError: The adapter can't be loaded.
            ConfigError: `model` is neither a name nor a pair, or options for loading are given with a loaded pair.
            HostError: The host is not known, can't be loaded or does not take the LoRA; or as the constructor says.
            HostMismatchError: The adapter was trained for another kind of host.
            LabelError: The labels are not a label set, or the host can't distinguish them.
            MissingDependencyError: The adapter has a LoRA and peft is not installed, or `device_map` is given and
                accelerate is not installed.

        Example:
            >>> from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
            >>> from mal_adapter.ser import EmotionRecognizer
            >>> recognizer = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER)
            >>> recognizer.prompt, list(recognizer.labels)
            ('How does the speaker feel?', ['neutral', 'happy', 'angry', 'sad'])
            >>> [result.error for result in recognizer.recognize("turn1.wav")]
            [AudioError('turn1.wav: there is no such file; check the path')]
        """
        from mal_adapter.attach import attach_memory

        if isinstance(model, tuple):
            options = {"device": device, "dtype": dtype, **model_kwargs}
            check_pair(model, [name for name, value in options.items() if value is not None])
        elif not isinstance(model, (str, os.PathLike, type(None))):
            raise ConfigError(
                f"model is a {type(model).__name__}, expected a folder, a Hub id or a loaded (model, processor)"
            )
        trained: AnyAdapter
        if isinstance(adapter, MemoryAdapter | MemoryEnsemble):
            trained = adapter
        else:
            shared = {name: model_kwargs[name] for name in _ADAPTER_OPTIONS if name in model_kwargs}
            trained = load_adapter(adapter, **shared)
        label_set, question = choose_task(trained.metadata, labels, prompt)
        if isinstance(model, tuple):
            host, processor = model
        else:
            options = {"device": device, "dtype": "auto" if dtype is None else dtype, **model_kwargs}
            host, processor = load_host_of(trained, adapter, model, options)
        if not isinstance(adapter, MemoryAdapter | MemoryEnsemble):
            host = with_lora(host, adapter)
        memory = attach_memory(host, adapter=trained, store=store)
        try:
            return cls(host, processor, memory, label_set, question)
        except BaseException:  # the caller has no other reference to the hooks in a model of their own
            memory.detach()
            raise

    def without_memory(self) -> "EmotionRecognizer":
        """The same recogniser on the same model, which neither reads nor writes the memory; for comparison."""
        # Not copy.copy, which a memory refuses; and not the constructor, since a template may render today's date.
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._reads_memory = False
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.memory is not None:
            raise CopyError(
                "an EmotionRecognizer with a memory belongs to this process and can't be pickled or deep-copied. Make "
                "one in the other process: EmotionRecognizer.from_pretrained(adapter, model). To prepare audio only, "
                "its processor is enough"
            )
        return self.__dict__

    @property
    def sampling_rate(self) -> int:
        """The sampling rate of the host's audio input, in Hz."""
        return self._audio.sampling_rate

    @property
    def longest_s(self) -> float:
        """The longest utterance that the host takes, in seconds. Found by trying the processor on noise, once."""
        return self._audio.longest_s

    @property
    def reads_memory(self) -> bool:
        """Whether utterances read and write a memory: False without one, and after `without_memory`."""
        return self._reads_memory

    @property
    def labels_need_cache(self) -> bool:
        """Whether a label has several tokens in this host's tokenizer, so that the prompt's cache is needed."""
        return self._scorer.needs_cache

    def recognize(
        self, dialogue: Dialogue | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    ) -> Iterator[Prediction | Failure]:
        """Process a dialogue from its start, and yield one result per utterance as soon as it is known.

        What is mutated: `memory.states[dialogue.dialogue_id]` starts empty and has the whole dialogue in the end.

        Args:
            dialogue: A `Dialogue`, whose id is the id of the session; or sound files in the order spoken, such as
                `["turn1.wav", "turn2.wav"]`, which `Dialogue.from_files` makes into one dialogue.

        Yields:
            A `Prediction`, or a `Failure` where the audio is unusable; later utterances are still answered.

        Raises:
            ManifestError: There are no files, or one is a manifest.
            HostError, SessionError, SessionConflictError, StoreError: As `answer`.
        """
        one = dialogue if isinstance(dialogue, Dialogue) else Dialogue.from_files(dialogue)
        return self.recognize_many([one], batch_size=1)

    def recognize_many(self, dialogues: Iterable[Dialogue], batch_size: int = 8) -> Iterator[Prediction | Failure]:
        """Process several dialogues side by side: one forward runs the next utterance of each. The answers are those of
        `recognize`, sooner.

        What is mutated: as in `recognize`, for every dialogue.

        Args:
            dialogues: With different ids. The next one is taken from the iterable when another one ends.
            batch_size: How many dialogues are processed at once.

        Yields:
            A result per utterance, in order within each dialogue. The dialogues alternate; `result.utterance` has the
            dialogue's id.

        Raises:
            ConfigError: `batch_size` is not an integer of at least 1, or two dialogues have the same id. In a list of
                dialogues this is found before anything runs.
            HostError, SessionError, SessionConflictError, StoreError: As `answer`.
        """
        check_integer("batch_size", batch_size, 1)
        if isinstance(dialogues, Sequence):
            raise_problems(id_problems(dialogues, reads_memory=self._reads_memory))
        return self._recognize_many(dialogues, batch_size)

    def _recognize_many(self, dialogues: Iterable[Dialogue], batch_size: int) -> Iterator[Prediction | Failure]:
        waiting = iter(dialogues)
        active: list[deque[Utterance]] = []
        seen: set[str] = set()
        while True:
            while len(active) < batch_size and (dialogue := next(waiting, None)) is not None:
                if dialogue.dialogue_id in seen:
                    raise ConfigError(f"two dialogues have the id {dialogue.dialogue_id!r}; give them different ids")
                seen.add(dialogue.dialogue_id)
                if self.memory is not None and self._reads_memory:
                    self.memory.states.forget([dialogue.dialogue_id])
                active.append(deque(dialogue.utterances))
            if not active:
                return
            yield from self.answer([turns.popleft() for turns in active])
            active = [turns for turns in active if turns]

    def timeline(
        self,
        path: str | os.PathLike[str],
        turns: Turns = None,
        *,
        channels: Sequence[str] | None = None,
        settings: TurnSettings | None = None,
        compare: bool = True,
        session_id: str | None = None,
    ) -> Iterator[TimelineEntry]:
        """Process a whole recording from its start, and yield an entry per turn as soon as it is known.

        The recording is one dialogue, and its turns are the utterances, in the order of their starts. Turns are taken
        and answered one after the other, so the main memory that is needed does not grow with the recording.

        What is mutated: the session `session_id` starts empty and has the whole recording in the end.

        Args:
            path: The sound file.
            turns: A file of turns, as `mal_adapter.ser.turns.files.read_turns` reads it; or the turns, in order of
                start unless they are a list. Without turns, they are found by voice activity, which needs the extra
                `recordings`. Turns that are longer than the host accepts are split at their quietest places.
            channels: The speaker of each channel of the file, from the first. Each turn is then recognised from its
                speaker's channel alone. Without names, channels are averaged, except where a turn names its channel.
            settings: How voice activity becomes turns. Its `max_s` holds for given turns too.
            compare: Whether the plain host answers each turn too, for comparison. Costs a second forward per turn.
            session_id: The id of the session; the file's name without suffix unless given.

        Yields:
            The turn, its answer, and the answer without memory. The result is a `Failure` where the audio is unusable,
            as in a silent turn; later turns are still answered.

        Raises:
            AudioError: The recording can't be read. In the middle of a damaged one, voice activity ends with it.
            MissingDependencyError: A package of the extra `recordings` is not installed.
            TurnError: The turns can't be read, are beyond the end of the recording, or come in the wrong order; or the
                names of channels repeat, or are more or fewer than the channels.
            HostError, SessionError, SessionConflictError, StoreError: As `answer`.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> import soundfile
            >>> from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
            >>> from mal_adapter.demo.dialogues import make_dialogue
            >>> from mal_adapter.ser import EmotionRecognizer
            >>> from mal_adapter.ser.turns import Turn
            >>> call = os.path.join(tempfile.mkdtemp(), "call-42.wav")
            >>> said = np.concatenate([turn.audio for turn in make_dialogue("test", 7, 0, turns=2).turns])
            >>> soundfile.write(call, said, 16_000)
            >>> recognizer = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER)
            >>> turns = [Turn(0.0, 1.4, "customer"), Turn(1.5, 2.9, "agent")]
            >>> for entry in recognizer.timeline(call, turns):
            ...     print(entry.turn.speaker, entry.emotion, entry.result.utterance.dialogue_id)
            customer neutral call-42
            agent neutral call-42
        """
        return make_timeline(self, Request(path, turns, channels, settings, session_id), compare=compare)

    def answer(
        self,
        utterances: Sequence[Utterance],
        *,
        session_ids: Sequence[str] | None = None,
        write: bool = True,
        waveforms: Sequence[Waveform | None] | None = None,
    ) -> list[Prediction | Failure]:
        """Process the next utterance of each of several dialogues, in one forward.

        What is mutated: each utterance is written to `memory.states[utterance.dialogue_id]`.

        Args:
            utterances: Of different dialogues.
            session_ids: The session that each utterance reads and is written to; its dialogue's unless given.
            write: False reads without writing.
            waveforms: The sound of utterances that are in no file, as for `prepare`.

        Returns:
            One result per utterance, in their order.

        Raises:
            ConfigError: Two utterances have the same session, so that the second could not read what the first writes;
                or the number of session ids or waveforms is not that of the utterances.
            HostError: The host's answer is NaN. The batch's utterances are written all the same, unless they are NaN.
            SessionError: The memory is detached, an id can't be the id of a session, or a session is open elsewhere.
            SessionConflictError: Another process has continued a session meanwhile.
            StoreError: A session can't be read from the store, so that no utterance was processed. If only saving
                fails, the answers are returned and the states are in `memory.states.unsaved`.
        """
        ids = [utterance.dialogue_id for utterance in utterances] if session_ids is None else list(session_ids)
        if len(ids) != len(utterances):
            raise ConfigError(f"expected a session id per utterance, got {len(ids)} for {len(utterances)} utterances")
        if len(set(ids)) != len(ids):
            raise ConfigError(f"a batch must not hold two utterances of one dialogue, got the dialogue ids {ids}")
        started = time.perf_counter()
        prepared = self.prepare(utterances, waveforms)
        probabilities = None
        if prepared.audio_s:
            rows = [ids[index] for index in prepared.audio_s]
            sessions = self._session(rows, write=write, audio_mask=prepared.audio_mask)
            probabilities = self._score(prepared.inputs, sessions).softmax(-1)
        results = self._results(utterances, prepared, probabilities, started)
        if (nan := next((result for result in results if isinstance(result, HostError)), None)) is not None:
            raise nan
        return [result for result in results if not isinstance(result, HostError)]

    def stream(
        self,
        sampling_rate: int,
        *,
        channels: int | Sequence[str] = 1,
        session_id: str | None = None,
        settings: TurnSettings | None = None,
        compare: bool = False,
    ) -> "EmotionStream":
        """Begin a live stream of sound: blocks of PCM go in, and each turn comes out with its emotion as it ends.

        What is mutated: each turn is written to `memory.states[session_id]`, in the order of the turns' ends.

        Args:
            sampling_rate: Of the blocks, in Hz; any.
            channels: The number of channels, or the name of each channel's speaker. Channels are never mixed.
            session_id: Of the memory; a new one unless given. An existing session is continued.
            settings: How turns are found in the sound. Turns are split at 30 s unless `max_s` is given, or at what the
                host takes if that is less.
            compare: Ask the plain host as well; `entry.without_memory` is its answer.

        Raises:
            ConfigError: An argument is not what it should be.
            MissingDependencyError: silero-vad is not installed.

        Example:
            >>> import numpy as np
            >>> from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER
            >>> from mal_adapter.ser import EmotionRecognizer
            >>> recognizer = EmotionRecognizer.from_pretrained(ADAPTER_FOLDER, HOST_FOLDER)
            >>> stream = recognizer.stream(8_000, channels=["customer", "agent"])
            >>> stream.feed(np.zeros((160, 2), dtype=np.int16))  # 20 ms
            []
            >>> stream.position_s, stream.speaking_since(1), stream.finish()
            (0.02, None, [])
        """
        from mal_adapter.ser.live.stream import EmotionStream

        return EmotionStream(
            self, sampling_rate, channels=channels, session_id=session_id, settings=settings, compare=compare
        )

    def answer_from(
        self,
        utterances: Sequence[Utterance],
        states: Sequence[MemoryState | None],
        prepared: Prepared | None = None,
    ) -> list[Continuation]:
        """Process the next utterance of each of several dialogues in one forward, from states that the caller has
        loaded and will save. An error of one utterance is not an error of the others.

        What is mutated: nothing. The memory's sessions are neither read nor written.

        Args:
            utterances: Of any dialogues.
            states: Of each utterance's dialogue, of batch size 1; None starts a dialogue.
            prepared: What `prepare(utterances)` returned, if another thread has called it already.

        Returns:
            Per utterance, in their order: its result, and its dialogue's state after it.

        Raises:
            ConfigError: There is no memory, or not one state per utterance.
            SessionError: The memory is detached, or a session is open in this thread.
            StateMismatchError: A state belongs to another adapter.
        """
        if self.memory is None or not self._reads_memory:
            raise ConfigError("answer_from continues states, and this recogniser reads no memory; call answer")
        if len(states) != len(utterances):
            raise ConfigError(f"expected a state per utterance, got {len(states)} for {len(utterances)} utterances")
        started = time.perf_counter()
        prepared = self.prepare(utterances) if prepared is None else prepared
        probabilities, reached = None, {}
        if prepared.audio_s:
            rows = [states[index] for index in prepared.audio_s]
            with torch.no_grad(), self.memory.session_from(rows, audio_mask=prepared.audio_mask) as session:
                scores = self.log_probs(prepared.inputs)
            probabilities = scores.softmax(-1)
            reached = dict(zip(prepared.audio_s, session.state.split(), strict=True))
        results = self._results(utterances, prepared, probabilities, started)
        return [
            Continuation(result, reached[index] if isinstance(result, Prediction) else None)
            for index, result in enumerate(results)
        ]

    def _results(
        self,
        utterances: Sequence[Utterance],
        prepared: Prepared,
        probabilities: Float[Tensor, "batch labels"] | None,
        started: float,
    ) -> list[Prediction | Failure | HostError]:
        """One result per utterance; a `HostError` where the host's answer is NaN."""
        results: dict[int, Prediction | Failure | HostError] = dict(prepared.failures)
        elapsed_s = time.perf_counter() - started
        rows = [] if probabilities is None else probabilities.tolist()
        for (index, audio_s), row in zip(prepared.audio_s.items(), rows, strict=True):
            if math.isnan(row[0]):
                results[index] = HostError(
                    f"{utterances[index].audio}: the model's answer is NaN in {self.model.dtype}, usually because "
                    "it overflows there; load it in bfloat16 or float32"
                )
                continue
            by_label = dict(zip(self.labels, row, strict=True))
            label = max(by_label, key=by_label.__getitem__)
            results[index] = Prediction(utterances[index], label, by_label, audio_s, elapsed_s)
        return [results[index] for index in range(len(utterances))]

    def prepare(self, utterances: Sequence[Utterance], waveforms: Sequence[Waveform | None] | None = None) -> Prepared:
        """Open the sound files, and make the host's inputs of those with usable audio, on its device.

        Args:
            utterances: Any.
            waveforms: Per utterance its sound, (samples,) float32, one channel at `sampling_rate`, from -1 to 1; None
                opens its file.

        Raises:
            ConfigError: There is not one waveform per utterance.
        """
        return self._inputs(utterances, waveforms)

    def with_positions(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Add `position_ids` to the inputs, if the host takes them."""
        return self._inputs.with_positions(inputs)

    def log_probs(self, inputs: dict[str, Any]) -> Float[Tensor, "batch labels"]:
        """Log-probability of each label, within a session that the caller has opened; for training.

        What is mutated: the utterances are written to the session's dialogues.

        Args:
            inputs: From `prepare`, one row per dialogue of the session.

        Returns:
            (batch, labels) float32, not normalised over the labels; differentiable where autograd records. If the
            session's adapter has several members, those of the mean of their probabilities, which are normalised.
        """
        memory = self.memory
        if memory is None or not memory.has_members:
            return self._forward(inputs)
        if self._mean is None:
            needs_cache = self.labels_need_cache
            self._mean = MeanOfMembers(memory, self._forward, self.model.dtype, needs_cache=needs_cache)
        return self._mean(inputs)

    def _forward(self, inputs: dict[str, Any]) -> Float[Tensor, "batch labels"]:
        """Log-probability of each label in one forward."""
        scores = self._label_log_probs(inputs, self._run(inputs))
        if self.memory is not None and self._reads_memory and self.memory.keeps_answers:
            self.memory.write_answers(scores.detach().float().softmax(-1))
        return scores

    @torch.no_grad()  # not inference_mode: the states written here may be trained through later
    def _score(
        self, inputs: dict[str, Any], sessions: contextlib.AbstractContextManager[Any]
    ) -> Float[Tensor, "batch labels"]:
        """Log-probabilities; reads and writes the sessions."""
        scores = None
        try:
            with sessions:
                scores = self.log_probs(inputs)
        except StoreError:
            if scores is None:
                raise
            # The host has answered. The states are kept in memory.states.unsaved, and the next answer saves them.
        return scores

    def _run(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs, use_cache=self._scorer.needs_cache, **self._last_only)

    def _label_log_probs(self, inputs: dict[str, Any], outputs: Any) -> Float[Tensor, "batch labels"]:
        cache = getattr(outputs, "past_key_values", None)
        mask, positions = inputs["attention_mask"], inputs.get("position_ids")
        run_again = functools.partial(self._run_again, inputs)
        return self._scorer.log_probs(self._run_text, outputs.logits[:, -1], cache, mask, positions, run_again)

    def _run_text(self, **inputs: Any) -> Any:
        """Run the host without memory on tokens after a prompt."""
        with self._without_session():
            return self.model(**inputs)

    def _run_again(
        self, inputs: dict[str, Any], tokens: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """The logits at `tokens` after each prompt. Reads what the prompt read from the memory, and writes nothing."""
        longer = self._inputs.with_tokens(inputs, tokens)
        last_only = dict.fromkeys(self._last_only, len(tokens))
        with contextlib.nullcontext() if self.memory is None else self.memory.rereading():
            logits: Tensor = self.model(**longer, use_cache=False, **last_only).logits[:, -len(tokens) :]
        return logits

    def _session(
        self, session_ids: list[str], *, write: bool, audio_mask: Bool[Tensor, "batch seq_len"] | None
    ) -> contextlib.AbstractContextManager[Any]:
        if self.memory is None or not self._reads_memory:
            return self._without_session()
        return self.memory.session(session_ids, write=write, audio_mask=audio_mask)

    def _without_session(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.memory is None else self.memory.disabled()


_ADAPTER_OPTIONS = ("token", "cache_dir", "local_files_only")
