"""Step 4a: what is measured on the model: answer KL, sensitivity table, latency."""
