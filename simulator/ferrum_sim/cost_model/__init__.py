"""Cost models: how long a step takes on hardware that need not be there."""
