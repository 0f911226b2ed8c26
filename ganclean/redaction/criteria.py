"""Criteria of redaction: what a generator is not to produce, told by examples, by a rule or by a classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from torch.utils.data import Dataset

from ganclean.data import DataSource, as_source
from ganclean.dynamics.network import copied

Samples = Any
"""A batch of samples: an array or a tensor of shape (n, *sample_shape)."""


class Criterion(BaseEstimator):
    """Base class of the criteria: a region that a generator is not to produce samples in.

    A criterion of one's own subclasses this, sets what it can do, and defines the methods for it.

    Attributes
    ----------
    judges : bool
        Whether `is_valid` tells of any sample.
    is_differentiable : bool
        Whether there is a `score`.
    learns : bool
        Whether the score follows the generator: `refitted` returns another one.
    """

    judges: bool = True
    is_differentiable: bool = False
    learns: bool = False

    def is_valid(self, samples: Samples) -> np.ndarray:
        """Return which samples lie outside of the region, shape (n,), bool."""
        raise NotImplementedError

    def score(self, samples: Tensor) -> Tensor:
        """Return how valid samples are, shape (n,), differentiable: from 0, and at least 1 where they are valid."""
        raise NotImplementedError

    def keeps(self, samples: Samples) -> np.ndarray:
        """Return which training instances may be learned from, shape (n,), bool: where it judges, the valid ones."""
        return self.is_valid(samples)

    def known(self) -> DataSource | None:
        """Return known samples of the region, with their labels where there are any."""
        return None

    def refitted(self, valid: Tensor, invalid: Tensor) -> Criterion:
        """Return the criterion with a score that has learned from more samples; itself stays as it is."""
        return self


class SampleCriterion(Criterion):
    """The region that some known samples stand for, such as the training images of one label.

    Parameters
    ----------
    samples : array-like, Tensor or Dataset of shape (n, *sample_shape)
    match : callable, optional
        Whether samples are valid, as of `ValidityCriterion`. It sifts the training data and measures the outcome.
        Without it, those training instances are left out that equal a known sample in single precision, and what the
        generator produces cannot be judged.
    labels : array-like of shape (n, ...), optional
        Of the samples, where the networks are conditional.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.redaction import SampleCriterion
    >>> SampleCriterion(np.array([[1.0, 2.0]])).keeps(np.array([[1.0, 2.0], [2.0, 1.0]]))
    array([False,  True])
    """

    def __init__(self, samples, match=None, labels=None):
        self.samples = samples
        self.match = match
        self.labels = labels

    @classmethod
    def from_cleanser(cls, cleanser, X=None, y=None, match=None) -> SampleCriterion:
        """Return the criterion of the instances that a fitted cleanser drops.

        Parameters
        ----------
        cleanser : Cleanser
            `GANInfluence` or any other with a `support_`.
        X : array-like, Tensor or Dataset, optional
            What it was fitted on; `GANInfluence` knows.
        y : array-like, optional
            The labels of conditional networks.
        match : callable, optional

        Raises
        ------
        ValueError
            If the cleanser drops nothing, or does not know what it was fitted on.
        """
        rows = np.flatnonzero(~cleanser.get_support())
        if not len(rows):
            raise ValueError("The cleanser drops nothing, so that there is nothing to redact: raise its n_remove.")
        if X is not None:
            source = DataSource(X, labels=y)
        elif hasattr(cleanser, "trajectory_"):
            source = cleanser.trajectory_.source
        else:
            raise ValueError(
                f"{type(cleanser).__name__} does not keep its data: call from_cleanser(cleanser, X) with what it was "
                "fitted on."
            )
        labels = None if source.labels is None else source.labels[torch.from_numpy(rows)]
        return cls(source[rows.tolist()], match, labels)

    @property
    def judges(self) -> bool:  # type: ignore[override]
        return self.match is not None

    def is_valid(self, samples):
        return _as_mask(self.match(samples), len(samples), "match")

    def keeps(self, samples):
        if self.judges:
            return self.is_valid(samples)
        known = {row for batch in as_source(self.samples).batches() for row in _rows(batch)}
        return np.array([row not in known for row in _rows(torch.as_tensor(samples))], dtype=bool)

    def known(self):
        return DataSource(self.samples, labels=self.labels)


class ValidityCriterion(Criterion):
    """The region where a function says no. It is only called, so that a rule, any model or a person will do.

    Parameters
    ----------
    function : callable
        From a batch of samples to one truth value each, shape (n,) or (n, 1), true where they are valid. The batch is a
        NumPy array where the redactor was fitted to one, and a tensor where it was fitted to a tensor or a Dataset.
    batch_size : int, default=1024
        The most samples in one call.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.redaction import ValidityCriterion
    >>> ValidityCriterion(lambda x: x[:, 0] > 0).is_valid(np.array([[1.0], [-1.0]]))
    array([ True, False])
    """

    def __init__(self, function, batch_size=1024):
        self.function = function
        self.batch_size = batch_size

    @torch.no_grad()
    def is_valid(self, samples):
        starts = range(0, len(samples), self.batch_size)
        batches = (samples[start : start + self.batch_size] for start in starts)
        return np.concatenate(
            [_as_mask(self.function(batch), len(batch), "the validity function") for batch in batches]
        )


class ClassifierCriterion(Criterion):
    """The region where a differentiable classifier finds samples invalid, which shows the generator a way out of it.

    Parameters
    ----------
    model : torch.nn.Module or callable
        From a tensor of samples to probabilities of being valid, shape (n,) or (n, 1); with `invalid_class`, to the
        logits of classes, shape (n, n_classes). A module is called in evaluation mode, and nothing in it changes.
    threshold : float, default=0.5
        The lowest probability of a valid sample, in (0, 1].
    invalid_class : int or list of int, optional
        The classes that are not to be produced.
    refit : callable, optional
        Lets the score follow what the generator has come to produce, such as a `CrossEntropyRefit`.
        ``refit(model, valid, invalid)`` is called after each epoch of a `GANRedactor` with ``method="combined"``. It
        trains the model, which is a copy, or returns another; the tensors are valid training instances and the samples
        of the region that are known by then. Samples are still judged by the model as given, so that before and after
        compare; in `AnyOf`, by the other parts too, from which the classifier then learns.

    Attributes
    ----------
    model_ : torch.nn.Module or callable
        The refitted copy that scores; only a criterion that `refitted` returned has one.

    Examples
    --------
    >>> import torch
    >>> from ganclean.redaction import ClassifierCriterion
    >>> criterion = ClassifierCriterion(lambda x: x, invalid_class=0)
    >>> criterion.is_valid(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    array([False,  True])
    """

    is_differentiable = True

    def __init__(self, model, threshold=0.5, invalid_class=None, refit=None):
        self.model = model
        self.threshold = threshold
        self.invalid_class = invalid_class
        self.refit = refit

    @property
    def learns(self) -> bool:  # type: ignore[override]
        if self.refit is not None and not callable(self.refit):
            raise ValueError(f"refit must be a function of a model, valid and invalid samples; got {self.refit!r}.")
        return self.refit is not None

    @torch.no_grad()
    def is_valid(self, samples):
        return torch.cat([self._score(self.model, batch) for batch in as_source(samples).batches()]).cpu().numpy() >= 1

    def score(self, samples):
        return self._score(getattr(self, "model_", self.model), samples)

    def refitted(self, valid, invalid):
        if not self.learns:
            return self
        model = getattr(self, "model_", self.model)
        model = copied(model) if isinstance(model, nn.Module) else copy.deepcopy(model)
        returned = self.refit(model, valid, invalid)
        criterion = copy.copy(self)
        criterion.model_ = model if returned is None else returned
        return criterion

    def _score(self, model: Callable, samples: Tensor) -> Tensor:
        if not isinstance(self.threshold, Real) or not 0 < float(self.threshold) <= 1:
            raise ValueError(f"threshold must lie in (0, 1]; got {self.threshold!r}.")
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        with _evaluating(model):
            output = model(samples if parameter is None else samples.to(parameter))
        return self._probability(output, len(samples)).to(samples.dtype) / float(self.threshold)

    def _probability(self, output: Any, n: int) -> Tensor:
        """Return the probability of being valid, from what the model returned."""
        if self.invalid_class is not None:
            invalid = np.atleast_1d(self.invalid_class).tolist()
            if isinstance(output, Tensor) and output.ndim == 2 and len(output) == n and max(invalid) < output.shape[1]:
                # Not one minus the invalid part, which rounds to zero where the classifier is sure.
                valid = [k for k in range(output.shape[1]) if k not in invalid]
                return output.softmax(dim=1)[:, valid].sum(dim=1)
            expected = f"logits of shape ({n}, n_classes) with n_classes > {max(invalid)}"
        elif isinstance(output, Tensor) and output.shape in ((n,), (n, 1)):
            probability = output.reshape(n)
            if bool(((probability >= 0) & (probability <= 1)).all()):
                return probability
            raise ValueError(
                "The classifier returned numbers outside of [0, 1]; expected probabilities of being valid. End it in a "
                "sigmoid, or give the logits of classes and invalid_class."
            )
        else:
            expected = f"probabilities of shape ({n},) or ({n}, 1); for the logits of classes, give invalid_class"
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"The classifier returned {got} for {n} samples; expected {expected}.")


class AnyOf(Criterion):
    """The union of several regions: what one redaction took away and what the next is to take away too.

    Parameters
    ----------
    criteria : list
        Criteria, or what `as_criterion` makes one of.

    Notes
    -----
    Samples are judged by those criteria that can judge, and scored by those that have a score.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.redaction import AnyOf
    >>> AnyOf([lambda x: x[:, 0] > 0, lambda x: x[:, 0] < 2]).is_valid(np.array([[1.0], [-1.0], [3.0]]))
    array([ True, False, False])
    """

    def __init__(self, criteria):
        self.criteria = criteria

    @property
    def judges(self) -> bool:  # type: ignore[override]
        return any(part.judges for part in self._parts())

    @property
    def is_differentiable(self) -> bool:  # type: ignore[override]
        return any(part.is_differentiable for part in self._parts())

    @property
    def learns(self) -> bool:  # type: ignore[override]
        return any(part.learns for part in self._parts())

    def is_valid(self, samples):
        return np.logical_and.reduce([part.is_valid(samples) for part in self._parts() if part.judges])

    def score(self, samples):
        scores = [part.score(samples) for part in self._parts() if part.is_differentiable]
        return torch.stack(scores).amin(dim=0)

    def keeps(self, samples):
        return np.logical_and.reduce([part.keeps(samples) for part in self._parts()])

    def known(self):
        sources = [source for source in (part.known() for part in self._parts()) if source is not None]
        if not sources:
            return None
        labels = [source.labels for source in sources]
        return DataSource(
            torch.cat([batch for source in sources for batch in source.batches()]),
            labels=None if any(part is None for part in labels) else torch.cat(labels),
        )

    def refitted(self, valid, invalid):
        return AnyOf([part.refitted(valid, invalid) for part in self._parts()])

    def _parts(self) -> list[Criterion]:
        return [as_criterion(part) for part in self.criteria]


def as_criterion(criterion: Any) -> Criterion:
    """Return a criterion as it is, and make one of a module, a function, or known samples.

    A module is a classifier of valid samples, any other callable a validity function, anything else known samples.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, nn.Module):
        return ClassifierCriterion(criterion)
    if callable(criterion):
        return ValidityCriterion(criterion)
    if isinstance(criterion, (np.ndarray, Tensor, Dataset)) or hasattr(criterion, "__array__"):
        return SampleCriterion(criterion)
    raise ValueError(
        "criterion must say what is not to be generated: known samples (an array or a tensor), a function that says "
        f"which samples are valid, a classifier (a module), or a Criterion; got {criterion!r}."
    )


def _rows(samples: Tensor) -> Iterator[bytes]:
    """Yield the content of each sample, in single precision."""
    # Zero is added since -0.0 and 0.0 differ in their bytes.
    for row in samples.detach().cpu().float().flatten(1).numpy() + 0.0:
        yield row.tobytes()


def _as_mask(answer: Any, n: int, whose: str) -> np.ndarray:
    mask = answer.detach().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
    if mask.shape not in ((n,), (n, 1)) or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"{whose} returned {mask.dtype} of shape {mask.shape} for {n} samples; expected one truth value each, true "
            "where the sample is valid."
        )
    return mask.reshape(n).astype(bool)


@contextmanager
def _evaluating(model: Callable) -> Iterator[None]:
    """Put a module into evaluation mode inside the block, and back afterwards."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
