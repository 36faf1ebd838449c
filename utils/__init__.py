"""What every step shares: settings, paths, artefacts, models, batches, influence, selection, repair, reporting."""
