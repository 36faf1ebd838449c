"""The official data sets: where they come from, what their files hold, and how the files get into DATA_DIR."""
