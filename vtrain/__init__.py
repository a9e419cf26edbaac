"""vtrain: a performance-first trainer for models over visual tokens."""
