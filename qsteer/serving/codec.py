"""Messages of the openpi protocol: msgpack with numpy's arrays as maps, read with limits.

An array is ``{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [...]}`` and a scalar
``{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}``, as ``openpi_client.msgpack_numpy`` writes
them. Nothing in a message names code, and nothing is unpickled.
"""

import math
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

KINDS = {
    "b1": np.bool_,
    **{f"{kind}{size}": np.dtype(f"{kind}{size}").type for kind in "iu" for size in (1, 2, 4, 8)},
    **{f"f{size}": np.dtype(f"f{size}").type for size in (2, 4, 8)},
}
"""The dtypes of arrays, without byte order."""
ARRAY = {b"__ndarray__", b"data", b"dtype", b"shape"}
SCALAR = {b"__npgeneric__", b"data", b"dtype"}
AXES = 8
"""Most axes of an array."""


class CodecError(ValueError):
    """A message is not what the protocol says, or exceeds a limit."""


@dataclass(frozen=True)
class CodecLimits:
    """How large a message may be.

    Attributes:
        bytes: of the whole message.
        items: entries of all lists and maps together; an array has four and its axes.
        depth: of lists and maps in one another.
    """

    bytes: int = 16 * 2**20
    items: int = 10_000
    depth: int = 8


def pack(message: Any) -> bytes:
    """Return a message as bytes; arrays are of a dtype in :data:`KINDS`.

    Raises:
        TypeError: it holds something that msgpack does not know.
        ValueError: an array is of another dtype.
    """
    return msgpack.packb(message, default=_pack_array)


def unpack(data: bytes, limits: CodecLimits = CodecLimits()) -> Any:
    """Return the message in ``data``; its arrays are views of it, and cannot be written to.

    Cost: one pass; memory is bounded by ``limits``.

    Raises:
        CodecError: it is no message of the protocol, or exceeds a limit.
    """
    if len(data) > limits.bytes:
        raise CodecError(
            f"message: expected at most {limits.bytes} bytes, got {len(data)}; send smaller images, or raise "
            "the server's --max-message-mb"
        )
    left = limits.items

    def count(found: Any) -> Any:
        nonlocal left
        left -= len(found)
        if left < 0:
            raise CodecError(
                f"message: expected at most {limits.items} entries of lists and maps, got more; send numbers "
                "as numpy arrays"
            )
        return found

    def read_map(found: dict[Any, Any]) -> Any:
        count(found)
        if b"__ndarray__" in found:
            return _unpack_array(found)
        return _unpack_scalar(found) if b"__npgeneric__" in found else found

    try:
        message = msgpack.unpackb(
            data,
            object_hook=read_map,
            list_hook=count,
            ext_hook=_refuse_extension,
            max_array_len=limits.items,
            max_map_len=limits.items,
        )
    except CodecError:
        raise
    except (RecursionError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise CodecError(
            f"message: expected msgpack as openpi-client packs it, got something else ({short(error)}); pack "
            "it with openpi_client.msgpack_numpy"
        ) from None
    _check(message, limits.depth)
    return message


def _pack_array(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(
            f"message: expected numbers, texts, lists, maps and arrays, got {type(value).__name__}"
        )
    if value.dtype.str[1:] not in KINDS:
        raise ValueError(f"message: expected an array of {', '.join(KINDS)}, got {value.dtype}; convert it")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {
        b"__ndarray__": True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


def _unpack_array(found: dict[Any, Any]) -> np.ndarray:
    dtype = _read_dtype(found, ARRAY)
    data, shape = found[b"data"], found[b"shape"]
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > AXES:
        raise CodecError(
            f"array: expected its bytes and a shape of at most {AXES} axes, got {type(data).__name__} and "
            f"{short(shape)}; pack it with openpi_client.msgpack_numpy"
        )
    if any(type(size) is not int or not 0 <= size <= 2**40 for size in shape):
        raise CodecError(
            f"array: expected a shape of whole numbers, got {short(shape)}; send the array's own"
        )
    if (expected := math.prod(shape) * dtype.itemsize) != len(data):
        raise CodecError(
            f"array: expected {short(expected)} bytes for shape {short(shape)} of {dtype.str}, got "
            f"{len(data)}; send the array's own bytes and shape"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _unpack_scalar(found: dict[Any, Any]) -> np.generic:
    dtype, value = _read_dtype(found, SCALAR), found[b"data"]
    if not isinstance(value, bool | int | float):
        raise CodecError(f"scalar: expected a number, got {type(value).__name__}; send the scalar's own")
    try:
        return dtype.type(value)
    except (OverflowError, ValueError) as error:
        raise CodecError(
            f"scalar: expected a number that {dtype.str} holds, got {short(value)} ({short(error)})"
        ) from None


def _read_dtype(found: dict[Any, Any], keys: set[bytes]) -> np.dtype:
    """Return the dtype that a map names, after a check of its keys."""
    if found.keys() != keys:
        raise CodecError(
            f"array: expected the keys {sorted(keys)}, got {short(list(found))}; pack it with "
            "openpi_client.msgpack_numpy"
        )
    name = found[b"dtype"]
    if not isinstance(name, str) or name[:1] not in "<>|=" or name[1:] not in KINDS:
        raise CodecError(
            f"array: expected a dtype of {', '.join(KINDS)} after its byte order, got {short(name)}; "
            "convert it, texts to str"
        )
    return np.dtype(name)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise CodecError(
        f"message: expected no msgpack extensions, got one of type {code}; send numbers, texts and arrays"
    )


def _check(message: Any, depth: int) -> None:
    """Raise unless all in a message is of a known kind and no deeper than ``depth``."""
    level = [message]
    for _ in range(depth + 1):
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inside += each.values()
            elif isinstance(each, list):
                inside += each
            elif not isinstance(each, bool | int | float | str | bytes | np.ndarray | np.generic | None):
                raise CodecError(
                    f"message: expected numbers, texts, lists, maps and arrays, got {type(each).__name__}; "
                    "leave it out"
                )
        if not inside:
            return
        level = inside
    raise CodecError(f"message: expected at most {depth} levels of lists and maps, got more; send it flat")


def short(thing: Any) -> str:
    """Return what is shown of something that a client sent: printable, and no more than a line."""
    text = str(thing) if isinstance(thing, str | Exception) else repr(thing)
    return "".join(c if c.isprintable() else "?" for c in text[:80]) + "…" * (len(text) > 80)
