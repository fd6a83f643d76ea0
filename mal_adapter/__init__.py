"""A neural memory per dialogue for any audio language model loaded with transformers."""

from mal_adapter.adapter import MemoryAdapter
from mal_adapter.attach import AttachedMemory, attach_memory
from mal_adapter.config import MemoryConfig
from mal_adapter.hosts import HostSpec
from mal_adapter.state import MemoryState

__all__ = ["AttachedMemory", "HostSpec", "MemoryAdapter", "MemoryConfig", "MemoryState", "attach_memory"]
