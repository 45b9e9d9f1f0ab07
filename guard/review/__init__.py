"""The page where people review flagged inputs, and the JSON interface beside it; needs FastAPI."""

from guard.review.app import create_app
from guard.review.desk import Desk, ReviewSettings

__all__ = ["Desk", "ReviewSettings", "create_app"]
