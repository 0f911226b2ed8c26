"""The errors that ganclean raises, each with what was wrong, what was expected and what to do."""


class GANCleanError(Exception):
    """Base class of every error that ganclean itself raises."""


class NetworkError(GANCleanError, ValueError):
    """A generator, discriminator or feature extractor cannot take part in a recorded training run."""


class MetricError(GANCleanError, ValueError):
    """A metric cannot say how good the generated samples are, or has no gradient in the generator."""


class TrajectoryError(GANCleanError, ValueError):
    """A recorded trajectory is truncated, belongs to another model or other data, or would be overwritten."""


class ReplayMismatchError(TrajectoryError):
    """Replaying a recorded step did not give the recorded state; the message names the tensor and the deviation."""


class NonFiniteError(GANCleanError, ArithmeticError):
    """A loss, a metric or an adjoint became NaN or infinite."""


class MissingExtraError(GANCleanError, ImportError):
    """An optional dependency is needed for this call; the message names the extra that installs it."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """Return the error for an optional `package` that the extra `extra` would have installed."""
    return MissingExtraError(
        f"This needs the package {package!r}, which is not installed. Install it with: pip install 'ganclean[{extra}]'"
    )
