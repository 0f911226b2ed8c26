import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone

from ganclean.optim import SGD, Adam, resolve_optimizer
from tests.reference.eager_training import TORCH_OPTIMIZERS

rates = st.floats(1e-4, 0.5)
decays = st.sampled_from([0.0, 1e-3, 0.1])
momenta = st.floats(0.01, 0.99)
RULES = {
    "sgd": st.builds(SGD, lr=rates, weight_decay=decays),
    "momentum": st.builds(SGD, lr=rates, momentum=momenta, weight_decay=decays),
    "nesterov": st.builds(SGD, lr=rates, momentum=momenta, nesterov=st.just(True), weight_decay=decays),
    "adam": st.builds(
        Adam,
        lr=rates,
        betas=st.tuples(st.one_of(st.just(0.0), momenta), st.floats(0.5, 0.9999)),
        eps=st.sampled_from([1e-8, 1e-3]),
        weight_decay=decays,
    ),
    "adam without mean": st.builds(Adam, lr=rates, betas=st.just((0.0, 0.99)), weight_decay=decays),
}
SHAPES = {"weight": (3, 2), "bias": (2,)}


def tensors(seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: t.square() + 0.1 if positive else t for name, t in drawn.items()}


def moments_of(rule, seed):
    return {name: tensors(seed + i, positive=name == "square") for i, name in enumerate(rule.moment_names)}


@pytest.mark.parametrize("kind", RULES)
@given(data=st.data())
def test_a_rule_equals_the_torch_optimizer_over_fifty_steps(kind, data):
    rule = data.draw(RULES[kind])
    params = tensors(0)
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = TORCH_OPTIMIZERS[type(rule)](theirs.values(), **rule.get_params())
    moments = rule.init(params)
    for step in range(1, 51):
        grads = tensors(step)
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        optimizer.step()
        params, moments = rule.update(params, grads, moments, step)
    for name, p in theirs.items():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-11, atol=1e-11)


def test_an_update_leaves_its_arguments_as_they_are():
    rule, params, grads = Adam(lr=0.1), tensors(0), tensors(1)
    before = rule.init(params)
    rule.update(params, grads, before, 1)
    assert all(torch.equal(params[name], tensors(0)[name]) for name in SHAPES)
    assert all(not t.any() for moment in before.values() for t in moment.values())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
def test_a_parameter_without_gradient_is_not_moved_and_contributes_zero_to_every_derivative(betas):
    rule = Adam(lr=0.1, betas=betas)
    params, grads = {"w": torch.ones(2, dtype=torch.float64)}, {"w": torch.tensor([0.0, 1.0], dtype=torch.float64)}

    def twice(params, grads, moments):
        params, moments = rule.update(params, grads, moments, 1)
        return rule.update(params, grads, moments, 2)

    (new, moments), vjp = torch.func.vjp(twice, params, grads, rule.init(params))
    cotangent = (
        {"w": torch.ones(2, dtype=torch.float64)},
        {name: {"w": torch.zeros_like(m["w"])} for name, m in moments.items()},
    )
    d_params, d_grads, d_moments = vjp(cotangent)
    assert new["w"][0] == 1.0 and new["w"][1] != 1.0
    assert torch.equal(d_params["w"], torch.ones(2, dtype=torch.float64))
    for derivative in (d_grads["w"], d_moments["mean"]["w"], d_moments["square"]["w"]):
        assert derivative.isfinite().all()
        assert derivative[0] == 0


@given(data=st.data())
def test_the_gradient_is_recovered_from_the_moments_of_adam(data):
    rule = data.draw(RULES["adam"])
    params, grads, before = tensors(0), tensors(1), moments_of(rule, 2)
    _, after = rule.update(params, grads, before, 3)
    for name in SHAPES:
        flat = [{moment: tensors[name] for moment, tensors in moments.items()} for moments in (before, after)]
        torch.testing.assert_close(rule.gradient_from_moments(params[name], *flat), grads[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", RULES)
@given(data=st.data())
def test_the_pullback_equals_autograd_of_the_rule(kind, data):
    rule, step = data.draw(RULES[kind]), data.draw(st.integers(1, 100))
    params, grads, before = tensors(0), tensors(1), moments_of(rule, 2)
    cotangent, cotangent_moments = tensors(10), moments_of(rule, 11)
    leaves = [*params.values(), *grads.values(), *(t for moment in before.values() for t in moment.values())]
    for leaf in leaves:
        leaf.requires_grad_()
    after, after_moments = rule.update(params, grads, before, step)
    inner = sum((cotangent[name] * after[name]).sum() for name in SHAPES) + sum(
        (cotangent_moments[moment][name] * after_moments[moment][name]).sum() for moment in before for name in SHAPES
    )
    expected = torch.autograd.grad(inner, leaves, materialize_grads=True)
    for leaf in leaves:
        leaf.requires_grad_(False)
    detached = {moment: {name: t.detach() for name, t in m.items()} for moment, m in after_moments.items()}
    d_params, d_grads, d_moments = rule.pullback(params, before, detached, step)(cotangent, cotangent_moments)
    n = len(SHAPES)
    torch.testing.assert_close(d_params, torch.cat([t.flatten() for t in expected[:n]]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(d_grads, torch.cat([t.flatten() for t in expected[n : 2 * n]]), rtol=1e-8, atol=1e-8)
    pulled = [t for moment in d_moments.values() for t in moment.values()]
    for ours, theirs in zip(pulled, expected[2 * n :]):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_a_rule_is_cloned_with_its_parameters():
    assert clone(Adam(lr=0.3, betas=(0.0, 0.9))).get_params() == Adam(lr=0.3, betas=(0.0, 0.9)).get_params()


def test_no_optimizer_means_the_default():
    default = SGD()
    assert resolve_optimizer(None, default) is default


def test_an_optimizer_of_torch_is_answered_with_the_rule_to_pass():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"ganclean.optim rule such as SGD or Adam; got (.|\n)*ganclean.optim.Adam"):
        resolve_optimizer(optimizer, SGD())
