"""Stores of perturbations and the moves that they follow."""

from __future__ import annotations

import pytest
import torch

from fastrobust.training import Batch, PerturbationStore, ShiftFlip
from fastrobust.training.augment import NO_MOVE


def test_moves_belong_to_examples_and_epochs() -> None:
    """Whatever the batches, and with nothing saved; every offset about as often, half of the images mirrored."""
    change = ShiftFlip(3, seed=5)
    index = torch.randperm(5000)
    moves = change.moves(index, 7)
    first, second = (change.moves(part, 7) for part in index.split(2500))
    assert torch.equal(moves.offsets, torch.cat([first.offsets, second.offsets]))
    assert torch.equal(moves.flips, torch.cat([first.flips, second.flips]))
    for axis in range(2):
        counts = torch.bincount(moves.offsets[:, axis] + 3, minlength=7)
        assert len(counts) == 7 and (counts / 5000 - 1 / 7).abs().max() < 0.03
    pairs = torch.bincount((moves.offsets[:, 0] + 3) * 7 + moves.offsets[:, 1] + 3, minlength=49)
    assert (pairs / 5000 - 1 / 49).abs().max() < 0.012
    assert abs(float(moves.flips.double().mean()) - 0.5) < 0.03
    for other in (change.moves(index, 8), ShiftFlip(3, seed=6).moves(index, 7)):
        assert 0.6 < float((other.offsets != moves.offsets).double().mean()) < 0.95


def test_moves_of_batches_without_numbers_and_no_moves() -> None:
    x, y = torch.rand(4, 1, 5, 5), torch.zeros(4, dtype=torch.int64)
    change = ShiftFlip(2)
    one, other = (change.draw(Batch(x, y, None, 0, 1, step)) for step in (0, 1))
    assert not torch.equal(one.offsets, other.offsets)
    assert torch.equal(one.offsets, change.draw(Batch(x, y)).offsets)
    assert ShiftFlip(0, False).draw(Batch(x, y)) == NO_MOVE and NO_MOVE.apply(x) is x and NO_MOVE.invert(x) is x
    assert ShiftFlip(0).draw(Batch(x, y)).offsets is None
    with pytest.raises(ValueError, match="shift: got -1"):
        ShiftFlip(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_padded_store_finds_every_perturbation_again(dtype) -> None:
    """Epoch after epoch under other moves: what the store gives is what the pixel was last given."""
    g = torch.Generator().manual_seed(0)
    store = PerturbationStore(6, (2, 8, 8), padding=2, dtype=dtype, init="uniform", scale=0.05, seed=3)
    change, index = ShiftFlip(2), torch.tensor([4, 0, 5])
    frames = store.perturbations.clone()
    for epoch in range(4):
        move = change.moves(index, epoch)
        x = move.apply(torch.rand(3, 2, 8, 8, generator=g))
        start = store.start(index, x, 0.05, clip=None, move=move)
        for b, i in enumerate(index.tolist()):
            frame = frames[i].float().flip(2) if move.flips[b] else frames[i].float()
            down, right = (2 - move.offsets[b]).tolist()
            want = frame[:, down : down + 8, right : right + 8]
            torch.testing.assert_close(start[b] - x[b], want.clamp(-0.05, 0.05), rtol=0, atol=1e-6)
            seen = torch.zeros(2, 12, 12, dtype=torch.bool)
            seen[:, down : down + 8, right : right + 8] = True
            new = torch.zeros(2, 12, 12)
            new[:, down : down + 8, right : right + 8] = 0.01 * (epoch + b)
            if move.flips[b]:
                seen, new = seen.flip(2), new.flip(2)
            frames[i] = torch.where(seen, new.to(dtype), frames[i])
        adv = x + 0.01 * (epoch + torch.arange(3.0)).view(-1, 1, 1, 1)
        store.update(index, adv, x, move)
        torch.testing.assert_close(store.perturbations, frames, rtol=0, atol=1e-4)
    assert store.known.tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize("init", ["zero", "uniform", "normal"])
def test_first_perturbations_and_resets(init) -> None:
    make = lambda: PerturbationStore(50, (3, 6, 6), init=init, scale=0.1, seed=2)
    store, twin = make(), make()
    first = store.perturbations.clone()
    assert torch.equal(first, twin.perturbations)
    if init == "zero":
        assert not first.any()
    elif init == "uniform":
        assert 0.099 < first.abs().max() <= 0.1 and abs(float(first.std()) - 0.1 / 3**0.5) < 0.003
    else:
        assert abs(float(first.std()) - 0.1) < 0.004 and first.abs().max() > 0.2  # not clamped
    x = torch.rand(2, 3, 6, 6)
    store.update(torch.tensor([1, 2]), x + 0.5, x)
    assert int(store.known.sum()) == 2
    store.reset()
    assert not store.known.any() and store.resets == 1
    assert torch.equal(first, store.perturbations) == (init == "zero")
    twin.reset()
    assert torch.equal(store.perturbations, twin.perturbations)


def test_state_goes_into_a_checkpoint_and_comes_back(tmp_path) -> None:
    store = PerturbationStore(5, (1, 4, 4), init="normal", scale=0.1, dtype=torch.float16)
    store.reset()
    x = torch.rand(2, 1, 4, 4)
    store.update(torch.tensor([0, 3]), x + 0.1, x)
    torch.save(store.state_dict(), tmp_path / "state.pt")
    other = PerturbationStore(5, (1, 4, 4), init="normal", scale=0.1, dtype=torch.float16)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.perturbations, store.perturbations) and torch.equal(other.known, store.known)
    store.reset(), other.reset()
    assert torch.equal(other.perturbations, store.perturbations)
    with pytest.raises(ValueError, match=r"state: got perturbations \(5, 1, 4, 4\)"):
        PerturbationStore(5, (1, 8, 8), dtype=torch.float16).load_state_dict(store.state_dict())


