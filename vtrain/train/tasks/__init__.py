"""Training jobs for the one loop (`vtrain.train.loop.Task`)."""
