"""The question is asked as it is written, with all marks of the audio, whatever a chat template makes of it."""

import copy

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_adapter.demo import ADAPTER_FOLDER, HOST_FOLDER, PROMPT
from mal_adapter.errors import ConfigError, HostError
from mal_adapter.ser.loading import load_host
from mal_adapter.ser.recognizer import EmotionRecognizer
from mal_adapter.ser.recognizer.prompt import AudioPrompt
from tests.commands import mal_adapter

AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"
QUESTION = "  How does  the Speaker\n\nfeel, 'calm' & <tired>?\n"
WAVE = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def host():
    return load_host(str(HOST_FOLDER))


@pytest.fixture
def processor(host):
    """The demo's, a real Qwen2-Audio processor, whose template a test may change."""
    return copy.copy(host[1])


def filtered(processor, jinja_filter):
    """The processor with a template that puts each text through a filter, as Gemma's does through `trim`."""
    made = copy.copy(processor)
    made.chat_template = processor.chat_template.replace("content['text'] }}", f"content['text'] {jinja_filter} }}}}")
    assert jinja_filter in made.chat_template
    return made


FILTERS = [
    "| trim", "| trim('\\n')", "| replace('\\n', ' ')", "| replace('  ', ' ')", "| lower", "| upper", "| title",
    "| escape", "| e | trim", "| tojson", "| urlencode", "| wordwrap(10)", "| striptags", ".strip()",
    ".split('\\n')[0]",
]  # fmt: skip


@pytest.mark.parametrize("jinja_filter", FILTERS)
def test_a_question_stays_as_written_in_every_template(processor, jinja_filter):
    prompt = AudioPrompt(filtered(processor, jinja_filter), QUESTION)
    before, question, after = prompt.text.partition(QUESTION)
    assert question
    assert before.count(AUDIO) == 1
    assert AUDIO not in after
    tokens = prompt([WAVE])["input_ids"][0]
    assert processor.tokenizer.decode(tokens).count(QUESTION) == 1


@settings(deadline=None)  # the first example loads the host
@given(st.text(st.characters(codec="utf-8", exclude_characters="|"), min_size=1).filter(str.strip))
def test_any_question_stays_as_written(question):
    trimming = filtered(load_host_once()[1], "| trim | lower")
    assert question in AudioPrompt(trimming, question).text


def load_host_once(loaded=[]):  # noqa: B006, the cache is the point: hypothesis takes no fixtures of a function
    if not loaded:
        loaded.append(load_host(str(HOST_FOLDER)))
    return loaded[0]


@pytest.mark.parametrize("question", ["{{ 7 * 7 }} or {% if x %}?", "{# a #}?", "\\n?", "%s {0} {audio}?", "$1 \\1?"])
def test_braces_and_backslashes_stay_as_written(processor, question):
    for changed in (processor, filtered(processor, "| trim | lower")):
        assert question in AudioPrompt(changed, question).text


def test_the_same_words_elsewhere_in_a_template_are_not_the_question(processor):
    system = "{{ '<|im_start|>system\nHow do they feel?<|im_end|>\n' }}"
    with_system = copy.copy(processor)
    with_system.chat_template = system + processor.chat_template
    text = AudioPrompt(with_system, "How do they feel?").text
    assert text.count("How do they feel?") == 2
    trimming = AudioPrompt(filtered(with_system, "| trim"), "How do they feel?\n").text
    assert trimming.endswith(f"{AUDIO}\nHow do they feel?\n<|im_end|>\n<|im_start|>assistant\n")
    forgetful = copy.copy(processor)
    forgetful.chat_template = system + processor.chat_template.replace("{{ content['text'] }}", "").replace(
        "{{ message['content'] }}", ""
    )
    with pytest.raises(HostError, match="leaves out the audio or the question"):
        AudioPrompt(forgetful, "How do they feel?")


