"""The vision tower: statistics of its attention for each vision token.

- blocks.py finds the transformer blocks of the tower.
- probe.py finds, with gradients, the block that feeds the decoder and the tower positions of each vision token.
- grid.py gives each vision token its place in its image.
- patch_map.py puts both together, and keeps the result for prompts of the same shape.
- received.py computes saliency from queries and keys, without a map of positions x positions.
- tap.py collects the statistics while the model runs.
"""

from pruning_runtime.tower.blocks import VisionTower, find_tower
from pruning_runtime.tower.tap import TowerNeeds, TowerStatistics, TowerTap, tower_tap

__all__ = ["TowerNeeds", "TowerStatistics", "TowerTap", "VisionTower", "find_tower", "tower_tap"]
