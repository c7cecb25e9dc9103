"""A trained model in use: what it says of texts and latents, and its file."""
