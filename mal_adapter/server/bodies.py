"""Bodies of requests: read up to a limit, and checked before anything is decoded."""

from pathlib import Path

from starlette.requests import Request

from mal_adapter.errors import AudioError, AudioFormatError
from mal_adapter.ser.recognizer.audio import sound_info
from mal_adapter.server.refusals import Refusal

__all__ = ["check_sound", "no_sound_file", "read"]


async def read(request: Request, max_bytes: int) -> bytes:
    """Read the body.

    Raises:
        Refusal: 413 if it has more than `max_bytes`; 400 if the header with its length is not a number.
    """
    too_large = Refusal(413, "body_too_large", f"the body has more than {max_bytes} bytes", {"Connection": "close"})
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal():
        raise Refusal(400, "invalid_request", "Content-Length is not a number", {"Connection": "close"})
    if len(declared) > 18 or int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def no_sound_file(size: int) -> Refusal:
    """The answer to a body that is not a sound file."""
    advice = "send the file itself, WAV, FLAC, OGG or MP3, as curl --data-binary @turn.wav does"
    return Refusal(415, "not_audio", f"these {size} bytes are not a sound file; {advice}")


def check_sound(path: Path, max_audio_s: float) -> None:
    """Refuse a file that is too long, or not a sound file, before it is decoded: few bytes can unpack to hours, or to
    hundreds of channels. `sound_info` measures the content, whatever the header declares, up to the limit.

    Raises:
        Refusal: 415 or 422.
    """
    try:
        info = sound_info(path, longest_s=max_audio_s)
    except AudioFormatError:
        raise no_sound_file(path.stat().st_size) from None
    except AudioError as error:
        raise Refusal(422, "bad_audio", str(error).removeprefix(f"{path}: ")) from None
    samples = info.duration_s * info.sampling_rate * info.channels
    if info.duration_s > max_audio_s or samples > max_audio_s * 2 * 48_000:
        detail = f"{info.duration_s:.2f} s of audio; up to {max_audio_s:g} s in stereo are processed"
        raise Refusal(422, "bad_audio", detail)
