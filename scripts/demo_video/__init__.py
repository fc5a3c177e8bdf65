"""Training of the video demo backbone; what it shares with the demo backbone is in `scripts.demo_backbone`."""
