"""Ways to run samples through a backbone: in this process, or on a Ray cluster."""
