"""Vision-OPD-6K, the published triplets of the paper: from its files to a validated folder of splits."""
