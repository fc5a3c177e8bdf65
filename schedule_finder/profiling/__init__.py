"""Step 2: attention profiles of samples: capture, store, convergence, engines."""
