"""Gateway in front of the replicas: one HTTP address for several models."""
