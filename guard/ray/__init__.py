"""The Ray engine: archives served by replicas of a Ray Serve deployment, over the open inference protocol."""
