"""One training step: its terms, the plan of passes, and what is reported."""
