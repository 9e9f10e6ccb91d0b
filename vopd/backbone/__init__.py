"""Everything that touches verl or the model's internals: the one place to look when either changes its version."""
