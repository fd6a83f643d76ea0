"""Damaged and hostile JSON and safetensors files."""

import io
import json
import pickle
import struct
import zipfile

__all__ = ["hostile_json", "hostile_tensors", "split"]

NUMBERS = [
    0,
    -1,
    1,
    2**20,
    2**31,
    2**63,
    10**9,
    10**30,
    1.5,
    True,
    None,
    "16",
    [],
    {},
    [1],
    1e308,
    "nan",
    "\0",
    "é" * 99,
]
TOKENS = ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "[" * 5000, '{"a":' * 5000, '"\\ud800"', "-0", "\ufeff1"]
KINDS = [
    "truncated",
    "bit",
    "bits",
    "length",
    "offsets",
    "dtype",
    "shape",
    "extra",
    "missing",
    "renamed",
    "nan",
    "pickle",
]
KINDS += ["zip", "header", "padding", "appended", "metadata", "swapped", "empty", "noise"]


class Bomb:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def split(data):
    """The header as JSON values and the tensors' bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def hostile_json(rng, content):
    """Bytes of JSON like `content`, with one place changed, and what was done."""
    content = json.loads(json.dumps(content))
    places = [(content, key) for key in content]
    for value in list(content.values()):
        if isinstance(value, dict):
            places += [(value, key) for key in value]
        if isinstance(value, list):
            places += [(entry, key) for entry in value if isinstance(entry, dict) for key in entry]
    where, key = rng.choice(places)
    kind = rng.choice(["value", "token", "missing", "unknown", "twice", "space", "encoding", "other"])
    if kind == "value":
        where[key] = rng.choice(NUMBERS)
    elif kind == "missing":
        del where[key]
    elif kind == "unknown":
        where["unknown"] = rng.choice(NUMBERS)
    elif kind == "token":
        where[key] = "@token@"
    text = json.dumps(content, indent=rng.choice([None, 1, 8]) if kind == "space" else None)
    if kind == "token":
        text = text.replace('"@token@"', rng.choice(TOKENS))
    elif kind == "twice":
        text = text.replace("{", '{"memory": {}, ' if rng.random() < 0.5 else '{"dtype": "F32", "dtype": "F16", ', 1)
    elif kind == "other":
        text = rng.choice(["", "[]", "null", "3", '"x"', "{}", "{" * 9, text + "}", text[:-1], "\0", text + "\0"])
    if kind == "encoding":
        return rng.choice(
            [text.encode("utf-16"), text.encode("utf-8-sig"), b"\xff" + text.encode(), b"\x80\x04."]
        ), kind
    return text.encode(errors="surrogatepass"), kind


def hostile_tensors(rng, data, bomb):
    """Bytes like the safetensors file `data`, with one thing changed, and what was done."""
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.choice(KINDS)
    if kind == "truncated":
        return data[: rng.randrange(len(data))], kind
    if kind in ("bit", "bits"):
        damaged = bytearray(data)
        for _ in range(1 if kind == "bit" else 20):
            # half of them in the header, which is small
            damaged[rng.randrange(len(data) if rng.random() < 0.5 else len(data) - len(body))] ^= 1 << rng.randrange(8)
        return bytes(damaged), kind
    if kind == "length":
        return joined(header, body, rng.choice([0, 1, 7, 2**20 + 1, 10**8, 2**31, 2**63, 2**64 - 1])), kind
    if kind == "offsets":
        begin, end = header[name]["data_offsets"]
        choices = [
            [0, end - begin],
            [begin + 4, end + 4],
            [end, begin],
            [-4, end],
            [begin, 2**63],
            [begin],
            [0.5, 1],
            None,
        ]
        header[name]["data_offsets"] = rng.choice([*choices, [begin, end, end], [begin, begin], "0", [True, end]])
    elif kind == "dtype":
        dtypes = [
            "F16",
            "BF16",
            "F64",
            "I64",
            "I32",
            "U8",
            "BOOL",
            "F8_E4M3",
            "F8_E8M0",
            "F4",
            "C64",
            "",
            "float32",
            None,
        ]
        header[name]["dtype"] = rng.choice([*dtypes, [], {}, 4])
    elif kind == "shape":
        shape = header[name]["shape"]
        choices = [
            [],
            [*shape, 1],
            shape[::-1],
            [0, *shape],
            [-1, *shape],
            [2**63],
            [2**62, 2**62],
            [0, 2**63],
            [1] * 3000,
        ]
        header[name]["shape"] = rng.choice([*choices, None, "4", [1.0], [True, *shape], [10**40], [10**9, 10**9]])
    elif kind == "extra":
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += b"\0" * 4
    elif kind == "missing":
        del header[name]
    elif kind == "renamed":
        header[rng.choice(["", "weights.7", "weights.-1", "weights", "../x", "\0", "weights.0.0", "x" * 9999])] = (
            header.pop(name)
        )
    elif kind == "nan":
        name = rng.choice([name for name in names if header[name]["dtype"] == "F32"])
        begin, end = header[name]["data_offsets"]
        at = rng.randrange(begin, end, 4)
        body = body[:at] + struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf")])) + body[at + 4 :]
    elif kind == "pickle":
        return pickle.dumps({"weights.0": Bomb(bomb)}, protocol=rng.randrange(6)), kind
    elif kind == "zip":
        with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb(bomb)))
        return packed.getvalue(), kind
    elif kind == "header":
        text, what = hostile_json(rng, header)
        return joined(text, body), f"header {what}"
    elif kind == "padding":
        return joined(json.dumps(header).encode() + b" " * rng.choice([1, 8, 2**20]), body), kind
    elif kind == "appended":
        return data + rng.randbytes(rng.choice([1, 4, 10_000])), kind
    elif kind == "metadata":
        key = rng.choice(["kind", "format_version", "fingerprint", "unknown", "format"])
        header.setdefault("__metadata__", {})[key] = rng.choice(["", "2", "99", "one", 1, None, [], "\0"])
        if rng.random() < 0.2:
            header["__metadata__"] = rng.choice([None, [], "x", {}, 3])
    elif kind == "swapped":
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == "empty":
        return rng.choice([b"", b"\0" * 8, b"\0" * 7, joined({}, b""), joined({}, body), joined(b"{}", b"x")]), kind
    elif kind == "noise":
        return rng.randbytes(rng.randrange(2000)), kind
    return joined(header, body), kind
