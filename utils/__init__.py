"""What every step shares: settings, paths, artifacts, models, batches, influence, selection, repair, reporting."""
