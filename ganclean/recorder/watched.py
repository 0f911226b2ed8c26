"""The door for loops of the usual GAN: what they do is seen, whatever the order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from ganclean.dynamics.record import UpdateRecord
from ganclean.dynamics.step import spoken
from ganclean.dynamics.update import Update
from ganclean.exceptions import NetworkError
from ganclean.losses import AdversarialLoss, Penalty
from ganclean.optim import Optimizer
from ganclean.recipes.adversarial import gan
from ganclean.recorder.loop import Loop
from ganclean.recorder.roles import updates_of
from ganclean.recorder.watch import Watch

PLAYERS = ("G", "D")


class Watched:
    """Says what a watched loop's updates are.

    Parameters
    ----------
    loss, penalty, update, scale, after
        As of `Recorder`.
    """

    reseeds = True

    def __init__(
        self,
        loss: AdversarialLoss,
        penalty: Penalty | None,
        update: str | None,
        scale: float | Mapping[str, float],
        after: Mapping[str, Callable],
    ):
        self.loss, self.penalty, self.update, self.scale, self.after = loss, penalty, update, scale, after

    def check(self, loop: Loop) -> None:
        """Raise where an optimiser moves more than its own network."""
        for name, pairs in loop.names.items():
            others = sorted({player for player, _ in pairs} - {name})
            if others:
                raise ValueError(
                    f"The optimiser of the {spoken(name)} moves parameters of the {spoken(others[0])}, too. Declare "
                    "what each optimiser minimises: Recorder(players={...}, optimizers={...}, updates=[...])."
                )

    def updates(self, rules: Mapping[str, Optimizer], conditional: bool) -> tuple[Update, ...]:
        """Return the updates that steps are made of."""
        made = gan(self.loss, rules["G"], rules["D"], penalty=self.penalty, conditional=conditional, scale=self.scale)
        return tuple(replace(update, after=self.after.get(str(update.name))) for update in made)

    def seen(self, watch: Watch, index: int, y: Tensor | None) -> tuple[tuple[UpdateRecord, ...], Tensor | None]:
        """Return which updates happened, and the labels of the instances where the networks get any."""
        updates, labels = updates_of(watch, self.penalty, y)
        if self.update is not None and {done.name for done in updates} == {*PLAYERS}:
            simultaneous = any(done.meets for done in updates)
            # Where the generator comes first and its samples are judged once more, both words say the same.
            either = updates[0].name == "G" and updates[1].samples_of == 0
            if not either and simultaneous != (self.update == "simultaneous"):
                found = "simultaneous" if simultaneous else "alternating"
                raise NetworkError(
                    f"The loop's updates are {found}: the later one met the other network as it was "
                    f"{'before' if simultaneous else 'after'} the earlier one. Pass it to the Recorder, "
                    f"update={found!r}, or leave it out: the order is seen."
                )
        return updates, labels
