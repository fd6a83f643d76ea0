"""`ServedRecognizer`: `EmotionRecognizer`'s answers from a vLLM server with a memory. vLLM is not needed here."""

import base64
import io
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile

from mal_adapter.errors import (
    AudioError,
    ConfigError,
    HostError,
    LabelError,
    SessionConflictError,
    SessionError,
    StoreError,
)
from mal_adapter.extras import explain_missing
from mal_adapter.memory.adapter import MemoryAdapter
from mal_adapter.ser.dialogue import Dialogue, Utterance
from mal_adapter.ser.labels import LabelSet
from mal_adapter.ser.recognizer.audio import Waveform, load_waveform
from mal_adapter.ser.recognizer.prompt import choose_task
from mal_adapter.ser.recognizer.results import Failure, Prediction
from mal_adapter.serialization.metadata import AdapterMetadata

__all__ = ["ServedRecognizer"]

_SAMPLING_RATE = 16_000  # vLLM resamples it for a host with another one
_MOST_IDS = 128  # that vLLM takes as logprob_token_ids


class ServedRecognizer:
    """Recognises one emotion of a closed set per utterance, by chat completions of a vLLM server with a memory.

    The probability of a label is the product over its tokens, normalised over the labels, as in `EmotionRecognizer`.
    Labels of one token each take one request per utterance. A label of several tokens takes one more request, with the
    same turn number, which reads what the first one read and writes nothing. A last request asks what became of the
    utterance. The constructor sends a second of noise once per label, without a session, to see the label's tokens.

    Threads may share one recogniser.

    Args:
        url: Of the server, such as "http://localhost:8000".
        adapter: The one that the server was started with: its metadata, a folder, a Hub id or a `MemoryAdapter`. Only
            its labels and question are used.
        model: The name of the model at the server; the first one that it serves unless given.
        api_key: As in `vllm serve --api-key`; the environment variable OPENAI_API_KEY unless given.
        labels: The possible answers; the adapter's unless given.
        prompt: The question; the adapter's unless given.
        end_ids: `eos_token_id` in the model's generation_config.json; needed only where one label begins with another.
        timeout_s: For one request.

    Raises:
        ConfigError: The server refuses the question or the labels, or the key.
        HostError: The server can't be reached, or its chat template can't begin an answer.
        LabelError: Two labels have the same tokens, or one begins with another and `end_ids` is not given.
        MissingDependencyError: httpx is not installed.

    Example:
        >>> from mal_adapter.demo import ADAPTER_FOLDER
        >>> ServedRecognizer("http://localhost:9", ADAPTER_FOLDER)
        Traceback (most recent call last):
        mal_adapter.errors.HostError: http://localhost:9 does not answer (...); start it with `mal-adapter serve ...
    """

    def __init__(
        self,
        url: str,
        adapter: AdapterMetadata | MemoryAdapter | str | os.PathLike[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        labels: LabelSet | Sequence[str] | None = None,
        prompt: str | None = None,
        end_ids: Sequence[int] = (),
        timeout_s: float = 60.0,
    ) -> None:
        with explain_missing("ServedRecognizer", extra="client"):
            import httpx
        metadata = adapter
        if not isinstance(metadata, AdapterMetadata):
            metadata = (
                metadata if isinstance(metadata, MemoryAdapter) else MemoryAdapter.from_pretrained(metadata)
            ).metadata
        self.labels, self.prompt = choose_task(metadata, labels, prompt)
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._failure = httpx.HTTPError
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s)
        try:
            self.model = model or str(self._send("GET", "/v1/models")["data"][0]["id"])
            self._look_at_tokens(list(end_ids))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> "ServedRecognizer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def recognize(
        self,
        dialogue: Dialogue | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        session_id: str | None = None,
    ) -> Iterator[Prediction | Failure]:
        """Send a dialogue from its start, and yield one result per utterance as soon as it is known.

        Args:
            dialogue: A `Dialogue`, or sound files in the order spoken.
            session_id: A new one; the dialogue's id unless given.

        Yields:
            A `Prediction`, or a `Failure` where the audio is unusable; the latter is not sent, and takes no turn.

        Raises:
            ManifestError: There are no files, or one is a manifest.
            SessionConflictError: The session has utterances already.
            ConfigError, HostError, SessionError, StoreError: As `answer`.
        """
        one = dialogue if isinstance(dialogue, Dialogue) else Dialogue.from_files(dialogue)
        turn = 0
        for utterance in one.utterances:
            try:
                answer = self.answer(utterance, session_id or one.dialogue_id, turn)
            except AudioError as error:
                yield Failure(utterance, error)
            else:
                turn += 1
                yield answer

    def answer(self, utterance: Utterance, session_id: str | None, turn: int | None = None) -> Prediction:
        """Send an utterance, which reads the session's memory and is then written.

        After an error, send it with the same turn again: it is written once in any case, and the answer is the same.

        Args:
            utterance: Its sound is decoded here, to mono at 16 kHz.
            session_id: The session that it continues; None for an answer without memory.
            turn: How many utterances the session has before this one.

        Raises:
            AudioError: The audio is unusable. Nothing was sent.
            ConfigError: The server refuses the request; the message is the server's.
            HostError: The server does not answer, or its answer is not a number.
            SessionConflictError: Another turn is due.
            SessionError: There is a session without a turn, or the server has no memory.
            StoreError: The server could not read the session, so the utterance was not written. The message says why.
        """
        if (session_id is None) != (turn is None):
            raise SessionError(
                f"session_id={session_id!r} and turn={turn!r}: give both, or neither; turns count from 0"
            )
        started = time.perf_counter()
        waveform = load_waveform(utterance, _SAMPLING_RATE)
        extra = {} if session_id is None else {"vllm_xargs": {"session_id": session_id, "turn": turn}}
        message = self._message(waveform)
        first: dict[str, Any] = {}
        scores = dict.fromkeys(self.labels, 0.0)
        if self._first_ids:
            first, logprobs = self._next_token(message, None, self._first_ids, extra)
            scores = {label: logprobs[ids[0]] for label, ids in self._tokens.items()}
        for label in self._tokens if self._end_ids or not self._first_ids else self._longer:
            reply, logprobs = self._next_token(message, label, self._end_ids, extra)
            first = first or reply
            scored = len(self._tokens[label]) - bool(self._first_ids)
            scores[label] += sum(_logprobs_of_prompt(reply, scored))
            scores[label] += _log_sum_exp([logprobs[i] for i in self._end_ids]) if self._end_ids else 0.0
        if session_id is not None and turn is not None:
            self._check_outcome(session_id, turn, str(first["id"]))
        probabilities = _softmax(scores)
        label = max(probabilities, key=probabilities.__getitem__)
        return Prediction(
            utterance, label, probabilities, len(waveform) / _SAMPLING_RATE, time.perf_counter() - started
        )

    def session(self, session_id: str) -> dict[str, Any] | None:
        """What the server knows of a session; None if it does not exist or has expired.

        Returns:
            `utterances`, `tokens`, `skipped_writes`, `next_turn`, `saved`, and `last`, what became of its last request.

        Raises:
            HostError: The server does not answer.
            StoreError: The store does not answer.
        """
        found: dict[str, Any] | None = self._send("GET", f"/v1/sessions/{quote(session_id, safe='')}", missing=True)
        return found

    # the labels' tokens ----------------------------------------------------------------------------------------------

    def _look_at_tokens(self, end_ids: list[int]) -> None:
        message = self._message(np.random.default_rng(0).normal(0, 0.1, _SAMPLING_RATE).astype(np.float32))
        prompt = _tokens_of_prompt(self._ask([message]))
        answers = {label: _tokens_of_prompt(self._ask([message], label)) for label in self.labels}
        common = next(
            (i for i, ids in enumerate(zip(prompt, *answers.values(), strict=False)) if len(set(ids)) > 1), len(prompt)
        )
        # A tokenizer may merge the end of the prompt with the start of a label, but no more than one token.
        if len(prompt) - common > 1 or any(len(ids) <= common for ids in answers.values()):
            raise HostError(
                f"{self.url}: the chat template of {self.model} begins an answer in another way than an assistant's "
                "message, so labels can't be scored; serve it with --chat-template"
            )
        self._tokens = {label: ids[common:] for label, ids in answers.items()}
        seen: dict[tuple[int, ...], str] = {}
        for label, ids in self._tokens.items():
            if (same := seen.setdefault(tuple(ids), label)) != label:
                raise LabelError(f"{label!r} and {same!r} are the same tokens {ids} to this host")
        pairs = [
            (a, b) for a, x in self._tokens.items() for b, y in self._tokens.items() if a != b and y[: len(x)] == x
        ]
        if pairs and not end_ids:
            raise LabelError(
                f"{pairs[0][1]!r} begins with {pairs[0][0]!r}, so that only the end of the answer distinguishes them; "
                "give end_ids, which is eos_token_id in the model's generation_config.json, or other labels"
            )
        self._end_ids = end_ids if pairs else []
        first = sorted({ids[0] for ids in self._tokens.values()})
        # With a merged token, the answer does not start after the prompt, but one token earlier.
        self._first_ids = first if common == len(prompt) and len(first) <= _MOST_IDS else []
        self._longer = [label for label, ids in self._tokens.items() if len(ids) > 1]

    # requests --------------------------------------------------------------------------------------------------------

    def _message(self, waveform: Waveform) -> dict[str, Any]:
        file = io.BytesIO()
        soundfile.write(file, waveform, _SAMPLING_RATE, format="WAV", subtype="FLOAT")
        audio = {"data": base64.b64encode(file.getvalue()).decode("ascii"), "format": "wav"}
        parts = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": self.prompt}]
        return {"role": "user", "content": parts}

    def _ask(self, messages: list[dict[str, Any]], label: str | None = None, **others: Any) -> dict[str, Any]:
        """One token after the prompt, or after this answer, and the log-probabilities of all before it."""
        body: dict[str, Any] = {"model": self.model, "messages": messages, "max_completion_tokens": 1, "temperature": 0}
        if label is not None:
            body["messages"] = [*messages, {"role": "assistant", "content": label}]
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        answer: dict[str, Any] = self._send("POST", "/v1/chat/completions", {"prompt_logprobs": 0, **body, **others})
        return answer

    def _next_token(
        self, message: dict[str, Any], label: str | None, ids: list[int], extra: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[int, float]]:
        """The reply, and the log-probabilities of these tokens as the next one."""
        others = dict(extra)
        if label is None:
            others["prompt_logprobs"] = None
        if ids:
            others |= {"logprobs": True, "top_logprobs": len(ids) + 1, "logprob_token_ids": ids}
            others["return_tokens_as_token_ids"] = True
        reply = self._ask([message], label, **others)
        if not ids:
            return reply, {}
        found = {
            int(entry["token"].removeprefix("token_id:")): float(entry["logprob"])
            for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        }
        if missing := [i for i in ids if i not in found or math.isnan(found[i])]:
            raise HostError(f"{self.url} gave no log-probabilities of the tokens {missing}; it needs vLLM 0.32 or 0.33")
        return reply, found

    def _check_outcome(self, session_id: str, turn: int, request_id: str) -> None:
        known = self.session(session_id)
        if known is None:
            raise SessionError(
                f"{self.url} has no session {session_id!r} after an utterance in it: it has no memory or no session "
                "routes, or the session was deleted; start it with `mal-adapter serve --engine vllm`"
            )
        last, due = known["last"] or {}, int(known["next_turn"])
        ours = last.get("turn") == turn and str(last.get("request_id", "")).startswith(request_id)
        if ours and not last["read"]:
            raise StoreError(f"session {session_id!r} was answered without memory: {last['reason']}; send it again")
        if due <= turn or (ours and due != turn + 1):
            raise SessionConflictError(f"session {session_id!r}: turn {due} is due, not {turn}")

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, missing: bool = False) -> Any:
        """The JSON of a reply; None for status 404 if it may be `missing`."""
        try:
            reply = self._client.request(method, path, json=body)
        except self._failure as error:
            raise HostError(
                f"{self.url} does not answer ({str(error) or type(error).__name__}); start it with `mal-adapter serve "
                "--engine vllm`, or send the same turn again"
            ) from error
        if reply.status_code == 200:
            return reply.json()
        if reply.status_code == 404 and missing:
            return None
        try:
            said = str(reply.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            said = reply.text[:200]
        message = f"{self.url}{path} answers {reply.status_code}: {said}"
        if reply.status_code == 503:
            raise StoreError(message)
        raise HostError(message) if reply.status_code >= 500 else ConfigError(message)


def _tokens_of_prompt(reply: Mapping[str, Any]) -> list[int]:
    """The prompt's tokens; of its first one, vLLM gives no log-probability."""
    return [-1 if entry is None else int(next(iter(entry))) for entry in reply["prompt_logprobs"]]


def _logprobs_of_prompt(reply: Mapping[str, Any], last: int) -> list[float]:
    """Of its last tokens."""
    entries = reply["prompt_logprobs"]
    return [float(next(iter(entry.values()))["logprob"]) for entry in entries[len(entries) - last :]]


def _log_sum_exp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def _softmax(scores: Mapping[str, float]) -> dict[str, float]:
    whole = _log_sum_exp(list(scores.values()))
    return {label: math.exp(score - whole) for label, score in scores.items()}
