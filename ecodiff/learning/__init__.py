"""Learning which units matter, and repairing the weights that stay."""