def test_a_store_in_a_file_is_the_file(tmp_path) -> None:
    file = tmp_path / "perturbations"
    options = {"dtype": torch.float16, "downsample": 2, "init": "uniform", "scale": 0.1}
    store = PerturbationStore(5, (1, 4, 4), mmap=file, **options)
    plain = PerturbationStore(5, (1, 4, 4), **options)
    assert torch.equal(store.perturbations, plain.perturbations) and file.stat().st_size == 5 * 4 * 2 == store.nbytes
    x, index = torch.rand(2, 1, 4, 4), torch.tensor([4, 1])
    for s in (store, plain):
        s.update(index, x + 0.1, x)
    assert torch.equal(store.start(index, x, 0.05), plain.start(index, x, 0.05))
    again = PerturbationStore(5, (1, 4, 4), mmap=file, **options)  # another process would see the same
    assert torch.equal(again.perturbations, plain.perturbations)
    with pytest.raises(ValueError, match="mmap: got .* of 40 bytes, expected 48"):
        PerturbationStore(6, (1, 4, 4), mmap=file, **options)


def test_rows_travel_where_the_batch_lies_elsewhere(monkeypatch) -> None:
    """As for a store on the host and images on a GPU: forced here, on one device."""
    x, index = torch.rand(4, 1, 4, 4), torch.tensor([2, 0, 2, 4])
    stores = [PerturbationStore(5, (1, 4, 4), padding=1, init="uniform", scale=0.1) for _ in range(2)]
    rows = lambda i, images: (stores[1].perturbations[i].clone(), torch.arange(len(i)))
    monkeypatch.setattr(stores[1], "_rows", rows)
    move = ShiftFlip(1).moves(index)
    starts = [s.start(index, x, 0.05, move=move) for s in stores]
    assert torch.equal(*starts)
    for s in stores:
        s.update(index, x + 0.1 * torch.arange(4.0).view(-1, 1, 1, 1), x, move)
    assert torch.equal(stores[0].perturbations, stores[1].perturbations)


@pytest.mark.cuda
def test_a_host_store_serves_a_gpu() -> None:
    x, index = torch.rand(4, 1, 4, 4), torch.tensor([2, 0, 3, 4])
    host, other = (PerturbationStore(5, (1, 4, 4), padding=1, init="uniform", scale=0.1) for _ in range(2))
    move = ShiftFlip(1).moves(index)
    assert torch.equal(
        host.start(index.cuda(), x.cuda(), 0.05, move=move).cpu(), other.start(index, x, 0.05, move=move)
    )
    host.update(index.cuda(), x.cuda() + 0.1, x.cuda(), move)
    other.update(index, x + 0.1, x, move)
    torch.testing.assert_close(host.perturbations, other.perturbations, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"dtype": torch.bfloat16}, "dtype: got torch.bfloat16"),
        ({"examples": -1}, "examples: got -1"),
        ({"shape": (8, 8)}, r"shape: got \(8, 8\)"),
        ({"padding": -1}, "padding: got -1"),
        ({"downsample": 3}, "downsample: got 3, expected a divisor of 8 and 8"),
        ({"downsample": 2, "padding": 1, "augment_first": True}, "downsample: got 2, expected a divisor of 1"),
        ({"init": "random"}, "init: got 'random'"),
        ({"scale": -1.0}, "scale: got -1.0"),
    ],
)
def test_bad_arguments(changed, text) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        PerturbationStore(**{"examples": 4, "shape": (1, 8, 8), **changed})
