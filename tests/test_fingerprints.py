"""Fingerprints depend on every byte, on the order and on the prefix, and on nothing else."""

from hashlib import sha256

import torch

from qsteer.fingerprints import fingerprint, tensor_bytes


def test_a_fingerprint_is_the_hash_of_prefix_and_bytes() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.tensor([True, False])
    expected = sha256(b"data" + a.numpy().tobytes() + b.numpy().tobytes()).hexdigest()[:16]
    assert fingerprint([a, b], "data") == expected
    assert fingerprint([a.T.contiguous().T, b], "data") == expected
    others = fingerprint([b, a], "data"), fingerprint([a, b]), fingerprint([a + 1, b], "data")
    assert len({expected, *others}) == 4


def test_every_dtype_has_bytes() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool):
        tensor = torch.ones(2, 3, dtype=dtype, requires_grad=dtype.is_floating_point)
        assert len(tensor_bytes(tensor)) == 6 * tensor.element_size()
    assert len(tensor_bytes(torch.tensor(1.0))) == 4
