"""The contract with a network, and one forward of it in one mode."""
