"""Messages: what openpi's client packs comes back as it was; anything else is one specific error."""

import math

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsteer.serving.codec import KINDS, CodecError, CodecLimits, pack, unpack

QUICK = settings(max_examples=100, deadline=None)


def array(**changes: object) -> bytes:
    """An array's map, with some entries changed."""
    whole = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb(whole | {key.encode(): value for key, value in changes.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", "<>")
def test_arrays_and_scalars_come_back(kind: str, order: str) -> None:
    whole = np.arange(6).reshape(2, 3).astype(np.dtype(f"{order}{kind}"))
    for sent in (whole, whole[:, ::2], whole[:0], whole.reshape(1, 2, 3), whole[1, 1]):
        if type(sent) is np.float64:
            continue  # which is a float, and packed as one
        back = unpack(pack({"x": sent}))["x"]
        assert back.dtype == sent.dtype and back.shape == sent.shape and np.array_equal(back, sent)


def test_the_bytes_are_those_of_openpi_client() -> None:
    sent = np.array([1.0, 2.0], np.float32)
    theirs = {b"__ndarray__": True, b"data": sent.tobytes(), b"dtype": "<f4", b"shape": (2,)}
    assert pack({"x": sent}) == msgpack.packb({"x": theirs})
    scalar = {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}
    assert pack({"x": np.float32(1.5)}) == msgpack.packb({"x": scalar})


@pytest.mark.parametrize(
    "sent",
    [np.array([object()]), np.array(["text"]), np.zeros(2, "V4"), np.zeros(2, complex), np.longdouble(1)],
)
def test_other_dtypes_are_not_packed(sent: object) -> None:
    with pytest.raises(ValueError, match="expected an array of"):
        pack({"x": sent})
    with pytest.raises(TypeError, match="got object"):
        pack({"x": object()})


@pytest.mark.parametrize(
    "message, match",
    [
        (array(dtype="|O"), "dtype"),
        (array(dtype="(2,)<f4"), "dtype"),
        (array(dtype="<f4,<f4"), "dtype"),
        (array(dtype="<U2"), "dtype"),
        (array(dtype=b"<f4"), "dtype"),
        (array(dtype=""), "dtype"),
        (array(shape=[3]), "expected 12 bytes for shape .3. of <f4, got 8"),
        (array(shape=[-2]), "whole numbers"),
        (array(shape=[True, 2]), "whole numbers"),
        (array(shape=[2.0]), "whole numbers"),
        (array(shape=[2**40] * 8), "bytes for shape"),
        (array(shape=[1] * 9), "at most 8 axes"),
        (array(shape=2), "shape of at most"),
        (array(data="12345678"), "expected its bytes"),
        (array(more=1), "keys"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}), "expected a number"),
        (msgpack.packb({b"__npgeneric__": True, b"data": math.nan, b"dtype": "<i4"}), "expected a number"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 1}), "keys"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "extensions"),
        (msgpack.packb(msgpack.Timestamp(1)), "Timestamp"),
        (b"\xc1", "msgpack as openpi-client packs it"),
        (b"", "msgpack"),
        (msgpack.packb(1) * 2, "msgpack"),
        (b"\xa2\xff\xff", "msgpack"),
        (b"\x91" * 100_000, "msgpack"),
        (b"\x91" * 500 + b"\x01", "8 levels"),
        (msgpack.packb({1: 2}), "msgpack"),
        (b"\xdd\xff\xff\xff\xff", "msgpack"),
    ],
)
def test_what_is_no_message(message: bytes, match: str) -> None:
    with pytest.raises(CodecError, match=match):
        unpack(message)


def test_limits() -> None:
    tight = CodecLimits(bytes=100, items=5, depth=2)
    assert unpack(pack([[1, 2]]), tight) == [[1, 2]]
    with pytest.raises(CodecError, match="at most 100 bytes"):
        unpack(bytes(101), tight)
    with pytest.raises(CodecError, match="at most 5 entries"):
        unpack(pack([[1, 2, 3], [4]]), tight)
    with pytest.raises(CodecError, match="at most 2 levels"):
        unpack(pack([[[1]]]), tight)
    with pytest.raises(CodecError, match="bytes for shape"):  # before anything of that size is made
        unpack(array(shape=[2**30, 2**9]))


def test_errors_show_a_printable_line() -> None:
    with pytest.raises(CodecError) as caught:
        unpack(array(dtype="\n\x1b" * 1000))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_that_error(data: bytes) -> None:
    try:
        unpack(data)
    except CodecError:
        pass


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.binary(), inner, max_size=4),
    max_leaves=20,
)
HOSTILE = st.dictionaries(
    st.sampled_from([b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"]),
    TREES | st.sampled_from(["<f4", "|u1", "<i8", "|O"]) | st.lists(st.integers(-1, 4), max_size=3),
)


@QUICK
@given(TREES | HOSTILE | st.lists(HOSTILE, max_size=3))
def test_any_tree_comes_back_or_is_that_error(tree: object) -> None:
    try:
        back = unpack(msgpack.packb(tree))
    except CodecError:
        return
    assert msgpack.packb(back, default=lambda a: a.tolist()) is not None
