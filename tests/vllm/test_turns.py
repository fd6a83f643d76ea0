"""What a request says about its dialogue, and what is refused."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mal_adapter.errors import SessionError
from mal_adapter.stores.folder_files import file_name
from mal_adapter.vllm.admission import Admission
from mal_adapter.vllm.turns import LONGEST_ID, SessionTurn, session_turn
from tests.vllm.fakes import SamplingParams


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}, {"session_id": None}])
def test_a_request_without_a_session_passes(extra):
    assert session_turn(SamplingParams(extra, n=3)) is None


def test_a_session_and_its_turn():
    assert session_turn(SamplingParams({"session_id": "call-42"})) == SessionTurn("call-42", None)
    assert session_turn(SamplingParams({"session_id": "é/室", "turn": 7})) == SessionTurn("é/室", 7)


@pytest.mark.parametrize(
    "extra",
    [
        {"session_id": ""},
        {"session_id": 42},
        {"session_id": ["a"]},
        {"session_id": {"a": 1}},
        {"session_id": False},
        {"session_id": "a" * (LONGEST_ID + 1)},
        {"session_id": "a\0b"},
        {"session_id": "a\nb"},
        {"session_id": "\ud800"},
        {"session_id": "a", "turn": -1},
        {"session_id": "a", "turn": 2**31},
        {"session_id": "a", "turn": 1.0},
        {"session_id": "a", "turn": "1"},
        {"session_id": "a", "turn": True},
        {"session_id": "a", "turn": [1]},
        {"turn": 1},
    ],
    ids=str,
)
def test_a_bad_session_or_turn_is_refused_at_admission(extra):
    with pytest.raises(SessionError):
        session_turn(SamplingParams(extra))
    with pytest.raises(ValueError, match=r"session|turn"):  # what vLLM answers with status 400
        Admission.validate_params(SamplingParams(extra))


def test_several_answers_would_write_several_times():
    with pytest.raises(ValueError, match="n=1"):
        Admission.validate_params(SamplingParams({"session_id": "a"}, n=2))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text waits for Unicode's tables
@given(st.fixed_dictionaries({}, optional={"session_id": VALUES, "turn": VALUES}), st.integers(-3, 5))
def test_whatever_is_sent_is_understood_or_refused_with_a_short_message(extra, n):
    message = ""
    try:
        understood = session_turn(SamplingParams(extra, n))
    except SessionError as error:
        message, understood = str(error), None
    assert len(message) < 400
    assert understood is None or file_name(understood.session_id)  # every store takes it
