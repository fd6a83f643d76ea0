"""Label sets: lookup, merges and their errors. The scoring is tested with the recogniser."""

import pytest

from mal_adapter.errors import LabelError
from mal_adapter.ser.labels import DEMO, EMORYNLP, IEMOCAP_4, IEMOCAP_6, M3ED, MELD, LabelSet
from mal_adapter.ser.recognizer.prompt import choose_task
from mal_adapter.ser.recognizer.scoring import LabelScorer


def test_lookup_ignores_case_and_surrounding_space():
    assert MELD.lookup(" JOY\n") == "joy"
    assert MELD.index("Anger") == 6
    assert "nEuTrAl" in DEMO
    assert "bored" not in DEMO


def test_merges_differ_between_the_label_sets_of_one_corpus():
    assert IEMOCAP_4.lookup("exc") == IEMOCAP_4.lookup("hap") == "happy"
    assert (IEMOCAP_6.lookup("exc"), IEMOCAP_6.lookup("hap")) == ("excited", "happy")
    with pytest.raises(LabelError, match="unknown label 'fru'; the labels are neutral, happy, angry, sad"):
        IEMOCAP_4.lookup("fru")


def test_sizes():
    assert [len(labels) for labels in (DEMO, MELD, IEMOCAP_4, IEMOCAP_6, EMORYNLP, M3ED)] == [4, 7, 4, 6, 7, 7]


def test_a_label_set_is_a_value():
    assert LabelSet(["a", "b"]) == LabelSet(("a", "b"))
    assert hash(LabelSet(("a", "b"), {"c": "b"})) == hash(LabelSet(("a", "b"), {"c": "b"}))


@pytest.mark.parametrize(
    ("names", "aliases", "message"),
    [
        (("only",), {}, "at least two names"),
        ("abc", {}, "single string"),
        (("a", ""), {}, "non-empty string"),
        (("a", "A "), {}, "same label"),
        (("a", "b"), {"x": "c"}, "leads to 'c'; expected one of a, b"),
        (("a", "b"), {"A": "b"}, "is a name of 'a' already"),
        (("a", "b"), {"x": "a", "X": "b"}, "is a name of 'a' already"),
    ],
)
def test_bad_label_sets_say_what_is_wrong(names, aliases, message):
    with pytest.raises(LabelError, match=message):
        LabelSet(names, aliases)


def test_a_single_string_is_not_a_list_of_labels():
    with pytest.raises(LabelError, match="single string"):
        choose_task(None, "sad")


def test_labels_that_the_host_can_not_distinguish(processor):
    tokenizer = processor.tokenizer
    with pytest.raises(LabelError, match="end-of-sequence"):
        LabelScorer(tokenizer, LabelSet(("sad", "sadness")), "", end_ids=[])

    def lowercased(text, add_special_tokens):
        return tokenizer(text.lower(), add_special_tokens=add_special_tokens)

    lowercased.unk_token_id = None
    labels = LabelSet(("straße", "STRAẞE x"))
    assert LabelScorer(lowercased, labels, "", end_ids=[1]).token_ids
    constant = type("Tokenizer", (), {"unk_token_id": 7, "__call__": lambda *_, **__: {"input_ids": [7]}})()
    with pytest.raises(LabelError, match="no tokens for the label 'sad'"):
        LabelScorer(constant, LabelSet(("sad", "glad")), "", end_ids=[])
    constant.unk_token_id = None
    constant.__class__.__call__ = lambda _, text, **__: {"input_ids": [9] if text else []}
    with pytest.raises(LabelError, match="the same tokens"):
        LabelScorer(constant, LabelSet(("sad", "glad")), "", end_ids=[])
