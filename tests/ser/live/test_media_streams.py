"""Media streams of telephony providers: what is announced, the samples of both tracks, lost and repeated chunks."""

import json
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError, StreamError
from mal_adapter.ser.live.codecs import Decoder, Samples
from mal_adapter.ser.live.media_streams import MediaStream
from tests.ser.live import messages

RNG = np.random.default_rng(3)
INBOUND, OUTBOUND = (RNG.integers(0, 256, 8000, dtype=np.uint8).tobytes() for _ in range(2))
BOTH = {"inbound": INBOUND, "outbound": OUTBOUND}


def received(stream: MediaStream, sent: Iterable[str | bytes]) -> Samples:
    parts = [part for message in sent if (part := stream.feed(message)) is not None]
    return np.concatenate([*parts, *([] if (rest := stream.finish()) is None else [rest])])


def side_by_side(*tracks: bytes, encoding: str = "mulaw") -> Samples:
    return np.concatenate([Decoder(encoding)(data) for data in tracks], axis=1)


def test_twilio_sends_both_tracks_and_parameters():
    stream = MediaStream("twilio")
    sent = messages.twilio(BOTH, {"session": "call-42", "speaker": "Ann"})
    assert np.array_equal(received(stream, sent), side_by_side(INBOUND, OUTBOUND))
    assert stream.ended
    assert stream.start is not None
    assert (stream.start.call_id, stream.start.encoding, stream.start.sampling_rate) == ("CA1", "mulaw", 8000)
    assert stream.start.parameters == {"session": "call-42", "speaker": "Ann"}


def test_the_channels_have_one_order_whatever_the_announcement():
    stream = MediaStream("twilio")
    sent = messages.twilio({"outbound": OUTBOUND, "inbound": INBOUND})
    assert np.array_equal(received(stream, sent), side_by_side(INBOUND, OUTBOUND))
    assert stream.start is not None
    assert stream.start.tracks == ("inbound", "outbound")


@pytest.mark.parametrize(("name", "encoding"), [("PCMU", "mulaw"), ("PCMA", "alaw")])
def test_telnyx_sends_the_tracks_that_were_asked_for(name: str, encoding: str):
    stream = MediaStream("telnyx", tracks=["inbound", "outbound"])
    sent = messages.telnyx(BOTH, name)
    assert np.array_equal(received(stream, sent), side_by_side(INBOUND, OUTBOUND, encoding=encoding))
    assert stream.ended
    alone = MediaStream("telnyx")
    assert np.array_equal(
        received(alone, messages.telnyx({"inbound": INBOUND}, name)), side_by_side(INBOUND, encoding=encoding)
    )
    with pytest.raises(StreamError, match="'outbound'"):
        received(MediaStream("telnyx"), messages.telnyx(BOTH))


def test_plivo_has_unix_times_and_headers_as_text():
    stream = MediaStream("plivo")
    sent = messages.plivo(BOTH, "session=call-42;name=Ann")
    assert np.array_equal(received(stream, sent), side_by_side(INBOUND, OUTBOUND))
    assert stream.start is not None
    assert stream.start.parameters == {"session": "call-42", "name": "Ann"}


@pytest.mark.parametrize("rate", [8000, 16_000])
def test_vonage_sends_binary_messages(rate: int):
    stream = MediaStream("vonage")
    sent = messages.vonage(INBOUND, rate, {"uuid": "call-42"})
    assert np.array_equal(received(stream, sent), side_by_side(INBOUND, encoding="pcm16"))
    assert stream.start is not None
    assert (stream.start.sampling_rate, stream.start.call_id) == (rate, "call-42")


@given(st.data())
def test_lost_repeated_and_early_chunks_keep_every_sample_in_its_place(data: st.DataObject):
    """Chunks are lost, repeated and overtaken by up to three others; the times stay those of the call."""
    count = 30
    names = data.draw(st.sampled_from([("inbound",), ("inbound", "outbound")]))
    tracks = {name: BOTH[name][: count * messages.CHUNK] for name in names}
    begin, *media = list(messages.twilio(tracks))[1:-3]
    lost = data.draw(st.sets(st.integers(2 * len(names), len(media) - 1), max_size=8))
    order = sorted(range(len(media)), key=lambda n: n + data.draw(st.integers(0, 3)) * (n >= 2 * len(names)))
    repeated = data.draw(st.sets(st.integers(0, len(media) - 1), max_size=5))
    sent = [media[n] for n in order if n not in lost for _ in range(2 if n in repeated else 1)]
    expected = side_by_side(*tracks.values())
    for number in lost:
        start = json.loads(media[number])["media"]
        place = (int(start["chunk"]) - 1) * messages.CHUNK
        expected[place : place + messages.CHUNK, names.index(start["track"])] = 0
    found = received(MediaStream("twilio"), [begin, *sent])
    # Chunks that are lost at the end are not known to be missing.
    assert len(found) <= len(expected)
    assert np.array_equal(found, expected[: len(found)])
    assert not np.any(expected[len(found) :])


