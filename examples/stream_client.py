"""A recording, or what a microphone says, sent live to `mal-adapter serve`: a line per turn, as soon as it has ended.

    mal-adapter serve
    python examples/stream_client.py call.wav --channels customer,agent
    ffmpeg -loglevel error -f pulse -i default -f s16le -ac 1 -ar 16000 - | python examples/stream_client.py -

A recording is sent as fast as it was spoken; `--fast` sends it as fast as the server takes it. The API key of a server
that needs one is in MAL_ADAPTER_API_KEY.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import quote, urlencode

import soundfile
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

BLOCK_S = 0.02


def recording(path: str, fast: bool) -> Iterator[bytes]:
    """The blocks of a sound file, 16-bit PCM, each when it was spoken."""
    with soundfile.SoundFile(path) as sound:
        began = time.monotonic()
        for number, block in enumerate(sound.blocks(round(BLOCK_S * sound.samplerate), dtype="int16"), start=1):
            yield block.astype("<i2").tobytes()
            time.sleep(0.0 if fast else max(0.0, began + number * BLOCK_S - time.monotonic()))


def standard_input(rate: int) -> Iterator[bytes]:
    """What another program writes, 16-bit PCM, little endian, one channel."""
    while block := sys.stdin.buffer.read1(round(2 * BLOCK_S * rate)):
        yield block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sound", help="a WAV or FLAC file, or - for standard input at 16 kHz")
    parser.add_argument("--url", default="ws://localhost:8000", help="(default: %(default)s)")
    parser.add_argument("--session", default=f"call {time.time()}", help="an existing one is continued")
    parser.add_argument("--channels", help="the speaker of each channel, such as customer,agent")
    parser.add_argument("--fast", action="store_true", help="don't wait until the recording has been spoken")
    options = parser.parse_args()

    if options.sound == "-":
        rate, count, blocks = 16_000, 1, standard_input(16_000)
    else:
        info = soundfile.info(options.sound)
        rate, count, blocks = info.samplerate, info.channels, recording(options.sound, options.fast)
    query = urlencode({"encoding": "pcm16", "sampling_rate": rate, "channels": options.channels or count})
    key = os.environ.get("MAL_ADAPTER_API_KEY")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    url = f"{options.url}/sessions/{quote(options.session, safe='')}/stream?{query}"
    with connect(url, additional_headers=headers, compression=None) as socket:

        def send() -> None:
            try:
                for block in blocks:
                    socket.send(block)
                socket.send(json.dumps({"type": "finish"}))
            except ConnectionClosed:
                pass  # the server says why

        threading.Thread(target=send, daemon=True).start()
        for text in socket:
            message = json.loads(text)
            if message["type"] == "turn":
                emotion, span = message["emotion"], f"{message['start_s']:7.2f} – {message['end_s']:.2f}"
                answer = f"{emotion:10} {message['probabilities'][emotion]:.2f}"
                print(f"{span}  {message['speaker']:10} {answer}  after {message['delay_s']:.2f} s", flush=True)
            elif message["type"] == "error":
                print(f"{message['error']['type']}: {message['error']['detail']}", file=sys.stderr)
            elif message["type"] == "end":
                print(f"{message['turns']} turns in {message['audio_s']:.1f} s ({message['reason']})")


if __name__ == "__main__":
    main()
