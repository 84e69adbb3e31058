"""Language: preferences, forgetting, data."""
