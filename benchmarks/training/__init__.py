"""Trainings of small models on real data, and rates that carry over from AdamW."""
