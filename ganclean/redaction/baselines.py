"""What redaction has to beat: deletion by fine-tuning or by retraining, and rejection of samples."""

from __future__ import annotations

from sklearn.base import clone
from sklearn.utils import check_random_state
from torch import nn

from ganclean.dynamics.randomness import seeded
from ganclean.exceptions import NetworkError
from ganclean.redaction._base import BaseRedactor


class DeletionFineTuner(BaseRedactor):
    """Deletion by fine-tuning: ordinary training of both networks, a little further, on the valid data alone.

    It is `GANRedactor` with ``lam=1`` and no classifier, the control of the same budget.

    Parameters
    ----------
    generator, discriminator, criterion, trainer, n_draws, verbose, random_state
        As of `GANRedactor`; the criterion sifts the data and measures.

    Attributes
    ----------
    generator_, ema_generator_, discriminator_, state_, criterion_, support_, n_queries_, n_steps_
        As of `GANRedactor`.
    invalidity_before_, invalidity_after_ : Invalidity
        As of `GANRedactor`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from ganclean import GANTrainer
    >>> from ganclean.redaction import DeletionFineTuner
    >>> X = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
    >>> G, D = nn.Linear(2, 2), nn.Linear(2, 1)
    >>> trainer = GANTrainer(n_epochs=1, latent_dim=2)
    >>> tuner = DeletionFineTuner(G, D, lambda x: x[:, 0] < 1, trainer=trainer, random_state=0).fit(X)
    >>> int(tuner.support_.sum())
    111
    """

    def __init__(
        self,
        generator=None,
        discriminator=None,
        criterion=None,
        *,
        trainer=None,
        n_draws=4000,
        verbose=False,
        random_state=None,
    ):
        self.generator = generator
        self.discriminator = discriminator
        self.criterion = criterion
        self.trainer = trainer
        self.n_draws = n_draws
        self.verbose = verbose
        self.random_state = random_state


class RetrainingRedactor(DeletionFineTuner):
    """Exact deletion: new networks, trained from the start on the valid data alone.

    Even so, a generator may produce what was deleted: it interpolates between what remains.

    Parameters
    ----------
    generator, discriminator : torch.nn.Module
        The trained networks, to compare with.
    criterion, n_draws, verbose, random_state
        As of `GANRedactor`.
    make_networks : callable
        Without arguments, to a new pair (generator, discriminator) of the same architecture.
    trainer : GANTrainer, optional
        The original one.

    Attributes
    ----------
    generator_, ema_generator_, discriminator_, state_, criterion_, support_, n_queries_, n_steps_
        As of `GANRedactor`.
    invalidity_before_, invalidity_after_ : Invalidity
        As of `GANRedactor`.
    """

    def __init__(
        self,
        generator=None,
        discriminator=None,
        criterion=None,
        *,
        make_networks=None,
        trainer=None,
        n_draws=4000,
        verbose=False,
        random_state=None,
    ):
        super().__init__(
            generator,
            discriminator,
            criterion,
            trainer=trainer,
            n_draws=n_draws,
            verbose=verbose,
            random_state=random_state,
        )
        self.make_networks = make_networks

    def _redacting(self, step, state, rejected):
        trainer = clone(self._trainer()).set_params(conditional=step.conditional)
        with seeded(self._seeds["initial"]):
            new = trainer.make_step(*self.make_networks())
        for player in ("generator", "discriminator"):
            if _shapes(getattr(new, player)) != _shapes(getattr(step, player)):
                raise NetworkError(f"make_networks returned a {player} of another architecture than the trained one.")
        return new


class RejectionSampler(DeletionFineTuner):
    """Rejection: the generator stays as it is, and what the criterion finds invalid is drawn again.

    Nothing invalid comes out, at 1 / (1 − invalidity) draws for a sample, as long as the criterion is at hand. Whoever
    has the generator can leave it out.

    Parameters
    ----------
    generator, discriminator, criterion, trainer, n_draws, verbose, random_state
        As of `GANRedactor`; the trainer only says what the networks take.

    Attributes
    ----------
    acceptance_rate_ : float
        The share of samples that are kept.
    generator_, ema_generator_, discriminator_, state_, criterion_, support_, n_queries_, n_steps_
        As of `GANRedactor`; nothing is trained.
    invalidity_before_, invalidity_after_ : Invalidity
        As of `GANRedactor`.
    """

    _needs = ("generator",)

    @property
    def acceptance_rate_(self) -> float:
        """The share of samples that are kept."""
        return self.score()

    def sample(self, n_samples=1, *, reject=True):
        """Generate valid samples; see `GANRedactor.sample`."""
        return super().sample(n_samples, reject=reject)

    def before_and_after(self, n_samples=1):
        """Return samples as they come, and samples that were rejected until they were valid."""
        before, _ = super().before_and_after(n_samples)
        return before, self._valid_samples(n_samples, check_random_state(self.random_state))[0]

    def _trained(self, trainer, step, source):
        self.n_steps_ = 0
        return step.initial_state()


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}
