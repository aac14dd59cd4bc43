"""Block-wise quantisation against a plain loop, and what it has to keep."""

import pytest
import torch

from pointewa.compression.quantize import BITS, dequantize, dequantize_part, pack_mask, quantize, unpack_mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def looped(x, bits, block):
    """Value by value."""
    flat, out = x.flatten().tolist(), []
    for start in range(0, len(flat), block):
        values = flat[start : start + block]
        values += [0.0] * (block - len(values))
        most = 2**bits - 1 if min(values) >= 0 else 2 ** (bits - 1) - 1
        scale = max(map(abs, values)) / most
        out += [round(value / scale) * scale if scale else 0.0 for value in values]
    return torch.tensor(out[: len(flat)]).view(x.shape)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [8, 32, 128])
def test_it_is_what_a_loop_gives(bits, block):
    x = torch.randn(7, 45, generator=generator())
    x[2:4] = x[2:4].relu()
    x[5] = 0
    again = dequantize(quantize(x, bits, block))
    assert again.shape == x.shape
    assert torch.allclose(again, looped(x, bits, block), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_is_half_a_step_at_most_and_zero_stays_zero(bits):
    x = torch.randn(64, 128, generator=generator()) * torch.logspace(-20, 20, 64).unsqueeze(1)
    x[:, ::7] = 0
    error = (dequantize(quantize(x, bits)) - x).abs()
    step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert (error[:, ::7] == 0).all()
    positive = x.abs()
    error = (dequantize(quantize(positive, bits)) - positive).abs()
    assert (error <= positive.amax(1, keepdim=True) / (2**bits - 1) / 2 * (1 + 1e-5)).all()  # no code for signs


@pytest.mark.parametrize(
    ("bits", "kept"), [(2, 2 * 96 / 8 + 4), (4, 4 * 96 / 8 + 4), (8, 96 + 4), (16, 192), (32, 384)]
)
def test_bytes(bits, kept):
    assert quantize(torch.randn(10, 96), bits, block=96).nbytes == 10 * kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_types_come_back(dtype, bits):
    x = torch.randn(3, 50, generator=generator()).to(dtype)
    again = dequantize(quantize(x, bits))
    assert again.dtype == dtype
    if bits == 32:
        assert torch.equal(again, x)
    if bits == 16:
        assert torch.equal(again, x.bfloat16().to(dtype))


def test_rounding_at_random_is_right_on_average_and_follows_its_generator():
    x = torch.rand(4, 128, generator=generator()) * 2 - 1
    one = generator(5)
    draws = torch.stack([dequantize(quantize(x, 2, generator=one)) for _ in range(4000)])
    deviation = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - x).abs() < 5 * deviation + 1e-6).all()
    assert torch.equal(dequantize(quantize(x, 2, generator=generator(5))), draws[0])
    exact = torch.tensor([[-1.0, 1.0, 0.0] + [1.0] * 125])
    assert torch.equal(dequantize(quantize(exact, 2, generator=one)), exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_non_finite_value_comes_back_non_finite(bad):
    x = torch.ones(2, 128)
    x[1, 3] = bad
    again = dequantize(quantize(x, 4))
    assert torch.equal(again[0], x[0])
    assert not again[1].isfinite().any()


def test_masks_take_a_bit_a_value():
    mask = torch.rand(13, 11, generator=generator()) > 0.5
    packed = pack_mask(mask)
    assert packed.nbytes == 2 * 128 / 8  # of 143 values, in two blocks
    assert torch.equal(unpack_mask(packed, 0, 143), mask.flatten())
    assert torch.equal(unpack_mask(packed, 17, 131), mask.flatten()[17:131])


@pytest.mark.parametrize("bits", BITS)
def test_a_part_is_that_of_the_whole(bits, monkeypatch):
    q = quantize(torch.randn(7, 45, generator=generator()), bits, block=32)
    whole = dequantize(q).flatten()
    for start, stop in [(0, 315), (0, 1), (31, 33), (32, 64), (100, 315), (314, 315)]:
        assert torch.equal(dequantize_part(q, start, stop), whole[start:stop])
    monkeypatch.setattr("pointewa.compression.quantize.at_once", lambda device: 64)
    assert torch.equal(dequantize_part(q, 33, 290), whole[33:290])


def test_what_does_not_go_is_refused():
    with pytest.raises(ValueError, match="bits: expected one of 2, 4, 8, 16, 32, found 3"):
        quantize(torch.ones(8), 3)
    with pytest.raises(ValueError, match="block: expected a multiple of 8, found 12"):
        quantize(torch.ones(8), 4, block=12)
