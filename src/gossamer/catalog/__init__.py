"""A catalog of small real models and data sets that the public package index carries."""
