import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ganclean.dynamics.state import ravel
from ganclean.optim import SGD, Adam, AdamW, Clipped, Optimizer, RMSprop, resolve_optimizer

TORCH_OPTIMIZERS = {
    SGD: torch.optim.SGD,
    Adam: torch.optim.Adam,
    AdamW: torch.optim.AdamW,
    RMSprop: torch.optim.RMSprop,
}
rates = st.floats(1e-4, 0.5)
decays = st.sampled_from([0.0, 1e-3, 0.1])
momenta = st.floats(0.01, 0.99)
epsilons = st.sampled_from([1e-8, 1e-3])
betas = st.tuples(st.one_of(st.just(0.0), momenta), st.floats(0.5, 0.9999))
root_mean_square = {"lr": rates, "alpha": st.floats(0.5, 0.999), "eps": epsilons, "weight_decay": decays}
UNCLIPPED = {
    "sgd": st.builds(SGD, lr=rates, weight_decay=decays),
    "momentum": st.builds(SGD, lr=rates, momentum=momenta, weight_decay=decays),
    "nesterov": st.builds(SGD, lr=rates, momentum=momenta, nesterov=st.just(True), weight_decay=decays),
    "adam": st.builds(Adam, lr=rates, betas=betas, eps=epsilons, weight_decay=decays),
    "adam without mean": st.builds(Adam, lr=rates, betas=st.just((0.0, 0.99)), weight_decay=decays),
    "adam without memory of squares": st.builds(
        Adam, lr=rates, betas=st.sampled_from([(0.9, 0.0), (0.0, 0.0)]), eps=st.just(1e-3), weight_decay=decays
    ),
    "adamw": st.builds(AdamW, lr=rates, betas=betas, eps=epsilons, weight_decay=decays),
    "adamw without memory": st.builds(AdamW, lr=rates, betas=st.just((0.0, 0.0)), eps=st.just(1e-3)),
    "rmsprop": st.builds(RMSprop, **root_mean_square),
    "rmsprop without memory": st.builds(RMSprop, lr=rates, alpha=st.just(0.0), eps=st.just(1e-3)),
    "rmsprop with momentum": st.builds(RMSprop, **root_mean_square, momentum=momenta),
    "centered rmsprop": st.builds(RMSprop, **root_mean_square, centered=st.just(True)),
    "centered rmsprop with momentum": st.builds(RMSprop, **root_mean_square, centered=st.just(True), momentum=momenta),
}
bounds = st.floats(0.3, 3.0)
CLIPPED = {
    "clipped norm": st.builds(Clipped, st.one_of(*UNCLIPPED.values()), max_norm=bounds),
    "clipped values": st.builds(Clipped, st.one_of(*UNCLIPPED.values()), max_value=bounds),
    "clipped values and norm": st.builds(Clipped, st.one_of(*UNCLIPPED.values()), max_norm=bounds, max_value=bounds),
}
RULES = {**UNCLIPPED, **CLIPPED}
ADAPTIVE = [
    Adam(lr=0.1),
    Adam(lr=0.1, betas=(0.0, 0.99)),
    Adam(lr=0.1, betas=(0.9, 0.0)),
    Adam(lr=0.1, betas=(0.0, 0.0)),
    Adam(lr=0.1, eps=0.0),
    AdamW(lr=0.1, weight_decay=0.0),
    RMSprop(lr=0.1),
    RMSprop(lr=0.1, eps=0.0),
    RMSprop(lr=0.1, alpha=0.0),
    RMSprop(lr=0.1, alpha=1.0),
    RMSprop(lr=0.1, momentum=0.9),
    RMSprop(lr=0.1, centered=True),
    RMSprop(lr=0.1, alpha=0.0, centered=True),
    RMSprop(lr=0.1, centered=True, momentum=0.9),
]
SHAPES = {"weight": (3, 2), "bias": (2,)}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def moments_after(rule, n_updates, seed):
    """The moments after some updates with random gradients: unlike random numbers, a mean and its square match."""
    params, moments = tensors(seed), rule.init(tensors(seed))
    for step in range(1, n_updates + 1):
        params, moments = rule.update(params, tensors(seed + step), moments, step)
    return moments


