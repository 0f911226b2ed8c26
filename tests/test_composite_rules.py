"""Groups of parameters and projections: as torch.optim does it, and with its derivative."""

import pytest
import torch

from ganclean.optim import SGD, Adam, Clipped, Grouped, Projected, RMSprop
from ganclean.tensors import ravel

GROUPS = {
    "two rates": (Grouped({"a": Adam(lr=1e-1), "*": Adam(lr=1e-2)}), torch.optim.Adam, [{"lr": 1e-1}, {"lr": 1e-2}]),
    "momentum in one": (
        Grouped({("a.w", "a.b"): SGD(lr=1e-1, momentum=0.9), "c": SGD(lr=1e-2)}),
        torch.optim.SGD,
        [{"lr": 1e-1, "momentum": 0.9}, {"lr": 1e-2}],
    ),
}


def params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.w": (2, 2), "c.w": (3,), "a.b": (2,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def clipped(values):
    return {name: p.clamp(-0.8, 0.8) for name, p in values.items()}


@pytest.mark.parametrize(("rule", "kind", "settings"), GROUPS.values(), ids=GROUPS)
def test_groups_are_those_of_torch(rule, kind, settings):
    now = params()
    moments = rule.init(now)
    theirs = {name: p.clone().requires_grad_() for name, p in now.items()}
    parts = [["a.w", "a.b"], ["c.w"]]
    optimizer = kind([{"params": [theirs[n] for n in part], **own} for part, own in zip(parts, settings)])
    for step in range(1, 5):
        grads = params(step)
        now, moments = rule.update(now, grads, moments, step)
        for name, p in theirs.items():
            p.grad = grads[name]
        optimizer.step()
    for name, p in theirs.items():
        torch.testing.assert_close(now[name], p.detach(), rtol=1e-12, atol=1e-14)


RULES = {
    **{name: rule for name, (rule, _, _) in GROUPS.items()},
    "clipped inside": Grouped({"a": Clipped(SGD(lr=0.1), max_norm=0.5), "*": RMSprop(lr=1e-2)}),
    "projected": Projected(Adam(lr=0.3, eps=1e-3), clipped),
    "projected groups": Projected(Grouped({"a": SGD(lr=0.5), "*": SGD(lr=0.1, momentum=0.5)}), clipped),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_pullback_is_the_derivative(rule):
    before, grads = params(), params(1)
    moments = rule.init(before)
    before, moments = rule.update(before, params(2), moments, 1)
    after = rule.update(before, grads, moments, 2)[1]
    of_moments = {m: {n: torch.sin(t + 1) for n, t in tensors.items()} for m, tensors in after.items()}
    cotangent = params(3), of_moments
    expected = torch.func.vjp(lambda p, g, m: rule.update(p, g, m, 2), before, grads, moments)[1](cotangent)
    found = rule.pullback(before, moments, after, 2, lambda: grads)(*cotangent)
    torch.testing.assert_close(found[0], ravel(expected[0]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], ravel(expected[1]), rtol=1e-9, atol=1e-12)
    for moment, tensors in expected[2].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[2][moment][name], tensor, rtol=1e-9, atol=1e-12)


def test_settings_change_one_group():
    rule = Grouped({"a": SGD(lr=1.0), "*": SGD(lr=1.0)}).at({"1": {"lr": 0.5}})
    assert [part.lr for part in rule.rules.values()] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Grouped({}), "dict from groups to rules"),
        (Grouped({"a": torch.optim.SGD}), "rules of ganclean.optim"),
        (Grouped({"a": SGD()}), "is in no group"),
        (Projected(SGD(), lambda values: {"a.w": values["a.w"]}), "after must return all parameters in their shapes"),
        (Projected(SGD(), lambda values: None), "after must return all parameters in their shapes"),
    ],
)
def test_what_makes_no_sense_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        rule.update(params(), params(), rule.init(params()), 1)
