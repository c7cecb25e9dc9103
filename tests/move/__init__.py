"""Did the move change a number? Cases of version 0.1, what it gave for them, and the replay."""