def cotangents(rule, seed):
    return tensors(seed), {name: tensors(seed + i + 1) for i, name in enumerate(rule.moment_names)}


def flattened(moments):
    return {moment: ravel(tensors) for moment, tensors in moments.items()}


def joined(dicts):
    return {name: torch.stack([tensors[name] for tensors in dicts]) for name in SHAPES}


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def clip_as_torch_does(rule, parameters):
    if rule.max_value is not None:
        clip_grad_value_(parameters, rule.max_value)
    if rule.max_norm is not None:
        clip_grad_norm_(parameters, rule.max_norm)


@pytest.mark.parametrize("kind", RULES)
@given(data=st.data())
def test_a_rule_equals_the_torch_optimizer_over_fifty_steps(kind, data):
    rule = data.draw(RULES[kind])
    inner = rule.unclipped
    params = tensors(0)
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = TORCH_OPTIMIZERS[type(inner)](theirs.values(), **inner.get_params())
    moments = rule.init(params)
    for step in range(1, 51):
        grads = tensors(step)
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        if isinstance(rule, Clipped):
            clip_as_torch_does(rule, theirs.values())
        optimizer.step()
        params, moments = rule.update(params, grads, moments, step)
    assert_close(params, {name: p.detach() for name, p in theirs.items()}, 1e-10)


def test_without_memory_of_squares_a_vanishing_gradient_leaves_the_mean_over_epsilon_as_in_torch():
    rule = Adam(lr=1e-9, betas=(0.9, 0.0))
    params = {"w": torch.ones(2, dtype=torch.float64)}
    theirs = torch.nn.Parameter(params["w"].clone())
    optimizer, moments = torch.optim.Adam([theirs], **rule.get_params()), rule.init(params)
    for step, grad in ((1, torch.tensor([1.0, -2.0])), (2, torch.zeros(2))):
        theirs.grad = grad.double()
        optimizer.step()
        params, moments = rule.update(params, {"w": grad.double()}, moments, step)
    assert_close(params["w"], theirs.detach(), 1e-12)
    assert (params["w"] - 1).abs().min() > 1e-3


@pytest.mark.parametrize("rule", [Adam(lr=0.1), RMSprop(lr=0.1, centered=True), Clipped(SGD(lr=0.1), max_norm=1.0)])
def test_what_is_not_a_number_stays_so(rule):
    params, grads = {"w": torch.ones(2)}, {"w": torch.tensor([math.nan, math.nan])}
    params, _ = rule.update(params, grads, rule.init(params), 1)
    assert params["w"].isnan().all()


def test_an_update_leaves_its_arguments_as_they_are():
    for rule in (Adam(lr=0.1), RMSprop(lr=0.1, momentum=0.9, centered=True), Clipped(AdamW(lr=0.1), max_value=0.1)):
        params, grads = tensors(0), tensors(1)
        before = rule.init(params)
        rule.update(params, grads, before, 1)
        assert all(torch.equal(params[name], tensors(0)[name]) for name in SHAPES)
        assert all(torch.equal(grads[name], tensors(1)[name]) for name in SHAPES)
        assert all(not t.any() for moment in before.values() for t in moment.values())


@pytest.mark.parametrize("rule", [*ADAPTIVE, *(Clipped(rule, max_norm=0.5, max_value=0.7) for rule in ADAPTIVE)])
def test_a_parameter_without_gradient_is_not_moved_and_contributes_zero_to_every_derivative(rule):
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
    for derivative in (d_grads["w"], *(d_moments[name]["w"] for name in d_moments if name != "momentum")):
        assert derivative.isfinite().all()
        assert derivative[0] == 0


