"""The states of attention and its window: views of shared buffers that must behave as values."""

import pytest
import torch

from riverrun import nn
from riverrun import state as states
from riverrun.mixers import build
from riverrun.nn.rotary import rotate
from riverrun.testing.tolerance import close

WIDTH = 16


def attend(**args):
    torch.manual_seed(0)
    return build(
        "attention" if "window" not in args else "sliding_window", WIDTH, num_heads=2, **args
    ).double()


ATTENTIONS = [dict(), dict(window=6)]


@pytest.mark.parametrize("args", ATTENTIONS)
def test_every_state_of_a_tree_of_continuations_stays_right(args, float64):
    """From each state go on three times, in an order that mixes old and new ones, steps and chunks."""
    mixer, draw = attend(**args), torch.Generator().manual_seed(2)
    known = [(torch.randn(2, 3, WIDTH, generator=draw), None)]
    with torch.no_grad():
        known = [(x, mixer(x)[1]) for x, _ in known]
        for i in range(60):
            x, state = known[(7 * i) % len(known) if i % 3 else -1]
            more = torch.randn(2, 1 + (i % 4 == 1) * 7, WIDTH, generator=draw)
            y, after = mixer(more, state)
            known.append((torch.cat([x, more], 1), after))
            close(y, mixer(known[-1][0])[0][:, x.shape[1] :], f"continuation {i}")


def test_a_step_is_appended_in_place():
    mixer, x = attend(), torch.randn(2, 40, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x[:, :20])
        places = set()
        for t in range(20, 40):
            _, state = mixer(x[:, t : t + 1], state)
            places.add(state[0].untyped_storage().data_ptr())
    assert len(places) == 1


def test_a_long_window_does_not_keep_the_prompt_in_memory():
    mixer, x = attend(window=6), torch.randn(2, 500, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x)
        assert state[0].untyped_storage().nbytes() == states.nbytes(state[0])
        for t in range(50):
            _, state = mixer(x[:, t : t + 1], state)
            assert state[0].untyped_storage().nbytes() <= 5 * states.nbytes(state[0])


def test_documents_that_are_over_are_dropped():
    mixer, x = attend(), torch.randn(2, 50, WIDTH, dtype=torch.float64)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[:, 40] = True
    _, state = mixer(x, None, reset)
    y, after = mixer(x, state)
    assert after[0].shape[2] == 60
    close(y, mixer(torch.cat([x[:, 40:], x], 1))[0][:, 10:], "after dropping")


@pytest.mark.parametrize("args", ATTENTIONS)
def test_prompts_of_unequal_length(args, float64):
    """Left padding and a reset at the first real token give what each prompt gives alone, and so on."""
    mixer, draw = attend(**args), torch.Generator().manual_seed(3)
    prompts = [torch.randn(1, n, WIDTH, generator=draw) for n in (17, 4)]
    more = torch.randn(2, 9, WIDTH, generator=draw)
    batch, reset = torch.randn(2, 17, WIDTH, generator=draw), torch.zeros(2, 17, dtype=torch.bool)
    for i, p in enumerate(prompts):
        batch[i, 17 - p.shape[1] :] = p
        reset[i, 17 - p.shape[1]] = True
    with torch.no_grad():
        y, state = mixer(batch, None, reset)
        for i, p in enumerate(prompts):
            close(y[i : i + 1, 17 - p.shape[1] :], mixer(p)[0], f"prompt {i}")
        for t in range(9):
            y, state = mixer(more[:, t : t + 1], state)
            for i, p in enumerate(prompts):
                alone = mixer(torch.cat([p, more[i : i + 1, : t + 1]], 1))[0][:, -1:]
                close(y[i : i + 1], alone, f"prompt {i}, step {t}")


def test_a_wider_step_is_not_rounded_into_a_narrower_state():
    mixer, x = attend().float(), torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        _, state = mixer(x)
        mixer, x = mixer.double(), x.double()
        _, after = mixer(x[:, :1], state)
    assert state[0].dtype == torch.float32 and after[0].dtype == torch.float64


@pytest.mark.parametrize("args", ATTENTIONS)
def test_states_of_others_are_refused(args):
    mixer, other = attend(**args), attend(**{**args, "num_key_heads": 1})
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for state in (mixer(x[:1])[1], other(x)[1]):
        with pytest.raises(ValueError, match=r"the state has shape .*; it must be \(\(2, 4"):
            mixer(x, state)


@pytest.mark.parametrize("args", ATTENTIONS)
def test_inference_mode_and_no_grad_may_alternate(args):
    mixer, x = attend(**args), torch.randn(2, 30, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        whole = mixer(x)[0]
    ys, state = [], None
    for i, mode in enumerate([torch.inference_mode, torch.no_grad, torch.enable_grad] * 10):
        with mode():
            y, state = mixer(x[:, i : i + 1], state)
            ys.append(y.detach().clone())
    close(torch.cat(ys, 1), whole, "step by step in three modes")


def seen_one_by_one(q, k, v, always, reset, window):
    """Every step, head and key by itself: what is always seen is asked by q as it is, not turned."""
    (B, T, H, K), G = q.shape, k.shape[2]
    y, begins = torch.zeros_like(q), [0] * B
    for b in range(B):
        for t in range(T):
            begins[b] = t if reset[b, t] else begins[b]
            near = range(max(begins[b], t - window + 1), t + 1)
            place = torch.tensor([[t - begins[b]] + [s - begins[b] for s in near]])
            for h in range(H):
                g = h // (H // G)
                turned = rotate(torch.stack([q[b, t, h], *(k[b, s, g] for s in near)])[None, :, None], place)
                score = [q[b, t, h] @ a for a in always[g]] + [
                    turned[0, 0, 0] @ key for key in turned[0, 1:, 0]
                ]
                p = (torch.stack(score) / K**0.5).softmax(0)
                y[b, t, h] = p @ torch.stack([*always[G + g], *(v[b, s, g] for s in near)])
    return y


def test_what_is_always_seen_beside_a_window():
    """Fewer key heads than heads, three blocks of a window, resets, and two calls; gradients reach it."""
    draw = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    T, window = 13, 5
    q, k, v, always = normal(2, T, 4, 6), normal(2, T, 2, 6), normal(2, T, 2, 6), normal(4, 3, 6)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[0, 4] = reset[1, 11] = True
    expected = seen_one_by_one(q, k, v, always, reset, window)
    always.requires_grad_()
    y, _ = nn.attend(q, k, v, (None,) * 3, reset, window, always=always)
    close(y, expected, "in one call")
    (slope,) = torch.autograd.grad(y.square().sum(), always)
    assert (slope.abs() > 1e-6).all()
    ys, state = [], (None,) * 3
    for i, j in ((0, 1), (1, 8), (8, 9), (9, T)):
        part = (x[:, i:j] for x in (q, k, v))
        y, state = nn.attend(*part, state, reset[:, i:j], window, always=always)
        ys.append(y)
    close(torch.cat(ys, 1), expected, "in four calls")


def test_without_a_window_nothing_is_always_seen():
    x = torch.randn(1, 3, 1, 4)
    with pytest.raises(ValueError, match="`always` is for a window"):
        nn.attend(x, x, x, (None,) * 3, always=torch.randn(2, 1, 4))
