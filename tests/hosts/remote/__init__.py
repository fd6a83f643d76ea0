"""Tiny hosts of remote code: arguments, merge and way of generating are those of the checkpoint's own code."""

from tests.hosts.remote.base import RemoteHost
from tests.hosts.remote.desta25 import DESTA25
from tests.hosts.remote.kimi_audio import KIMI_AUDIO
from tests.hosts.remote.salmonn import SALMONN_HOST
from tests.hosts.remote.step_audio_2 import STEP_AUDIO_2
from tests.hosts.remote.ultravox import ULTRAVOX

__all__ = ["REMOTE_HOSTS"]

REMOTE_HOSTS: dict[str, RemoteHost] = {
    "Ultravox": ULTRAVOX,
    "Kimi-Audio": KIMI_AUDIO,
    "Step-Audio 2": STEP_AUDIO_2,
    "DeSTA2.5-Audio": DESTA25,
    "SALMONN": SALMONN_HOST,
}
