"""Mask strategies: parsing, pasting, loops of long videos."""

import numpy as np
import pytest

from opensora_jax.common.errors import UserError
from opensora_jax.diffusion import mask_strategy as ms
from opensora_jax.diffusion.mask_strategy import Edit


def clip(frames, base=0.0):
    """Frame i holds the value base + i everywhere."""
    return (base + np.arange(frames, dtype=np.float32)).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 4), np.float32)


def values(x):
    return np.asarray(x)[..., 0, 0, 0].tolist()


def test_parsing_fills_defaults_and_names_mistakes():
    assert ms.parse("0,1,-4,-1,2,0.3;1") == [Edit(0, 1, -4, -1, 2, 0.3), Edit(1, 0, 0, 0, 1, 0.0)]
    assert ms.parse(None) == ms.parse("") == []
    with pytest.raises(UserError, match="7 fields"):
        ms.parse("0,0,0,0,1,0,0")
    with pytest.raises(UserError, match="five whole numbers"):
        ms.parse("0,a")
    with pytest.raises(UserError, match="reference 1; 1 are given"):
        ms.apply(np.zeros((1, 4, 2, 2, 4)), [[clip(1)]], ["0,1"], 0)


def test_pasting_counts_from_both_ends_and_cuts_what_does_not_fit():
    z = -np.ones((2, 6, 2, 2, 4), np.float32)
    references = [[clip(3, 10), clip(5, 20)], []]
    out, mask = ms.apply(z, references, ["0,0,-2,0,9,0.4;0,1,1,-2,1;1,0", None], 0)
    assert values(out[0]) == [11, 12, -1, -1, 21, -1] and values(out[1]) == [-1] * 6
    np.testing.assert_allclose(mask, [[0.4, 0.4, 1, 1, 0, 1], [1] * 6], rtol=1e-6)
    assert (z == -1).all() and ms.apply(z, references, [], 0)[1] is None
    aligned, mask = ms.apply(z[:, :5], [[clip(15)], []], ["0,0,8,0,5", None], 0, align=5)
    assert values(aligned[0]) == [10, 11, 12, 13, 14] and not mask[0].any()


def test_the_next_loop_takes_over_the_tail():
    generated = np.stack([clip(8, 100), clip(8, 200)])
    references, strategies = ms.take_over(generated, [None, [clip(1)]], [None, "0"], 1, 3, 0.5)
    assert strategies == ["1,0,-3,0,3,0.5", "0;1,1,-3,0,3,0.5"]
    out, mask = ms.apply(np.zeros_like(generated), references, strategies, 1)
    assert values(out[1])[:4] == [205, 206, 207, 0] and mask[1].tolist() == [0.5] * 3 + [1] * 5
    assert values(ms.apply(np.zeros_like(generated), references, strategies, 0)[0][1])[:2] == [0, 0]


def test_loops_of_1_3():
    shape = (1, 6, 2, 2, 4)
    start = lambda kind, loops, refs: ms.first_loop(kind, shape, [refs], frames=4, loops=loops)
    one, two = [clip(6, 1)], [clip(6, 1), clip(1, 50)]
    assert start(None, 1, one)[1] == ()
    for kind, loops, refs, given, expected in [
        ("i2v_head", 1, one, (0,), {0: 1}),
        ("i2v_tail", 1, one, (5,), {5: 6}),
        ("i2v_tail", 2, one, (), {}),
        ("i2v_loop", 1, one, (0, 5), {0: 1, 5: 6}),
        ("i2v_loop", 1, two, (0, 5), {0: 1, 5: 50}),
        ("i2v_loop", 2, two, (0,), {0: 1}),
        ("v2v_head", 1, one, (0, 1, 2, 3), {0: 1, 1: 2, 2: 3, 3: 4}),
    ]:
        out, frames = start(kind, loops, refs)
        assert frames == given and values(out[0]) == [expected.get(t, 0) for t in range(6)], kind
    out, frames = ms.next_loop("i2v_tail", shape, clip(6, 7)[None], [two], frames=2, last=True)
    assert frames == (0, 1, 5) and values(out[0]) == [11, 12, 0, 0, 0, 50]
    assert ms.next_loop("i2v_tail", shape, clip(6, 7)[None], [two], frames=2, last=False)[1] == (0, 1)
    with pytest.raises(UserError, match="v2v_head"):
        start("v2v_tail", 1, one)
