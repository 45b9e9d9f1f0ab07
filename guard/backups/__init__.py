"""Independent second opinions: networks that a backdoor of the suspect model does not reach, or no longer."""
