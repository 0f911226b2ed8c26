"""How the gallery of examples is run and ordered."""

import torch

FIRST = ["digits", "own_gan", "own_loop", "prefiltering", "valuation", "redaction", "redaction_rule"]


def reset(gallery_conf, example):
    """Undo what an earlier example has set; one thread, so that two builds give the same pictures."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)


class TeachingOrder:
    """The key that sorts examples: what one learns first, then all others by name."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, filename):
        name = filename.removeprefix("plot_").removesuffix(".py")
        return (FIRST.index(name) if name in FIRST else len(FIRST), name)

    def __repr__(self):
        return "<TeachingOrder>"
