"""Loading: between implementations both ways, and torch's strict errors by name."""

from __future__ import annotations

import io

import pytest
import torch

from . import support


@pytest.mark.parametrize("name", support.CLASSES)
def test_both_ways(name: str) -> None:
    pair = support.make(name)
    ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
    assert list(ours) == list(theirs)
    assert [x.shape for x in ours.values()] == [x.shape for x in theirs.values()]
    pair.ours.load_state_dict(theirs, strict=True)
    pair.theirs.load_state_dict(ours, strict=True)


@pytest.mark.parametrize("name", support.CLASSES)
def test_file_without_code(name: str) -> None:
    """A saved state has tensors only, so that it loads with weights_only=True."""
    pair = support.make(name, training=False, requires_grad=False)
    with torch.no_grad():
        expected = pair.ours(*pair.arguments)
    file = io.BytesIO()
    torch.save(pair.ours.state_dict(), file)
    file.seek(0)
    other = support.make(name, training=False, requires_grad=False, seed=1).ours
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert support.distance(other(*pair.arguments), expected) == 0


@pytest.mark.parametrize("name", support.CLASSES)
def test_strict_errors(name: str) -> None:
    pair = support.make(name)
    state = pair.theirs.state_dict()
    first, second, *_ = state
    misshaped = {**state, first: torch.zeros(3)}
    missing = {key: value for key, value in state.items() if key != second}
    for broken, message in (
        (misshaped, f"size mismatch for {first}"),
        (missing, f'Missing key\\(s\\) in state_dict: "{second}"'),
        ({**state, "extra": torch.zeros(1)}, r'Unexpected key\(s\) in state_dict: "extra"'),
    ):
        with pytest.raises(RuntimeError, match=message):
            pair.ours.load_state_dict(broken, strict=True)


@pytest.mark.parametrize("name", support.CLASSES)
def test_optimiser_state(name: str) -> None:
    """Optimisers number the parameters: the same order, so their states can be taken over."""
    pair = support.make(name)
    optimisers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (pair.theirs, pair.ours)]
    for step in range(2):
        for module, optimiser in zip((pair.theirs, pair.ours), optimisers, strict=True):
            if step and module is pair.ours:
                pair.ours.load_state_dict(pair.theirs.state_dict())
                optimiser.load_state_dict(optimisers[0].state_dict())
            optimiser.zero_grad()
            sum(y.square().sum() for y in support.tensors(module(*pair.arguments))).backward()
            optimiser.step()
        if not step:
            continue
        shapes = [x["exp_avg"].shape for x in optimisers[1].state_dict()["state"].values()]
        assert shapes == [p.shape for p in pair.ours.parameters()]
