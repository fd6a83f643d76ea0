"""Safetensors, read with bounds on sizes; a damaged or hostile file is a `ValueError`."""

import json
import math
import struct
from collections.abc import Mapping
from io import BytesIO
from typing import BinaryIO, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mal_adapter.serialization.strict_json import parse_json
from mal_adapter.serialization.text import shown

__all__ = ["load_tensors", "read_header", "save_tensors"]

HEADER_LIMIT = 2**20  # bytes; an adapter's header has fewer than twenty entries

ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}


class TensorHeader(NamedTuple):
    """The header of a safetensors file."""

    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(file: BinaryIO, size: int) -> TensorHeader:
    """Read the header of a safetensors file of `size` bytes, up to the first tensor.

    Raises:
        ValueError: It is not a safetensors file of known dtypes, or its size is not the one in its header.
    """
    try:
        (length,) = struct.unpack("<Q", file.read(8))
    except struct.error as error:
        raise ValueError(f"its {size} bytes are too few") from error
    if length > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"its header would have {length} bytes, in a file of {size}")
    content = parse_json(file.read(length))
    if not isinstance(content, dict):
        raise ValueError("its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    dtypes, shapes, total = {}, {}, 8 + length
    for name, entry in content.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the header's entry for {name} is {shown(entry)}")
        dtype, shape = entry["dtype"], entry["shape"]
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            raise ValueError(f"{name} has dtype {shown(dtype)}, expected one of {', '.join(ITEM_SIZES)}")
        if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**48 for n in shape):
            raise ValueError(f"{name} has shape {shown(shape)}")
        dtypes[name], shapes[name] = dtype, tuple(shape)
        total += math.prod(shape) * ITEM_SIZES[dtype]
    if total != size:
        raise ValueError(f"it has {size} bytes, its header says {total}")
    return TensorHeader(dtypes, shapes, metadata)


def load_tensors(data: bytes) -> tuple[TensorHeader, dict[str, Tensor]]:
    """Read the header and the tensors from a safetensors file's bytes, on the CPU.

    Raises:
        ValueError: As for `read_header`, or the tensors overlap, leave gaps or are not finite.
    """
    header = read_header(BytesIO(data), len(data))
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return header, tensors


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file. Equal tensors and metadata give equal bytes."""
    data = save(dict(tensors), metadata=dict(metadata))
    # safetensors 0.8 writes metadata in random order.
    end = 8 + int(struct.unpack("<Q", data[:8])[0])
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + data[end:])
