"""The page where people review flagged inputs, and the JSON interface beside it; needs FastAPI."""
