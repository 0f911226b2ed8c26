"""A classifier that goes on learning while the generator that it guides is redacted."""

from __future__ import annotations

import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


class CrossEntropyRefit(BaseEstimator):
    """Trains a classifier by a few steps of Adam on the binary cross-entropy of valid against invalid samples.

    Half of each batch is valid. The classifier stays in evaluation mode: the statistics of batch normalisation do not
    move, and nothing is dropped out.

    Parameters
    ----------
    invalid_class : int or list of int, optional
        As of the `ClassifierCriterion` that this is the `refit` of.
    n_steps : int, default=20
    lr : float, default=1e-3
        Learning rate of Adam.
    batch_size : int, default=64

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from ganclean.redaction import ClassifierCriterion, CrossEntropyRefit
    >>> classifier = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid())
    >>> criterion = ClassifierCriterion(classifier, refit=CrossEntropyRefit(n_steps=200, lr=0.1))
    >>> valid, invalid = torch.ones(10, 1), -torch.ones(10, 1)
    >>> bool((criterion.refitted(valid, invalid).score(invalid) < 0.1).all())
    True
    """

    def __init__(self, invalid_class=None, n_steps=20, lr=1e-3, batch_size=64):
        self.invalid_class = invalid_class
        self.n_steps = n_steps
        self.lr = lr
        self.batch_size = batch_size

    def __call__(self, model: nn.Module, valid: Tensor, invalid: Tensor) -> None:
        """Train the model in place.

        Parameters
        ----------
        model : torch.nn.Module
            Returns the probability of being valid, or logits of classes where `invalid_class` is given.
        valid, invalid : Tensor of shape (n, *sample_shape)
        """
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"CrossEntropyRefit trains a torch.nn.Module; the classifier is {model!r}. Give a function of your own."
            )
        parameters, half = list(model.eval().requires_grad_().parameters()), max(1, self.batch_size // 2)
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        for _ in range(self.n_steps):
            batch = torch.cat([part[torch.randint(len(part), (half,))] for part in (valid, invalid)])
            odds = self._log_odds(model(batch.to(parameters[0])))
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(odds, (torch.arange(len(odds)) < half).to(odds)).backward()
            optimizer.step()
        # It is only called from now on.
        model.requires_grad_(False)

    def _log_odds(self, output: Tensor) -> Tensor:
        """Return the logarithm of the odds of being valid; of logits, exact where the classifier is sure."""
        if self.invalid_class is None:
            return output.reshape(len(output)).logit(eps=torch.finfo(output.dtype).eps)
        invalid = torch.zeros(output.shape[1], dtype=torch.bool, device=output.device)
        invalid[self.invalid_class] = True
        return output[:, ~invalid].logsumexp(dim=1) - output[:, invalid].logsumexp(dim=1)
