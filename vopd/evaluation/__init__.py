"""Evaluation: the one answer parser, per-question records and the statistics on them."""