@pytest.mark.parametrize("rule", ADAPTIVE)
def test_the_pullback_of_a_parameter_without_gradient_is_zero(rule):
    params, grads = {"w": torch.ones(2, dtype=torch.float64)}, {"w": torch.tensor([0.0, 1.0], dtype=torch.float64)}
    before = rule.init(params)
    _, after = rule.update(params, grads, before, 1)
    zero = {name: {"w": torch.zeros_like(m["w"])} for name, m in after.items()}
    d_param, d_grad, _ = rule.pullback(params, before, after, 1, lambda: grads)({"w": torch.ones(2).double()}, zero)
    assert torch.equal(d_param, torch.ones(2, dtype=torch.float64))
    assert d_grad.isfinite().all() and d_grad[0] == 0


def test_decoupled_decay_shrinks_a_parameter_without_gradient():
    rule, params = AdamW(lr=0.5, weight_decay=0.1), {"w": torch.ones(1)}
    params, _ = rule.update(params, {"w": torch.zeros(1)}, rule.init(params), 1)
    assert_close(params["w"], torch.tensor([0.95]), 1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("constant", [0.0, 1e-4, 0.3, 1e4])
def test_a_constant_gradient_has_no_spread_and_still_gives_numbers(constant, momentum):
    # With this decay, rounding makes some of the spreads negative.
    rule = RMSprop(lr=1e-3, alpha=0.5, momentum=momentum, centered=True)
    param, grad, moments = torch.ones(1), torch.full((1,), constant), flattened(rule.init({"w": torch.ones(1)}))
    for step in range(1, 51):
        before = moments
        param, moments = rule.rule(param, grad, before, step)
        pull = torch.func.vjp(lambda g, before=before: rule.rule(torch.ones(1), g, before, 1)[0], grad)[1]
        recovered = rule.gradient_from_moments(param, before, moments)
        assert all(t.isfinite().all() for t in (param, pull(torch.ones(1))[0], recovered))


RECOVERING = [kind for kind in UNCLIPPED if "adam" in kind or kind.endswith("with momentum") or "centered" in kind]


@pytest.mark.parametrize("kind", RECOVERING)
@given(data=st.data())
def test_the_gradient_is_recovered_from_the_moments(kind, data):
    rule, n_updates = data.draw(UNCLIPPED[kind]), data.draw(st.integers(0, 5))
    params, grads, before = tensors(0), tensors(1), moments_after(rule, n_updates, 2)
    _, after = rule.update(params, grads, before, n_updates + 1)
    recovered = rule.gradient_from_moments(ravel(params), flattened(before), flattened(after))
    assert_close(recovered, ravel(grads), 1e-10)


@pytest.mark.parametrize(
    "rule",
    [
        RMSprop(),
        RMSprop(centered=True, alpha=1.0),
        Clipped(SGD(), max_norm=1.0),
        Clipped(Adam(), max_value=1.0),
        Clipped(RMSprop(momentum=0.5), max_norm=1.0),
    ],
)
def test_a_gradient_that_the_moments_do_not_determine_is_asked_for(rule):
    params, grads, before = tensors(0), tensors(1), moments_after(rule, 2, 2)
    _, after = rule.update(params, grads, before, 3)
    assert rule.gradient_from_moments(ravel(params), flattened(before), flattened(after)) is None
    with pytest.raises(
        ValueError, match=r"depends on the gradient, which its moments do not determine\. Pass gradient"
    ):
        rule.pullback(params, before, after, 3)
    asked = []
    rule.pullback(params, before, after, 3, lambda: asked.append(None) or grads)
    assert len(asked) == 1


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam(), AdamW(), RMSprop(momentum=0.5), RMSprop(centered=True)])
def test_a_gradient_that_is_not_needed_is_not_evaluated(rule):
    def gradient():
        raise AssertionError("The gradient was evaluated.")

    params, grads, before = tensors(0), tensors(1), moments_after(rule, 2, 2)
    _, after = rule.update(params, grads, before, 3)
    rule.pullback(params, before, after, 3, gradient)


