"""A GAN's training as a pure function of its example weights, and the record of a run."""
