"""What noise does to text and to latents, and when."""
