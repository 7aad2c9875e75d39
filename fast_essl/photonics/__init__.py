"""E-SSL beyond natural images: the density of states of two-dimensional photonic crystals, from the physics up."""
