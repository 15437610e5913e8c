"""``d2o demo``: D2O on a small language whose answers are judged exactly."""