@pytest.mark.parametrize("kind", RULES)
@given(data=st.data())
def test_the_pullback_equals_the_derivative_of_the_rule_at_the_true_gradient(kind, data):
    rule, n_updates = data.draw(RULES[kind]), data.draw(st.integers(0, 5))
    params, grads, before = tensors(0), tensors(1), moments_after(rule, n_updates, 2)
    _, after = rule.update(params, grads, before, n_updates + 1)
    cotangent, cotangent_moments = cotangents(rule, 20)
    reverse = {name: grads[name] for name in reversed(grads)}
    pull = rule.pullback(params, before, after, n_updates + 1, lambda: reverse)
    d_param, d_grad, d_moments = pull(cotangent, cotangent_moments)
    _, vjp = torch.func.vjp(
        lambda p, g, m: rule.rule(p, g, m, n_updates + 1), ravel(params), ravel(grads), flattened(before)
    )
    expected = vjp((ravel(cotangent), flattened(cotangent_moments)))
    scale = max(1.0, *(float(t.abs().max()) for t in (expected[0], expected[1], *expected[2].values())))
    assert_close(d_param / scale, expected[0] / scale, 1e-10)
    assert_close(d_grad / scale, expected[1] / scale, 1e-10)
    for name, moment in flattened(d_moments).items():
        assert_close(moment / scale, expected[2][name] / scale, 1e-10)


@pytest.mark.parametrize("kind", RULES)
@given(data=st.data())
def test_the_derivatives_of_an_update_are_those_of_finite_differences(kind, data):
    rule, n_updates, seed = data.draw(RULES[kind]), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 1000))
    before = flattened(moments_after(rule, n_updates, seed))
    param, grad = ravel(tensors(seed + 10)), ravel(tensors(seed + 11))
    # Away from 0, where a rule without memory jumps, and from the kinks of clipping.
    grad = grad.sign() * (grad.abs() + 0.1)
    if isinstance(rule, Clipped):
        rule = away_from_kinks(rule, grad)
    inputs = [param, grad, *before.values()]
    direction = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).double() for i, t in enumerate(inputs)
    ]

    def update(param, grad, *moments):
        new, moments = rule.rule(param, grad, dict(zip(before, moments)), n_updates + 1)
        return (new, *moments.values())

    _, vjp = torch.func.vjp(update, *inputs)
    width = 1e-7
    plus, minus = (update(*(t + sign * width * d for t, d in zip(inputs, direction))) for sign in (1, -1))
    for i, (high, low) in enumerate(zip(plus, minus)):
        cotangent = [torch.ones_like(t) if i == j else torch.zeros_like(t) for j, t in enumerate(plus)]
        slope = sum((d * pulled).sum() for d, pulled in zip(direction, vjp(tuple(cotangent))))
        measured = (high - low).sum() / (2 * width)
        assert_close(measured, slope, 1e-4 * max(1.0, float(slope.abs())))


