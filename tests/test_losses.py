import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ganclean.losses import LOSSES, AdversarialLoss, NonSaturating, resolve_loss
from tests.reference.eager_training import LOSSES as REFERENCE

outputs = st.lists(st.floats(-50, 50), min_size=1, max_size=6).map(lambda x: torch.tensor(x, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
@given(output=outputs)
def test_a_loss_equals_that_of_torch_functional_for_each_example(name, output):
    loss = LOSSES[name]()
    for ours, theirs in zip((loss.real, loss.fake, loss.generator), REFERENCE[name]):
        torch.testing.assert_close(ours(output), theirs(output), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_stay_finite_where_the_discriminator_is_certain(name):
    loss = LOSSES[name]()
    for term in (loss.real, loss.fake, loss.generator):
        output = torch.tensor([-1e4, 1e4], requires_grad=True)
        (gradient,) = torch.autograd.grad(term(output).sum(), output)
        assert term(output).isfinite().all()
        assert gradient.isfinite().all()


@given(output=outputs)
def test_minimax_is_a_zero_sum_game_on_generated_samples(output):
    loss = LOSSES["minimax"]()
    assert torch.equal(loss.generator(output), -loss.fake(output))


def test_a_loss_is_found_by_name_or_passed_through():
    custom = type("Custom", (AdversarialLoss,), {})()
    assert isinstance(resolve_loss("non_saturating"), NonSaturating)
    assert resolve_loss(custom) is custom


@pytest.mark.parametrize("loss", ["bce", None, torch.nn.BCELoss()])
def test_an_unknown_loss_is_answered_with_the_known_names(loss):
    with pytest.raises(ValueError, match=r"loss must be one of \['hinge', 'least_squares', .*got"):
        resolve_loss(loss)
