"""Words for shapes, checks, reductions and precision, which every other folder uses."""
