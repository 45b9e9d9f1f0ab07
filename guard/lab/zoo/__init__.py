"""A zoo of small suspect models on real images: what is in it, how each was trained, and proof that it still holds."""
