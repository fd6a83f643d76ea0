"""What an audio language model looks like: its layers, its width and where its audio is."""

from typing import TYPE_CHECKING

from mal_adapter.lazy import lazy_names

if TYPE_CHECKING:
    from mal_adapter.hosts.audio_mask import bind_call, find_audio_mask, find_features, is_cached
    from mal_adapter.hosts.host import Host, detect_host
    from mal_adapter.hosts.registry import register_host
    from mal_adapter.hosts.spec import HostSpec

__all__ = [
    "Host",
    "HostSpec",
    "bind_call",
    "detect_host",
    "find_audio_mask",
    "find_features",
    "is_cached",
    "register_host",
]

if not TYPE_CHECKING:  # a checker that saw this function would take every misspelt name for an Any
    __getattr__ = lazy_names(
        __name__,
        {
            "Host": "hosts.host",
            "HostSpec": "hosts.spec",
            "bind_call": "hosts.audio_mask",
            "detect_host": "hosts.host",
            "find_audio_mask": "hosts.audio_mask",
            "find_features": "hosts.audio_mask",
            "is_cached": "hosts.audio_mask",
            "register_host": "hosts.registry",
        },
    )
