import torch

from extend.ring.lse import merge_partial


def softmax_attention(scores, values):
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def test_parts_merge_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(2, 3, 7, 12, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 3, 12, 4, generator=generator, dtype=torch.float64)
    out, lse = softmax_attention(scores[..., :5], values[:, :, :5])
    merge_partial(out, lse, *softmax_attention(scores[..., 5:], values[:, :, 5:]))
    expected_out, expected_lse = softmax_attention(scores, values)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_a_slice_is_merged_in_place():
    out, lse = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4)
    merge_partial(out[:, :, 2:], lse[:, :, 2:], torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2))
    half = torch.tensor([0.0, 0.0, 0.5, 0.5])
    torch.testing.assert_close(out, half[None, None, :, None].expand(1, 1, 4, 2))
    torch.testing.assert_close(lse, (2 * half[None, None]) * torch.tensor(2.0).log())


def test_huge_and_empty_blocks_do_not_overflow():
    out, lse = torch.zeros(1, 1, 3, 1), torch.tensor([[[-1e4, 1e4, 3.0]]])
    block_lse = torch.tensor([[[1e4, -1e4, float("-inf")]]])
    merge_partial(out, lse, torch.ones(1, 1, 3, 1), block_lse)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([1e4, 1e4, 3.0]))
