"""Conversational speech emotion recognition on a host with a memory: recognition, training, evaluation, corpora.

from mal_adapter.ser import EmotionRecognizer, evaluate, read_manifest, train_memory, write_report
"""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.ser.corpora import read_corpus
    from mal_adapter.ser.corpora.corpus import Corpus
    from mal_adapter.ser.dialogue import Dialogue, Utterance, read_manifest, write_manifest
    from mal_adapter.ser.evaluation.evaluation import Evaluation, evaluate, read_evaluation
    from mal_adapter.ser.evaluation.metrics import compare, score
    from mal_adapter.ser.evaluation.report import write_report
    from mal_adapter.ser.labels import LabelSet
    from mal_adapter.ser.loading import load_host
    from mal_adapter.ser.recognizer.audio import load_waveform
    from mal_adapter.ser.recognizer.recognizer import EmotionRecognizer
    from mal_adapter.ser.recognizer.results import Failure, Prediction
    from mal_adapter.ser.training.config import TrainingConfig
    from mal_adapter.ser.training.train import train_memory

__all__ = [
    "Corpus",
    "Dialogue",
    "EmotionRecognizer",
    "Evaluation",
    "Failure",
    "LabelSet",
    "Prediction",
    "TrainingConfig",
    "Utterance",
    "compare",
    "evaluate",
    "load_host",
    "load_waveform",
    "read_corpus",
    "read_evaluation",
    "read_manifest",
    "score",
    "train_memory",
    "write_manifest",
    "write_report",
]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__,
        {
            "Corpus": "ser.corpora.corpus",
            "Dialogue": "ser.dialogue",
            "EmotionRecognizer": "ser.recognizer.recognizer",
            "Evaluation": "ser.evaluation.evaluation",
            "Failure": "ser.recognizer.results",
            "LabelSet": "ser.labels",
            "Prediction": "ser.recognizer.results",
            "TrainingConfig": "ser.training.config",
            "Utterance": "ser.dialogue",
            "compare": "ser.evaluation.metrics",
            "evaluate": "ser.evaluation.evaluation",
            "load_host": "ser.loading",
            "load_waveform": "ser.recognizer.audio",
            "read_corpus": "ser.corpora",
            "read_evaluation": "ser.evaluation.evaluation",
            "read_manifest": "ser.dialogue",
            "score": "ser.evaluation.metrics",
            "train_memory": "ser.training.train",
            "write_manifest": "ser.dialogue",
            "write_report": "ser.evaluation.report",
        },
        extra="train",
    )