def test_text_before_the_audio_and_a_date_in_the_template(processor):
    reordered = copy.copy(processor)
    reordered.chat_template = (
        "{{ '<|im_start|>system\n' + strftime_now('%Y-%m-%d %H:%M:%S.%f') + '<|im_end|>\n' }}"
        "{% for message in messages %}<|im_start|>user\n"
        "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] | trim }}\n"
        "{% endif %}{% endfor %}<|audio_bos|><|AUDIO|><|audio_eos|><|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    prompt = AudioPrompt(reordered, QUESTION)
    assert f"{QUESTION}\n{AUDIO}" in prompt.text

    assert prompt([WAVE])["input_ids"].equal(prompt([WAVE])["input_ids"])


def test_a_template_can_react_to_words_of_the_question(processor):
    thinking = copy.copy(processor)
    thinking.chat_template = (
        processor.chat_template + "{% if '/no_think' in messages[0]['content'][1]['text'] %}</think>{% endif %}"
    )
    assert AudioPrompt(thinking, "How? /no_think").text.endswith("</think>")
    assert not AudioPrompt(thinking, "How?").text.endswith("</think>")


def test_a_template_that_only_takes_strings_gets_all_audio_tokens(processor):
    """As Granite Speech's and Phi-4's: lists are joined to text, which raises, or printed."""
    for joined in ("'<|im_start|>user\n' + message['content'] | trim + '<|im_end|>\n'", "message['content']"):
        strings = copy.copy(processor)
        strings.chat_template = "{% for message in messages %}{{ " + joined + " }}{% endfor %}<|im_start|>assistant\n"
        text = AudioPrompt(strings, QUESTION).text
        assert f"{AUDIO}{QUESTION}" in text
        assert "{'type'" not in text


@pytest.mark.parametrize("family", ["AudioFlamingo3", "MusicFlamingo"])
def test_processors_of_other_families(processor, family):
    made = getattr(transformers, f"{family}Processor", None)
    if made is None:
        pytest.skip("this version of transformers has no such family")
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["<sound>", "<|sound_bos|>", "<|sound_eos|>"], special_tokens=True)
    template = processor.chat_template.replace(AUDIO, "<sound>")
    other = made(transformers.WhisperFeatureExtractor(), tokenizer, chat_template=template)
    prompt = AudioPrompt(filtered(other, "| trim"), QUESTION)
    assert prompt.text.count("<sound>") == 1
    decoded = tokenizer.decode(prompt([WAVE])["input_ids"][0])
    assert QUESTION in decoded
    assert decoded.count("<sound>") > 1
    with pytest.raises(ConfigError, match="<sound>"):
        AudioPrompt(other, "What is <sound>?")


def test_a_template_that_can_not_be_rendered_is_a_host_error(processor):
    for broken in ("{{ raise_exception('one user only') }}", "{{ messages[7]['content'] + 1 }}", "{% if %}"):
        made = copy.copy(processor)
        made.chat_template = broken
        with pytest.raises(HostError, match="chat template"):
            AudioPrompt(made, "How?")


MARKS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_special_token_in_a_question_is_refused_before_any_work(host, mark):
    for labels in (None, ["happy", "sad"]):
        with pytest.raises(ConfigError) as caught:
            EmotionRecognizer(*host, labels=labels, prompt=f"What is in {mark}?")
        assert mark in str(caught.value)


@pytest.mark.parametrize("question", ["", " \n", 5, "How\udce9?", ["How?"]])
def test_an_invalid_question_is_refused(host, question):
    with pytest.raises(ConfigError, match="question"):
        EmotionRecognizer(*host, prompt=question)


def test_other_words_in_brackets_are_accepted(processor):
    assert "<b>|x|</b> [AUDIO]" in AudioPrompt(processor, "<b>|x|</b> [AUDIO]?").text


def test_a_processor_of_another_model_is_refused_when_the_recognizer_is_made(host, monkeypatch):
    model, processor = host
    foreign = copy.copy(processor)
    foreign.tokenizer = copy.deepcopy(processor.tokenizer)
    foreign.audio_token = "<|other|>"
    foreign.tokenizer.add_tokens(["<|other|>"], special_tokens=True)
    foreign.chat_template = processor.chat_template.replace("<|AUDIO|>", "<|other|>")
    with pytest.raises(HostError, match="makes no inputs"):
        EmotionRecognizer(model, foreign)
    doubled = copy.copy(processor)
    doubled.chat_template = processor.chat_template.replace("<|AUDIO|>", "<|AUDIO|><|AUDIO|>")
    with pytest.raises(HostError, match="makes no inputs"):
        EmotionRecognizer(model, doubled)
    bare = copy.copy(processor)
    bare.tokenizer = None
    with pytest.raises(HostError, match="no tokenizer"):
        EmotionRecognizer(model, bare)
    monkeypatch.setattr(model.config, "audio_token_index", len(processor.tokenizer) + 1)
    with pytest.raises(HostError, match="no audio token"):
        EmotionRecognizer(model, processor)


def test_the_command_refuses_a_placeholder_in_its_prompt(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.wav", WAVE, 16_000)
    command = ["predict", tmp_path / "a.wav", "--model", HOST_FOLDER, "--adapter", ADAPTER_FOLDER, "--device", "cpu"]
    done = mal_adapter(*command, "--prompt", "How <|AUDIO|>?")
    assert done.exit_code == 2
    assert done.stderr.count("error: ") == 1
    assert "<|AUDIO|>" in done.stderr
    done = mal_adapter(*command, "--prompt", f"{PROMPT}\n", "--json")
    assert done.exit_code == 0, done.stderr