def away_from_kinks(rule, grad):
    values = grad.abs().sort().values
    middle = float(values[len(values) // 2 - 1] + values[len(values) // 2]) / 2
    bounded = Clipped(rule.optimizer, None, middle if rule.max_value is not None else None)
    if rule.max_norm is not None:
        norm = float(grad.clamp(-middle, middle).norm() if bounded.max_value else grad.norm())
        bounded.max_norm = norm / 2 if rule.max_norm < norm else norm * 2
    return bounded


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e3]),
    max_norm=st.one_of(st.none(), st.sampled_from([1e-8, 0.5, 2.0])),
    max_value=st.one_of(st.none(), st.sampled_from([1e-8, 0.5, 2.0])),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_clipping_is_that_of_torch(seed, scale, max_norm, max_value, dtype):
    if max_norm is None and max_value is None:
        max_norm = 1.0
    rule = Clipped(SGD(lr=1.0), max_norm, max_value)
    grads = {name: (scale * t).to(dtype) for name, t in tensors(seed).items()}
    params = {name: torch.zeros_like(t) for name, t in grads.items()}
    theirs = {name: torch.nn.Parameter(p) for name, p in params.items()}
    for name, p in theirs.items():
        p.grad = grads[name].clone()
    clip_as_torch_does(rule, theirs.values())
    new, _ = rule.update(params, grads, rule.init(params), 1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for name, p in theirs.items():
        torch.testing.assert_close(-new[name], p.grad, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("bounds", [{"max_norm": 1.0}, {"max_norm": 1e-9}, {"max_value": 1.0}])
@pytest.mark.parametrize("inner", [SGD(lr=0.1, momentum=0.9), Adam(lr=0.1), RMSprop(lr=0.1, centered=True)])
def test_clipping_a_vanishing_gradient_has_finite_derivatives(inner, bounds):
    rule, zero = Clipped(inner, **bounds), torch.zeros(3, dtype=torch.float64)
    moments = flattened(rule.init({"w": zero}))

    def after(grad):
        return rule.rule(torch.ones(3, dtype=torch.float64), grad, moments, 1)[0]

    value, pull = torch.func.vjp(after, zero)
    assert torch.equal(value, torch.ones(3, dtype=torch.float64))
    assert pull(torch.ones_like(zero))[0].isfinite().all()
    assert torch.func.jacfwd(after)(zero).isfinite().all()


@pytest.mark.parametrize(
    "rule", [*ADAPTIVE, Clipped(SGD(lr=0.1, momentum=0.5), max_norm=0.5), Clipped(AdamW(), max_norm=0.5, max_value=0.3)]
)
def test_a_rule_is_the_same_under_vmap(rule):
    runs = [(tensors(seed), tensors(seed + 1), moments_after(rule, 2, seed + 2)) for seed in (0, 10, 20)]
    params, grads, moments = zip(*runs)
    stacked = {moment: joined([m[moment] for m in moments]) for moment in rule.moment_names}
    together, moments = torch.func.vmap(lambda p, g, m: rule.update(p, g, m, 3))(joined(params), joined(grads), stacked)
    alone, moments_alone = zip(*(rule.update(*run, 3) for run in runs))
    assert_close(together, joined(alone), 1e-12)
    for moment, found in moments.items():
        assert_close(found, joined([m[moment] for m in moments_alone]), 1e-12)


def test_a_clipped_rule_keeps_the_moments_of_the_inner_one():
    inner = RMSprop(momentum=0.9, centered=True)
    rule = Clipped(inner, max_norm=1.0)
    assert rule.moment_names == inner.moment_names == ("square", "mean", "momentum")
    assert rule.unclipped is inner and inner.unclipped is inner
    assert Clipped(rule, max_value=1.0).unclipped is inner
    assert rule.init(tensors(0)).keys() == inner.init(tensors(0)).keys()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Clipped(SGD()), "needs max_norm or max_value; got neither"),
        (Clipped(SGD(), max_norm=0.0), r"needs a positive number as max_norm; got 0\.0"),
        (Clipped(SGD(), max_value=-1), "needs a positive number as max_value; got -1"),
        (Clipped(SGD(), max_norm="1"), "needs a positive number as max_norm; got '1'"),
        (Clipped("adam", max_norm=1.0), r"needs a ganclean\.optim rule such as SGD or Adam; got 'adam'"),
        (SGD(nesterov=True), "looks ahead along the momentum and needs one"),
        (Clipped(SGD(nesterov=True), max_norm=1.0), "looks ahead along the momentum and needs one"),
    ],
)
def test_a_rule_that_cannot_work_says_so_before_the_first_step(rule, message):
    with pytest.raises(ValueError, match=message):
        rule.init(tensors(0))


def test_hyper_parameters_are_replaced_in_a_copy():
    rule = Adam(lr=0.1, betas=(0.5, 0.9))
    changed = rule.at({"lr": 0.2, "betas": (0.6, 0.9)})
    assert (changed.lr, changed.betas, changed.eps) == (0.2, (0.6, 0.9), rule.eps)
    assert (rule.lr, rule.betas) == (0.1, (0.5, 0.9))
    assert type(changed) is Adam and rule.at({}) is rule


