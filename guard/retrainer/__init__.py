"""Online retraining: decided items in, a candidate out, a gate before the traffic. Import from its modules."""
