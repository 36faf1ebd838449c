"""The official data: where they come from, what their files hold, and how those are put into DATA_DIR."""
