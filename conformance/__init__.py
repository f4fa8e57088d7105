"""Proof that both frameworks walk one trajectory: problems, drivers, comparisons, recorded runs, the command."""
