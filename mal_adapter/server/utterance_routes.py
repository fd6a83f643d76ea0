"""The route that answers utterances."""

import asyncio
import itertools
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from mal_adapter.server.answers import Turn
from mal_adapter.server.batcher import UnwantedError
from mal_adapter.server.bodies import check_sound, no_sound_file, read
from mal_adapter.server.requests import note
from mal_adapter.server.service import Service
from mal_adapter.server.turns import in_time, timed_out

__all__ = ["utterance_routes"]


def utterance_routes(service: Service) -> APIRouter:
    """`POST /sessions/ID/utterances`."""
    router, limits, numbers = APIRouter(), service.limits, itertools.count()

    def store_sound(path: Path, body: bytes) -> None:
        path.write_bytes(body)
        check_sound(path, limits.max_audio_s)

    # An id may have slashes. An ASGI server decodes %2F before the path is matched.
    @router.post("/sessions/{session_id:text}/utterances", response_class=JSONResponse)
    async def post_utterance(session_id: str, request: Request) -> JSONResponse:
        """The body is a sound file."""
        loop = asyncio.get_running_loop()
        began_s, timeout_s = loop.time(), limits.timeout_s
        stored_id = service.space(request).stored(session_id)
        note(request.scope, session=session_id)

        async def wanted() -> bool:  # the client may send the utterance again, which must not be processed twice
            return not await request.is_disconnected()

        with in_time(timeout_s) as upload:
            async with service.turns.of(stored_id):
                body = await read(request, limits.max_bytes)
                note(request.scope, bytes=len(body))
                if not body:
                    raise no_sound_file(0)
                upload.deadline = float("inf")  # a thread can't be interrupted, and the batcher has its own limit
                path = service.folder / str(next(numbers))
                try:
                    await run_in_threadpool(store_sound, path, body)
                    left_s = timeout_s - (loop.time() - began_s)
                    answer = await service.batcher.submit(Turn(stored_id, path), left_s, wanted)
                except TimeoutError:
                    raise timed_out(timeout_s) from None
                except UnwantedError:
                    raise ClientDisconnect from None
                finally:
                    path.unlink(missing_ok=True)
        note(request.scope, batch=answer.batch, audio_s=answer.prediction.audio_s, saved=answer.saved)
        content = {
            "session": session_id,
            "utterance": answer.utterance,
            "emotion": answer.prediction.label,
            "probabilities": answer.prediction.probabilities,
            "audio_s": answer.prediction.audio_s,
            "elapsed_s": answer.elapsed_s,
            "saved": answer.saved,
        }
        return JSONResponse(content)

    return router