def test_a_track_that_begins_later_or_pauses_keeps_its_times():
    chunk = messages.CHUNK
    stream = MediaStream("twilio")
    sent = list(messages.twilio(BOTH))
    begin, media = sent[1], [message for message in sent if '"media"' in message and '"payload"' in message]
    kept = [
        one for one in media if not ('"outbound"' in one and int(json.loads(one)["media"]["chunk"]) in range(1, 21))
    ]
    found = received(stream, [begin, *kept])
    expected = side_by_side(INBOUND, OUTBOUND)
    expected[: 20 * chunk, 1] = 0
    assert np.array_equal(found, expected)


def test_what_waits_is_bounded():
    """A track that never comes holds the other one up by a fifth of a second, and a lost chunk by a tenth."""
    stream = MediaStream("twilio")
    sent = list(messages.twilio(BOTH))
    got = 0
    stream.feed(sent[1])
    for number in range(50):
        place = number * messages.CHUNK
        part = stream.feed(messages.twilio_media(number, "inbound", place, INBOUND[place : place + messages.CHUNK]))
        assert part is not None
        got += len(part)
        assert place + messages.CHUNK - got <= 0.2 * 8000
    alone = MediaStream("twilio")
    alone.feed(next(message for message in messages.twilio({"inbound": INBOUND}) if '"start"' in message))
    got = 0
    for number in range(50):
        if number != 20:
            place = number * messages.CHUNK
            part = alone.feed(messages.twilio_media(number, "inbound", place, INBOUND[place : place + messages.CHUNK]))
            got += 0 if part is None else len(part)
            assert place + messages.CHUNK - got <= (0.1 + 0.04) * 8000
    assert got == 50 * messages.CHUNK
    for number in range(52, 1_000):  # one that is lost is never waited for in vain, however little the others have
        alone.feed(messages.twilio_media(number, "inbound", number * messages.CHUNK, b""))
    assert alone._tracks is not None
    assert len(alone._tracks._tracks["inbound"]._waiting) <= 50


def broken(change: Callable[[dict[str, object]], object], number: int) -> list[str]:
    sent = list(messages.twilio({"inbound": INBOUND}))[: number + 1]
    fields = json.loads(sent[number])
    change(fields)
    return [*sent[:number], json.dumps(fields)]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (["no JSON"], "JSON"),
        (["[1]"], "'event'"),
        (["[" * 100_000], "JSON"),
        ([b"\x00"], "text messages"),
        (list(messages.twilio({"inbound": INBOUND}))[2:3], "before the message"),
        ([list(messages.twilio({"inbound": INBOUND}))[1]] * 2, "started already"),
        (broken(lambda f: f.pop("start"), 1), "'start'"),
        (broken(lambda f: f["start"].pop("callSid"), 1), "'callSid'"),
        (broken(lambda f: f["start"].update(tracks=[]), 1), "inbound, outbound or both"),
        (broken(lambda f: f["start"]["mediaFormat"].update(encoding="audio/opus"), 1), "audio/x-mulaw"),
        (broken(lambda f: f["start"]["mediaFormat"].update(sampleRate=16000), 1), "8000"),
        (broken(lambda f: f.pop("media"), 2), "media.payload"),
        (broken(lambda f: f["media"].update(payload="?"), 2), "base64"),
        (broken(lambda f: f["media"].update(track="other"), 2), "'other'"),
        (broken(lambda f: f["media"].update(chunk="-1"), 2), "media.chunk"),
        (broken(lambda f: f["media"].update(timestamp=True), 2), "media.timestamp"),
        (['{"event": "error", "payload": {"title": "bad"}}'], "bad"),
    ],
)
def test_messages_that_are_not_the_providers_are_refused(sent: list[str], message: str):
    stream = MediaStream("twilio")
    for one in sent[:-1]:
        stream.feed(one)
    with pytest.raises(StreamError, match=message):
        stream.feed(sent[-1])


def test_parameters_are_in_no_message_of_an_error():
    """They may have an API key."""
    begin = json.loads(list(messages.twilio({"inbound": INBOUND}, {"api_key": "secret"}))[1])
    for change in ({"callSid": None}, {"mediaFormat": None}, {"mediaFormat": {"encoding": "x"}}, {"tracks": None}):
        with pytest.raises(StreamError) as caught:
            MediaStream("twilio").feed(json.dumps({**begin, "start": {**begin["start"], **change}}))
        assert "secret" not in str(caught.value)


def test_other_rates_and_providers_are_refused():
    with pytest.raises(StreamError, match="audio/l16"):
        received(MediaStream("vonage"), ['{"event": "websocket:connected", "content-type": "audio/l16;rate=44100"}'])
    with pytest.raises(ConfigError, match="'skype'"):
        MediaStream("skype")
