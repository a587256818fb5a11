"""The scheduler judged: `sotto bench scheduler`."""
