"""What the theory of redaction says of a space of a few points, by closed forms and by a general-purpose solver."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import rel_entr


def optimal_discriminator(p_real, p_fake, alpha_real=1.0, alpha_fake=0.0):
    """The probability of being real that the best discriminator gives each point, with smoothed targets."""
    return (alpha_real * p_real + alpha_fake * p_fake) / (p_real + p_fake)


def divergence(p, q):
    """The Jensen-Shannon divergence of two distributions."""
    middle = (p + q) / 2
    return (rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2


def optimal_generator(p_real, p_redacted, lam):
    """The distribution whose mixture with the redacted one diverges least from the data's, by sequential quadratics."""
    n = len(p_real)
    best = minimize(
        lambda q: divergence(p_real, lam * np.clip(q, 0, None) + (1 - lam) * p_redacted),
        np.full(n, 1 / n),
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 2000},
    )
    return best.x


def invalid_after_deletion(half_width):
    """The mass of |x| < a under a standard normal, before and after all of it is deleted and a Gaussian refitted."""
    from scipy.stats import norm

    inside = norm.cdf(half_width) - norm.cdf(-half_width)
    # The variance of what is left: E[x²] outside, by partial integration.
    variance = (1 - (inside - 2 * half_width * norm.pdf(half_width))) / (1 - inside)
    refitted = norm(scale=np.sqrt(variance))
    return inside, refitted.cdf(half_width) - refitted.cdf(-half_width)
