"""What redaction is to achieve on real images: handwritten digits, three labels, by judges that it has not seen."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.redaction import (
    digits_task,
    measured,
    principal_components,
    redactor_of,
    regions,
    run_task,
    shortened,
    trained,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module", params=[0, 1], ids=lambda seed: f"seed {seed}")
def trained_digits(request):
    seed = request.param
    task = digits_task(seed, quick=False)
    *networks, seconds = trained(task, seed)
    return SimpleNamespace(
        task=task,
        networks=networks,
        seconds=seconds,
        seed=seed,
        regions=regions("digits", task, [0, 3, 8], seed),
        features=principal_components(task.X),
    )


def outcome(digits, region, method, **settings):
    redactor = redactor_of(method, digits.networks, digits.task, region, digits.seed, **settings)
    return measured(redactor, digits.task, region, digits.features)


@pytest.mark.parametrize("label", [0, 1, 2], ids=["0", "3", "8"])
def test_a_label_is_redacted_at_a_fraction_of_the_cost_and_better_than_by_deletion(label, trained_digits):
    region = trained_digits.regions[label]
    deletion = outcome(trained_digits, region, "deletion")["invalidity"]
    for method in ("data", "validity"):
        found = outcome(trained_digits, region, method)
        assert found["invalidity_before"] > 0.06
        assert found["invalidity"] <= 0.01 and found["invalidity"] <= 0.6 * deletion
        assert found["frechet_distance"] <= 1.15 * found["frechet_before"]
        assert found["recall"] >= found["recall_before"] - 0.15
        assert found["seconds"] <= 0.35 * trained_digits.seconds


def test_invalidity_falls_strictly_with_lam_after_three_epochs(trained_digits):
    three = shortened(trained_digits.task.trainer, 3)
    for region in trained_digits.regions:
        rates = [
            outcome(trained_digits, region, "data", lam=lam, trainer=three)["invalidity"] for lam in (1.0, 0.8, 0.5)
        ]
        assert rates[0] > rates[1] > rates[2] and rates[2] <= 0.4 * rates[0]


def test_unsifted_data_leave_about_the_predicted_invalidity(trained_digits):
    region = trained_digits.regions[1]
    kept, gone = (
        outcome(trained_digits, region, "data", lam=lam, filter_retain=False)["invalidity"] for lam in (0.95, 0.5)
    )
    assert kept > 0.03 and gone < 0.01


def test_redactions_are_cumulative_or_relapse():
    args = SimpleNamespace(quick=False, labels=[0, 3, 8], seeds=[0], methods=[], experiments=["relapse", "cumulative"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = run_task("digits", args, 0)
    after = {(row["experiment"], row["method"], row["region"]): row["invalidity"] for row in rows}
    relapsed = [rate for (experiment, *_), rate in after.items() if experiment == "relapse"]
    assert np.min(relapsed) > 0.05
    assert after["cumulative", "only the second", "label 3"] > 0.05
    assert after["cumulative", "AnyOf both", "label 3"] < 0.025 and after["cumulative", "AnyOf both", "label 8"] < 0.025
