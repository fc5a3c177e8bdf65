"""Find pruning schedules for vision-language backbones: profile, detect, solve, evaluate, plot."""
