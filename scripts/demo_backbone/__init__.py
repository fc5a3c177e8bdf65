"""Parts of `scripts/train_demo_backbone.py`: the training of the embedded demo backbone."""
