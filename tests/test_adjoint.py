"""The adjoint of a step is `torch.func.vjp` of that very step."""

import pytest
import torch

from ganclean.dynamics.adjoint import exact_adjoint
from ganclean.dynamics.state import flatten_state
from tests.practice import PRACTICE, practised
from tests.test_secant import random_cotangent
from tests.toy_gans import toy_cleanser


@pytest.mark.parametrize("feature", PRACTICE)
def test_the_exact_adjoint_is_that_of_the_whole_step(feature):
    networks, data, y, settings = practised(feature)
    cleanser = toy_cleanser(networks, **{"n_epochs": 2, **settings}).fit(data, y)
    trajectory, step = cleanser.trajectory_, cleanser.trajectory_.step
    record, state, after = trajectory[5], trajectory.state(5), trajectory.state(6)
    x = trajectory.source[record.indices]
    cotangent = random_cotangent(step, after)
    (found,) = exact_adjoint(step, state, after, record, x, [cotangent])

    def next_state(differentiable, weights):
        buffers = {player: {**state.buffers[player], **traced} for player, traced in differentiable.buffers.items()}
        full = differentiable._replace(buffers=buffers)
        return step.differentiable(step(full, record, x, weights, functional=True))

    with torch.no_grad():
        pull = torch.func.vjp(next_state, step.differentiable(state), x.new_ones(len(x)))[1]
        expected, weights = pull(cotangent)
    torch.testing.assert_close(found.weights, weights, rtol=1e-9, atol=1e-13)
    largest = max(float(t.abs().max()) for t in flatten_state(expected).values())
    for name, tensor in flatten_state(expected).items():
        size = max(float(tensor.abs().max()), 1e-6 * largest)
        torch.testing.assert_close(flatten_state(found.cotangent)[name], tensor, rtol=0, atol=1e-9 * size, msg=name)
