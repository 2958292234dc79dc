"""`kvtier demo`: the main job on one machine, on real input, with proof that nothing changed."""
