"""Reports: what a run folder's records and metrics say, as JSON, a terminal table and plots."""
