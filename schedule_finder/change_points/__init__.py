"""Change points of what text query tokens attend to in the image."""
from schedule_finder.change_points.attention_shift import AttentionShift
from schedule_finder.change_points.base import ChangePoints
