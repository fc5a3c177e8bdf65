"""The photo backbone: pretrained parts from ordinary packages, joined by a trained projector and adapters."""
