"""Measurements, one file a question. Equality is asserted before anything is timed."""
