"""GANRedactor: edits a trained GAN so that it stops producing certain samples."""

from __future__ import annotations

import warnings
from dataclasses import replace
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ganclean.data import DataSource
from ganclean.dynamics.capture import AnyStep, CompiledStep
from ganclean.dynamics.randomness import seeded
from ganclean.dynamics.state import TrainingState
from ganclean.dynamics.update import Update
from ganclean.recipes.redacting import NegativeBuffer, check_redactable, check_settings, redaction
from ganclean.redaction._base import BaseRedactor
from ganclean.redaction.criteria import SampleCriterion
from ganclean.redaction.invalidity import residual_invalidity

METHODS = ("auto", "data", "validity", "classifier", "combined")
FEW_SAMPLES = 20


class GANRedactor(BaseRedactor):
    """Edits a trained GAN so that it stops producing samples of a region, and keeps producing all else.

    Both networks are trained a little further on the valid training data, while the discriminator also learns to reject
    samples of the region: known ones, and those that the generator still produces.

    Parameters
    ----------
    generator, discriminator : torch.nn.Module
        The trained networks. They are copied and never changed. Where samples are taken from an averaged generator,
        give that one.
    criterion : Criterion, array-like, Tensor, callable or torch.nn.Module
        What is not to be generated: known samples, a function that is true for valid samples, a classifier that
        returns the probability of being valid, or one of `SampleCriterion`, `ValidityCriterion`,
        `ClassifierCriterion`, `AnyOf`.
    method : {"auto", "data", "validity", "classifier", "combined"}, default="auto"
        What is learned from:

        - data: the known samples and the invalid training instances;
        - validity: these, and the invalid ones among `queries_per_epoch` samples of the generator in every epoch;
        - classifier: the classifier's score, in the generator's loss;
        - combined: all of it;
        - auto: combined with a classifier, data with known samples, and validity otherwise.
    lam : float, default=0.8
        The weight λ of generated samples among what the discriminator is to reject, in (0, 1]; the rest is that of
        the redacted samples. Less redacts faster and costs quality, which more epochs restore; 1 is fine-tuning on the
        sifted data.
    trainer : GANTrainer, optional
        How to train, with the loss and the penalty of the original training; default 20 epochs of
        ``Adam(lr=2e-4, betas=(0.5, 0.99))``. Half of the original learning rate up to all of it, for 5% to 10% of the
        original epochs, is where to start. Its `latent_dim` is that of the generator. Of `updates`, redaction needs the
        objectives of ``ganclean.recipes.gan(...)``. Nothing is recorded.
    label_smoothing : tuple of two floats, default=(0.0, 0.0)
        The probability with which the discriminator is told that a real instance is fake, and a fake one real.
    queries_per_epoch : int, default=1000
        Samples of the generator that are judged before the first epoch and after each.
    buffer_size : int, default=20000
        Redacted samples to keep, the newest ones. Of the valid instances, a refit gets as many at most, at random.
    guide : {"penalty", "guide"}, default="penalty"
        How the score s of a classifier, the probability of being valid over its threshold, enters the generator's loss:
        as the term −`guide_weight` · log s, or by replacing the discriminator's output by
        `guide_floor` + min(s, 1) · (output − `guide_floor`).
    guide_weight : float, default=1.0
        Large weights make samples that please the classifier and nobody else.
    guide_floor : float, default=-4.0
        The discriminator's output on what is surely fake: a logit in the default loss.
    filter_retain : bool, default=True
        Whether invalid instances are left out of the data that count as real.
    target_invalidity : float, optional
        Stop after the first epoch in which no more of the queries than this are invalid.
    n_draws : int, default=4000
        Samples that `invalidity_before_` and `invalidity_after_` are measured on; 0 leaves that out, where a judgement
        is dear.
    verbose : bool, default=False
        Whether to show a progress bar.
    random_state : int, RandomState instance or None
        Determines batches, latents, queries, and what a refit draws from torch's global generators.

    Attributes
    ----------
    generator_, discriminator_ : torch.nn.Module
        The redacted networks in evaluation mode; with a moving average, the averaged generator.
    ema_generator_ : torch.nn.Module or None
        The averaged generator, which `generator_` is then too; None where the trainer keeps no average.
    criterion_ : Criterion
        What samples were judged and scored by; its classifier is a copy where one was refitted.
    state_ : TrainingState
        Where training ended: all parameters, those of the generator beside its average.
    invalidity_before_, invalidity_after_ : Invalidity
        The share of invalid samples with its confidence interval; NaN where the criterion cannot judge samples.
    history_ : dict of str to list
        ``"epoch"`` from 0, ``"invalidity"`` of the queries, ``"n_negatives"`` in the buffer, ``"n_queries"`` so far.
    buffer_ : NegativeBuffer
        The redacted samples that were learned from.
    method_ : str
        The chosen method.
    support_ : ndarray of shape (n_samples,), bool
        The training instances that counted as real.
    n_queries_ : int
        How many samples the criterion judged, training instances included.
    n_steps_ : int
        How many training steps were made.

    Warns
    -----
    UserWarning
        Where theory predicts failure: invalid data that are not sifted out, with too large a `lam`; fewer than 20
        samples of the region; more than half of the samples invalid and no classifier to tell the way out; hardly an
        invalid sample.

    Notes
    -----
    Redaction is not erasure: the networks have learned from the redacted samples, what was learned from them before is
    not forgotten, and further training on them brings them back. Invalidity is a sampled quantity; a search through
    the latents may still find invalid samples, which ``sample(reject=True)`` filters out.

    With an ideal discriminator, the generator's optimum is the distribution of the valid data for every λ. If invalid
    instances make up a share π of the data and are not sifted out, an invalidity of (π − (1 − λ)) / λ remains.

    The labels of a conditional generator are drawn from those of the valid data. To withdraw a whole class, do not
    offer its label: redaction changes what is generated for the others.

    References
    ----------
    Kong, Chaudhuri, Data redaction from pre-trained GANs, 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.redaction import GANRedactor
    >>> X = np.random.default_rng(0).normal(size=(256, 2)).astype("float32")
    >>> gan = GANInfluence(trainer=GANTrainer(n_epochs=20, latent_dim=2), random_state=0).fit(X)
    >>> redactor = GANRedactor(
    ...     gan.generator_,
    ...     gan.discriminator_,
    ...     criterion=lambda x: x[:, 0] < 1,
    ...     trainer=GANTrainer(n_epochs=5, latent_dim=2),
    ...     random_state=0,
    ... ).fit(X)
    >>> redactor.method_, float(redactor.invalidity_after_) < float(redactor.invalidity_before_)
    ('validity', True)
    """

    def __init__(
        self,
        generator=None,
        discriminator=None,
        criterion=None,
        *,
        method="auto",
        lam=0.8,
        trainer=None,
        label_smoothing=(0.0, 0.0),
        queries_per_epoch=1000,
        buffer_size=20000,
        guide="penalty",
        guide_weight=1.0,
        guide_floor=-4.0,
        filter_retain=True,
        target_invalidity=None,
        n_draws=4000,
        verbose=False,
        random_state=None,
    ):
        self.generator = generator
        self.discriminator = discriminator
        self.criterion = criterion
        self.method = method
        self.lam = lam
        self.trainer = trainer
        self.label_smoothing = label_smoothing
        self.queries_per_epoch = queries_per_epoch
        self.buffer_size = buffer_size
        self.guide = guide
        self.guide_weight = guide_weight
        self.guide_floor = guide_floor
        self.filter_retain = filter_retain
        self.target_invalidity = target_invalidity
        self.n_draws = n_draws
        self.verbose = verbose
        self.random_state = random_state

    def _check_parameters(self):
        super()._check_parameters()
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}; got {self.method!r}.")
        check_settings(self.lam, self.guide, self.label_smoothing)
        updates = self._trainer().updates
        given = [updates] if isinstance(updates, Update) else list(updates or ())
        if given and all(isinstance(update, Update) for update in given):
            check_redactable(given)
        for name in ("queries_per_epoch", "buffer_size"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}.")
        if self.target_invalidity is not None and not 0 <= self.target_invalidity <= 1:
            raise ValueError(f"target_invalidity must be None or lie in [0, 1]; got {self.target_invalidity!r}.")

    def _redacting(self, step: AnyStep, state: TrainingState, rejected: DataSource) -> AnyStep:
        self.method_ = self._chosen_method()
        if self.target_invalidity is not None and not self.criterion_.judges:
            raise ValueError("target_invalidity needs a criterion that judges samples; this one only knows some.")
        self.buffer_ = NegativeBuffer(self.buffer_size)
        self._queries = np.random.RandomState(self._seeds["queries"])
        self.history_: dict[str, list] = {"epoch": [], "invalidity": [], "n_negatives": [], "n_queries": []}
        if self.method_ != "classifier":
            self._fill_buffer(rejected)
        self._query(state)
        self._warn_of_residual(len(rejected) / len(self.support_))
        guided = self.method_ in ("classifier", "combined")
        if not guided and self.invalidity_before_.rate > 0.5:
            warnings.warn(
                f"{self.invalidity_before_.rate:.0%} of the samples are invalid. With so few valid ones to move "
                "towards, redaction without a classifier is known to fail: give a ClassifierCriterion, trained on the "
                "answers of this one.",
                stacklevel=3,
            )
        if len(self.buffer_) < FEW_SAMPLES and self.method_ == "data":
            warnings.warn(
                f"Only {len(self.buffer_)} samples of the region are known. Around fewer than {FEW_SAMPLES} the "
                "discriminator may reject valid neighbours; give more, or a criterion that judges samples.",
                stacklevel=3,
            )
        updates = redaction(
            step.updates,
            lam=self.lam,
            buffer=self.buffer_,
            score=self._score if guided else None,
            guide=self.guide,
            guide_weight=self.guide_weight,
            guide_floor=self.guide_floor,
            label_smoothing=self.label_smoothing,
        )
        # What the given step has seen of its objectives is not true of these.
        redacting = replace(step.plain, updates=tuple(updates), seen_calls={}, centred=set())
        # A compiled step takes the classifier for a constant, which it is not where it learns.
        compiles = isinstance(step, CompiledStep) and not (guided and self.criterion_.learns)
        return CompiledStep(redacting) if compiles else redacting

    def _after_epoch(self, state: TrainingState, source: DataSource) -> bool:
        rate = self._query(state)
        if self.method_ == "combined" and self.criterion_.learns and len(self.buffer_):
            self._refit(source)
        return self.target_invalidity is not None and rate <= self.target_invalidity

    def _refit(self, source: DataSource) -> None:
        """Let the classifier learn from valid training instances and from the samples of the region."""
        rows = self._queries.permutation(self._valid_rows)[: self.buffer_size]
        seed = int(self._queries.randint(2**31))
        with seeded(seed, source.device), torch.enable_grad():
            self.criterion_ = self.criterion_.refitted(source[rows.tolist()], self.buffer_.samples)

    def _score(self, samples: Tensor) -> Tensor:
        return self.criterion_.score(samples)

    def _warn_of_residual(self, share: float) -> None:
        lam = float(self.lam) if len(self.buffer_) else 1.0
        residual = 0.0 if self.filter_retain else residual_invalidity(share, lam)
        if residual > 0:
            warnings.warn(
                f"{share:.1%} of the training data are invalid and were not sifted out: with lam={lam:.3g} the optimum "
                f"keeps an invalidity of {residual:.1%}. Set filter_retain=True, or lam to at most {1 - share:.3g}.",
                stacklevel=4,
            )

    def _chosen_method(self) -> str:
        criterion, kind = self.criterion_, type(self.criterion_).__name__
        if self.method == "auto":
            if criterion.is_differentiable:
                return "combined"
            return "validity" if criterion.known() is None else "data"
        if self.method in ("classifier", "combined") and not criterion.is_differentiable:
            raise ValueError(
                f"method={self.method!r} needs a criterion with a differentiable score; {kind} has none. Give a "
                "ClassifierCriterion, or choose 'data' or 'validity'."
            )
        if self.method == "classifier" and criterion.learns:
            raise ValueError(
                "A refit learns from samples of the region, which method='classifier' does not collect. Choose "
                "method='combined'."
            )
        if self.method == "validity" and not criterion.judges:
            raise ValueError(
                f"method='validity' needs a criterion that judges samples, and this {kind} only knows some. Give "
                "match=, or choose method='data'."
            )
        return self.method

    def _fill_buffer(self, rejected: DataSource) -> None:
        """Take known samples, and the training instances that are not among them, into the buffer."""
        like = self._sampler.step.like
        known = self.criterion_.known()
        if known is not None:
            known = known.cast(like.dtype, like.device)
            if self._sampler.step.conditional and known.labels is None:
                raise ValueError("The networks are conditional: SampleCriterion(samples, labels=...) needs labels too.")
            self._add(known, np.ones(len(known), dtype=bool))
        if len(rejected):
            new = np.ones(len(rejected), dtype=bool)
            if known is not None:
                batches = rejected.batches()
                new = np.concatenate([SampleCriterion(known.data).keeps(batch) for batch in batches])
            self._add(rejected, new)
        if self.method_ == "data" and not len(self.buffer_):
            raise ValueError(
                "method='data' has nothing to learn from: no samples of the region are known, and no training instance "
                "lies in it. Choose method='validity', which judges what the generator produces."
            )

    def _add(self, source: DataSource, mask: np.ndarray) -> None:
        start = 0
        for batch, labels in source.labelled_batches():
            chosen = np.flatnonzero(mask[start : start + len(batch)])
            self.buffer_.add(
                batch[chosen], labels[chosen] if self._sampler.step.conditional and labels is not None else None
            )
            start += len(batch)

    def _query(self, state: TrainingState) -> float:
        """Judge samples of the generator where that is needed, and return the invalid share."""
        rate = np.nan
        refills = self.method_ == "validity" or (self.method_ == "combined" and self.criterion_.judges)
        if refills or self.target_invalidity is not None:
            samples, labels = self._sampler.draw(state, self.queries_per_epoch, self._queries)
            invalid = ~self._judged(samples)
            rate = float(invalid.mean())
            if refills:
                rows = np.flatnonzero(invalid)
                self.buffer_.add(samples[rows], None if labels is None else labels[rows])
        entry = {"epoch": len(self.history_["epoch"]), "invalidity": rate}
        for name, value in (entry | {"n_negatives": len(self.buffer_), "n_queries": self.n_queries_}).items():
            self.history_[name].append(value)
        return rate
