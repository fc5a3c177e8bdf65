"""Apply a vision-token pruning schedule to a stock Hugging Face vision-language model.

from pruning_runtime import Schedule, pruned

schedule = Schedule.load("4_schedule.json")
with pruned(model, schedule) as record:
    model.generate(**inputs, max_new_tokens=32)
print(record)
"""

from pruning_runtime.backbone import Backbone, find_backbone
from pruning_runtime.errors import PruningError, ScheduleError, UnsupportedBackbone
from pruning_runtime.pruned import pruned
from pruning_runtime.record import Record
from pruning_runtime.schedule import Schedule, Stage

__all__ = [
    "Backbone",
    "PruningError",
    "Record",
    "Schedule",
    "ScheduleError",
    "Stage",
    "UnsupportedBackbone",
    "find_backbone",
    "pruned",
]
__version__ = "0.1.0"
