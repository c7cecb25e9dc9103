"""What crosses in the middle of a cycle: a text or a latent."""
