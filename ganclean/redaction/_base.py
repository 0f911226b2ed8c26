"""What the redactor and its baselines share: sift the data, train, and measure before and after."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ganclean.data import DataSource, checked_data, take
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.network import loaded
from ganclean.dynamics.state import TrainingState
from ganclean.exceptions import NetworkError
from ganclean.optim import Adam
from ganclean.progress import progress_bars
from ganclean.redaction.criteria import Criterion, as_criterion
from ganclean.redaction.invalidity import Invalidity
from ganclean.redaction.report import LARGE_RECALL_DROP, RedactionReport, quality_of
from ganclean.redaction.sampling import Drawn, Sampler
from ganclean.training.preparation import labels_for, prepared
from ganclean.training.trainer import GANTrainer


class BaseRedactor(BaseEstimator):
    """Base class of what makes a trained generator stop producing certain samples.

    Plain, it is fine-tuning on the sifted data. A subclass says what else the training step learns from (`_redacting`)
    and what happens after an epoch (`_after_epoch`).
    """

    generator: Any
    discriminator: Any
    criterion: Any
    trainer: GANTrainer | None
    filter_retain: bool = True
    n_draws: int
    verbose: bool
    random_state: Any
    _needs: tuple[str, ...] = ("generator", "discriminator")

    def __sklearn_is_fitted__(self) -> bool:
        """A fit that failed half-way leaves what it had computed, but no final state."""
        return hasattr(self, "state_")

    def fit(self, X=None, y=None):
        """Redact copies of the generator and the discriminator.

        Parameters
        ----------
        X : array-like, Tensor or map-style Dataset of shape (n_samples, *sample_shape), optional
            The training data, on the scale of the generator's output. Without them, `n_draws` samples of the generator
            itself that the criterion finds valid take their place, which costs variety.
        y : array-like of shape (n_samples, ...), optional
            The labels of conditional networks; a Dataset's items can hold them too. Otherwise ignored.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter or the data are not as expected, or hardly any instance is valid.
        NetworkError
            If a network is missing or does not fit.
        NonFiniteError
            If training diverges.
        """
        vars(self).pop("state_", None)
        self._check_parameters()
        self.criterion_ = as_criterion(self.criterion)
        self.n_queries_ = 0
        rng = check_random_state(self.random_state)
        seeds = {name: int(rng.randint(2**31)) for name in ("initial", "training", "evaluation", "queries")}
        if X is None:
            X = self._own_samples(seeds["initial"])
        trainer, step, source, rejected = self._sifted(X, y, seeds["initial"])
        labels = None if source.labels is None else source.labels_of(torch.arange(len(source)))
        self._sampler, self._seeds = Sampler(step, labels), seeds
        state = step.initial_state()
        self.invalidity_before_ = self._invalidity(state)
        self._warn_of_the_beginning()
        step = self._redacting(step, state, rejected)
        state = self._trained(trainer, step, source)
        self.generator_ = loaded(step.generator, state.module_values("G"))
        self.ema_generator_ = self.generator_ if state.average else None
        self.discriminator_ = loaded(step.discriminator, state.module_values("D"))
        self.invalidity_after_ = self._invalidity(state)
        self.state_ = state
        return self

    def sample(self, n_samples=1, *, reject=False):
        """Generate samples, as ``GaussianMixture.sample``.

        Parameters
        ----------
        n_samples : int, default=1
        reject : bool, default=False
            Whether to draw until `n_samples` are valid and leave the others out.

        Returns
        -------
        samples : ndarray or Tensor of shape (n_samples, *sample_shape)
            A tensor where the training data were a tensor or a Dataset.
        labels : ndarray or Tensor of shape (n_samples, ...), or None
            What a conditional generator made them for.

        Raises
        ------
        ValueError
            If `reject` and the criterion cannot judge samples.
        RuntimeError
            If hardly any sample is valid.
        """
        check_is_fitted(self)
        rng = check_random_state(self.random_state)
        both = self._valid_samples(n_samples, rng) if reject else self._sampler.draw(self.state_, n_samples, rng)
        return tuple(None if t is None else self._as_given(t) for t in both)

    def score(self, X=None, y=None):
        """Return the share of valid samples among `n_draws`: one minus the invalidity.

        Parameters
        ----------
        X, y : ignored
        """
        check_is_fitted(self)
        return 1 - float(self.invalidity_after_)

    def report(self, X_ref, *, evaluator=None, feature_extractor=None, n=4000) -> RedactionReport:
        """Compare the generator before and after on data that hold nothing of what is redacted.

        Parameters
        ----------
        X_ref : array-like, Tensor or Dataset of shape (n_reference, *sample_shape)
            Held-out instances, all valid: with invalid ones among them, distances rise as redaction succeeds.
        evaluator : callable or Criterion, optional
            What judges samples independently of the criterion, true where they are valid; a function gets arrays or
            tensors as the training data were.
        feature_extractor : module, callable, "inception", "pixels" or None
            Of the Fréchet distance and of precision and recall, as of `FID`.
        n : int, default=4000
            Samples to compare.

        Returns
        -------
        RedactionReport

        Warns
        -----
        UserWarning
            If recall fell by more than 0.1: the generator has lost variety.
        """
        check_is_fitted(self)
        reference = DataSource(X_ref)
        before, after = self.before_and_after(n)
        report = RedactionReport(
            invalidity=(self.invalidity_before_, self.invalidity_after_),
            evaluated=None if evaluator is None else self._evaluated(as_criterion(evaluator), before, after, reference),
            quality=quality_of((before, after), reference, feature_extractor),
            n_queries=self.n_queries_,
            n_steps=self.n_steps_,
        )
        if report.recall_drop > LARGE_RECALL_DROP:
            warnings.warn(
                f"Recall fell by {report.recall_drop:.2f}: the generator has lost variety. Lower the learning rate, "
                "raise lam and the number of epochs, and learn from the training data where it was the generator's "
                "own samples.",
                stacklevel=2,
            )
        return report

    def before_and_after(self, n_samples=1) -> tuple[Tensor, Tensor]:
        """Return samples of the given and of the redacted generator, made of the same latents.

        Parameters
        ----------
        n_samples : int, default=1

        Returns
        -------
        before, after : Tensor of shape (n_samples, *sample_shape)
        """
        check_is_fitted(self)
        seed = check_random_state(self.random_state).randint(2**31)
        states = self._sampler.step.initial_state(), self.state_
        before, after = (self._sampler.draw(state, n_samples, np.random.RandomState(seed))[0] for state in states)
        return before, after

    def _evaluated(self, judge: Criterion, before: Tensor, after: Tensor, reference: DataSource):
        """Return the invalidity by another judge, before, after, and of the reference."""
        if not judge.judges:
            raise ValueError(
                "evaluator must judge samples; known samples alone do not. Give a function or a classifier."
            )
        judged = (judge.is_valid(self._as_given(samples)) for samples in (before, after))
        floor = np.concatenate([judge.is_valid(self._as_given(batch)) for batch in reference.batches()])
        return tuple(map(Invalidity.of, (*judged, floor)))

    def _check_parameters(self) -> None:
        for player in self._needs:
            if not isinstance(getattr(self, player), nn.Module):
                raise NetworkError(
                    f"{player} must be a trained torch.nn.Module; got {getattr(self, player)!r}. Redaction goes on "
                    "with both networks where training ended: the discriminator knows what is real. Where it was not "
                    "kept, train one against the frozen generator first."
                )
        if self.trainer is not None and not isinstance(self.trainer, GANTrainer):
            raise ValueError(f"trainer must be a GANTrainer or None; got {self.trainer!r}.")

    def _trainer(self) -> GANTrainer:
        if self.trainer is not None:
            return self.trainer
        return GANTrainer(optimizer=Adam(lr=2e-4, betas=(0.5, 0.99)), n_epochs=20)

    def _own_samples(self, seed: int) -> Tensor:
        """Return valid samples of the generator, to be trained on in place of the data."""
        trainer = self._trainer()
        if trainer.conditional:
            raise ValueError("Conditional networks need the training data and their labels: call fit(X, y).")
        if not self.criterion_.judges:
            raise ValueError(
                "Without training data, the criterion has to sift the generator's own samples, and this one cannot "
                "judge samples. Call fit(X), or give a criterion that can: SampleCriterion(samples, match=is_valid)."
            )
        warnings.warn(
            "Without training data, the generator learns from samples of its own, which costs variety: compare recall "
            "before and after with report().",
            stacklevel=3,
        )
        step = trainer.make_step(self.generator, self.discriminator)
        return Sampler(step).draw(step.initial_state(), max(self.n_draws, 2), np.random.RandomState(seed))[0]

    def _sifted(self, X: Any, y: Any, seed: int) -> tuple[GANTrainer, AnyStep, DataSource, DataSource]:
        """Check the data and set aside what is not to be learned from; return the latter as the last."""
        data = checked_data(X)
        self._returns_arrays = isinstance(data, np.ndarray)
        trainer = self._trainer()
        labels = labels_for(data, y, trainer.conditional or trainer.updates is not None)
        everything = DataSource(data, labels=labels)
        batches = [self.criterion_.keeps(self._as_given(batch)) for batch in everything.batches()]
        kept = np.concatenate(batches)
        if self.criterion_.judges:
            self.n_queries_ += len(kept)
        self.support_ = kept if self.filter_retain else np.ones_like(kept)
        if self.support_.sum() < 2:
            raise ValueError(
                f"Only {self.support_.sum()} of {len(kept)} training instances are valid; redaction learns from valid "
                "ones. Check which way round the criterion is: it says which samples are valid."
            )
        self._valid_rows = np.flatnonzero(kept[self.support_])
        rows, rest = np.flatnonzero(self.support_), np.flatnonzero(~kept)
        trainer, step, source = prepared(
            self.generator,
            self.discriminator,
            trainer,
            take(data, rows),
            None if labels is None else labels[torch.from_numpy(rows)],
            seed,
        )
        rejected = DataSource(take(data, rest), labels=None if labels is None else labels[torch.from_numpy(rest)])
        return trainer, step, source, rejected.cast(source.dtype, source.device)

    def _redacting(self, step: AnyStep, state: TrainingState, rejected: DataSource) -> AnyStep:
        """Return the step that redacts, given the state before and the training instances that were set aside."""
        return step

    def _trained(self, trainer: GANTrainer, step: AnyStep, source: DataSource) -> TrainingState:
        """Train and return the state in the end."""
        steps_per_epoch = -(-len(source) // trainer.batch_size_for(len(source)))
        run = trainer.run(step, source, step.initial_state(), self._seeds["training"])
        with progress_bars(self.verbose) as progress:
            for record, state in run:
                self.n_steps_ = record.index + 1
                if progress is not None:
                    progress("redaction", self.n_steps_, steps_per_epoch * int(trainer.n_epochs))
                if self.n_steps_ % steps_per_epoch == 0 and self._after_epoch(state, source):
                    break
        return state

    def _after_epoch(self, state: TrainingState, source: DataSource) -> bool:
        """Return whether to stop after an epoch."""
        return False

    def _warn_of_the_beginning(self) -> None:
        before = self.invalidity_before_
        if before.n_samples and before.rate * before.n_samples < 3:
            warnings.warn(
                f"Hardly anything is there to redact: the invalidity of the generator is {before} of "
                f"{before.n_samples} samples.",
                stacklevel=3,
            )

    def _invalidity(self, state: TrainingState) -> Invalidity:
        """Return how often a state's generator produces what it should not, on the same draws for every state."""
        if not self.criterion_.judges or not self.n_draws:
            return Invalidity()
        samples, _ = self._sampler.draw(state, self.n_draws, np.random.RandomState(self._seeds["evaluation"]))
        return Invalidity.of(self._judged(samples))

    def _judged(self, samples: Tensor) -> np.ndarray:
        """Return which samples the criterion finds valid, and count the queries."""
        self.n_queries_ += len(samples)
        return self.criterion_.is_valid(self._as_given(samples))

    def _valid_samples(self, n_samples: int, rng: np.random.RandomState) -> Drawn:
        if not self.criterion_.judges:
            raise ValueError("reject=True needs a criterion that judges samples; this one only knows some of them.")
        criterion = self.criterion_
        return self._sampler.draw_valid(self.state_, n_samples, rng, lambda x: criterion.is_valid(self._as_given(x)))

    def _as_given(self, tensor: Tensor) -> Any:
        """Return a tensor in the container that the training data came in."""
        return tensor.cpu().numpy() if self._returns_arrays else tensor
