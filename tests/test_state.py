"""Functions on states: every nesting, and files that are not what they should be."""

import pytest
import torch

from riverrun import state

NESTED = (torch.arange(6.0).view(3, 2), None, (torch.ones(3, 1, dtype=torch.long), (torch.zeros(3),)))


def test_select_picks_repeats_and_reorders():
    a, none, (b, (c,)) = state.select(NESTED, [2, 0, 0])
    assert none is None and a.tolist() == [[4, 5], [0, 1], [0, 1]] and b.shape == (3, 1) and c.shape == (3,)
    (one, *_) = state.select(NESTED, slice(1, 2))
    one.zero_()
    assert NESTED[0][1].tolist() == [2, 3], "a selected state must not share memory with the old one"


def test_nbytes_and_describe():
    assert state.nbytes(NESTED) == 6 * 4 + 3 * 8 + 3 * 4
    assert state.describe(NESTED) == "((3, 2), None, ((3, 1), ((3,),)))"


def test_to_leaves_integers_alone():
    moved = state.to(NESTED, torch.float64)
    assert moved[0].dtype == torch.float64 and moved[2][0].dtype == torch.long
    assert state.to(torch.ones(1, dtype=torch.complex64), torch.complex128).dtype == torch.complex128


def test_save_and_load(tmp_path):
    state.save(NESTED, tmp_path / "s", model="x")
    loaded, metadata = state.load(tmp_path / "s")
    assert metadata == {"model": "x"} and state.describe(loaded) == state.describe(NESTED)
    for a, b in zip(state.leaves(loaded), state.leaves(NESTED), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_save_takes_shared_memory_strides_gradients_and_many_tensors(tmp_path):
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    made = (x, x, x.mT, *(torch.full((1,), float(i)) for i in range(12)))
    state.save(made, tmp_path / "s")
    loaded, _ = state.load(tmp_path / "s")
    assert all(torch.equal(a, b) for a, b in zip(loaded, made, strict=True))


def test_flatten_takes_a_copy():
    x = torch.zeros(3)
    tensors, skeleton = state.flatten((x,))
    x.fill_(1)
    assert state.unflatten(tensors, skeleton)[0].tolist() == [0, 0, 0]


def test_detach_cuts_every_tensor_from_its_graph():
    x = torch.ones(2, requires_grad=True)
    cut = state.detach((2 * x, (None, 3 * x)))
    assert not any(y.requires_grad for y in state.leaves(cut))
    assert cut[0].tolist() == [2, 2] and cut[1][0] is None and cut[1][1].tolist() == [3, 3]


def test_states_of_other_nesting_are_not_mapped_together():
    with pytest.raises(ValueError, match="shorter"):
        state.tree_map(torch.add, (torch.ones(1), torch.ones(1)), (torch.ones(1),))


def test_damaged_state_files_are_refused(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError, match="no state file"):
        state.load(path)
    state.save(NESTED, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="truncated or damaged"):
        state.load(path)
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 0xFF]) + whole[21:])
    with pytest.raises(ValueError, match="truncated or damaged"):
        state.load(path)


def test_a_file_of_other_tensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "w")
    with pytest.raises(ValueError, match="holds tensors but no state"):
        state.load(tmp_path / "w")
