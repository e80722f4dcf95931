"""Other tools' names for the points of each architecture, as data: one file an architecture, which imports no model."""