def test_hyper_parameters_of_a_clipped_rule_are_those_of_the_inner_one():
    rule = Clipped(SGD(lr=0.1), max_norm=1.0, max_value=2.0)
    changed = rule.at({"lr": 0.2})
    assert (changed.optimizer.lr, changed.max_norm, changed.max_value) == (0.2, 1.0, 2.0)
    assert rule.optimizer.lr == 0.1 and rule.at({}) is rule


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (SGD(), {"betas": (0.5, 0.9)}, "SGD has no hyper-parameter 'betas'; only what it has can change: lr, momentum"),
        (Adam(), {"lr": 1.0, "alpha": 0.5, "beta": 1}, "Adam has no hyper-parameter 'alpha', 'beta'"),
        (Clipped(SGD(), max_norm=1.0), {"max_norm": 2.0}, "SGD has no hyper-parameter 'max_norm'"),
        (SGD(lr=0.1), {"momentum": 0.9}, r"needs the moments \['momentum'\], which SGD\(lr=0.1\) does not keep"),
        (RMSprop(), {"centered": True}, r"needs the moments \['mean'\]"),
    ],
)
def test_what_a_rule_does_not_have_cannot_be_replaced(rule, settings, message):
    with pytest.raises(ValueError, match=message):
        rule.at(settings)


@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.9), RMSprop(lr=0.1, momentum=0.9)])
def test_momentum_that_is_switched_off_and_on_rests_as_in_torch(rule):
    params, moments = tensors(0), rule.init(tensors(0))
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = TORCH_OPTIMIZERS[type(rule)](theirs.values(), **rule.get_params())
    for step, momentum in enumerate((0.9, 0.0, 0.0, 0.5), start=1):
        optimizer.param_groups[0]["momentum"] = momentum
        for name, p in theirs.items():
            p.grad = tensors(step)[name]
        optimizer.step()
        params, moments = rule.at({"momentum": momentum}).update(params, tensors(step), moments, step)
        assert_close(params, {name: p.detach() for name, p in theirs.items()}, 1e-12)


def test_a_rule_of_ones_own_needs_only_its_update():
    class SignDescent(Optimizer):
        def __init__(self, lr=0.1):
            self.lr = lr

        def rule(self, param, grad, moments, step):
            return param - self.lr * grad.sign(), moments

    params, moments = SignDescent().at({"lr": 0.5}).update(tensors(0), tensors(1), {}, 1)
    assert_close(params, {name: tensors(0)[name] - 0.5 * tensors(1)[name].sign() for name in SHAPES}, 1e-15)
    assert moments == {}


@pytest.mark.parametrize(
    "rule", [Adam(lr=0.3, betas=(0.0, 0.9)), AdamW(eps=1e-3), RMSprop(centered=True), Clipped(Adam(), max_norm=2.0)]
)
def test_a_rule_is_cloned_with_its_parameters(rule):
    copied, expected = clone(rule).get_params(deep=False), rule.get_params(deep=False)
    assert repr(copied) == repr(expected) and repr(copy.deepcopy(rule)) == repr(rule)


def test_the_parameters_of_the_inner_rule_can_be_set():
    rule = Clipped(SGD(), max_norm=1.0).set_params(optimizer__lr=0.5)
    assert rule.optimizer.lr == 0.5


def test_no_optimizer_means_the_default():
    default = SGD()
    assert resolve_optimizer(None, default) is default


def test_a_rule_is_itself():
    rule = Clipped(SGD(), max_norm=1.0)
    assert resolve_optimizer(rule, SGD()) is rule


def test_an_optimizer_of_torch_is_answered_with_the_rule_to_pass():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"ganclean.optim rule such as SGD or Adam; got (.|\n)*ganclean.optim.Adam"):
        resolve_optimizer(optimizer, SGD())
